"""Nearest neighbours against faiss and a stable sort."""

import faiss
import jax
import numpy as np
from double_loop import draw_rows, similarities, units
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from abe_jax import retrieval

DEVICES = jax.devices()
COMMON = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@COMMON
@given(
    seed=st.integers(0, 2**32 - 1),
    gallery=st.sampled_from([2, 70]),
    own=st.booleans(),
    place=st.sampled_from([0.0, 0.3, 1.0]),
    copies=st.sampled_from([0, 0, 3]),
    kind=st.sampled_from(["normal", "integers"]),
    where=st.sampled_from([(1, None), (1, 0.01), (8, None)]),
)
def test_top_k_equals_faiss_and_a_stable_sort(
    seed, gallery, own, place, copies, kind, where
):
    rng = np.random.default_rng(seed)
    number, (devices, memory) = min(gallery, 40), where
    g = draw_rows(rng, gallery, 8, kind)
    g[rng.integers(0, gallery, copies)] = g[rng.integers(0, gallery, copies)]
    q = g[:number] if own else draw_rows(rng, number, 8, kind)
    k = 1 + round(place * (gallery - 1 - int(own)))
    sims, index = retrieval.top_k(
        q, g, k, exclude_self=own, devices=DEVICES[:devices], block_memory_mb=memory
    )
    assert sims.dtype == np.float32 and index.dtype == np.int32
    exact = similarities(q, g)
    if own:
        exact[np.arange(len(q)), np.arange(len(q))] = -np.inf
    order = np.argsort(-exact, axis=1, kind="stable")[:, :k]
    np.testing.assert_allclose(sims, np.take_along_axis(exact, order, 1), atol=1e-6)
    # In another place only what rounding cannot tell apart; equal rows never.
    chosen = np.take_along_axis(exact, index, 1)
    np.testing.assert_allclose(chosen, sims, atol=1e-6)
    assert all(len(set(row)) == k for row in index)
    if kind == "integers":
        np.testing.assert_array_equal(index, order)
    for row in range(len(q)):
        for a, b in zip(index[row], index[row, 1:], strict=False):
            assert a < b or (g[a] != g[b]).any()
    flat = faiss.IndexFlatIP(8)
    flat.add(g)
    values, _ = flat.search(q, min(k + int(own), gallery))
    if not own:
        np.testing.assert_allclose(values, sims, atol=1e-6)


def test_neighbours_are_those_of_faiss_where_similarities_differ():
    e, _ = units(0, 1500, 64, 100)
    flat = faiss.IndexFlatIP(64)
    flat.add(e)
    values, index = flat.search(e, 41)
    sims, found = retrieval.top_k(e, e, 40, exclude_self=True)
    np.testing.assert_array_equal(index[:, 0], np.arange(len(e)))
    np.testing.assert_allclose(values[:, 1:], sims, atol=1e-6)
    apart = np.diff(values[:, 1:], axis=1) < -2e-6
    clear = np.ones_like(found, bool)
    clear[:, 1:] &= apart
    clear[:, :-1] &= apart
    clear[:, -1] = False  # its other neighbour is not in the list
    assert clear.mean() > 0.8
    np.testing.assert_array_equal(found[clear], index[:, 1:][clear])
