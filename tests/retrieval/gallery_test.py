"""A gallery kept on the devices, and rows that queries leave out."""

import jax
import numpy as np
import pytest

from abe_jax import retrieval
from abe_jax.retrieval import plan


def whole_rows(seed, number, dim=8):
    """Rows of small whole numbers: exact products, many ties and equal rows."""
    rng = np.random.default_rng(seed)
    return rng.integers(-2, 3, (number, dim)).astype(np.float32)


def stable(queries, gallery, k, own=None):
    """The k best by a stable sort, without each query's own row."""
    sims = queries @ gallery.T
    if own is not None:
        sims[np.flatnonzero(own >= 0), own[own >= 0]] = -np.inf
    order = np.argsort(-sims, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(sims, order, 1), order


@pytest.mark.parametrize("devices", [1, 3])
@pytest.mark.parametrize("copies", [0, 60])
def test_equal_to_a_stable_sort(devices, copies):
    g = np.unique(whole_rows(0, 700), axis=0)
    g = np.random.default_rng(1).permutation(np.concatenate([g, g[:copies]]))
    held = retrieval.Gallery(g, devices=jax.devices()[:devices])
    assert len(held) == len(g)
    for seed, (number, k) in enumerate([(1, 5), (3, 1), (5, len(g)), (300, 4)]):
        q = whole_rows(10 + seed, number)
        for found, want in zip(held.top_k(q, k), stable(q, g, k), strict=True):
            np.testing.assert_array_equal(found, want)


@pytest.mark.parametrize("copies", [0, 60])
def test_own_rows_are_left_out(copies):
    g = np.unique(whole_rows(2, 500), axis=0)
    g = np.concatenate([g, g[:copies]])
    own = np.array([7, -1, len(g) - 1, 0, 7])
    q = g[own]
    for search in (
        lambda k: retrieval.top_k(q, g, k, own_rows=own),
        lambda k: retrieval.Gallery(g).top_k(q, k, own_rows=list(own)),
    ):
        for k in (1, 6, len(g) - 1):
            sims, index = search(k)
            want = stable(q, g, k, own)
            np.testing.assert_array_equal(index, want[1])
            np.testing.assert_array_equal(sims, want[0])
            assert not (index == own[:, None]).any()


def test_nothing_but_queries_is_sent_again(monkeypatch):
    g = np.random.default_rng(3).normal(size=(5000, 32)).astype(np.float32)
    sent = []
    put = plan.Plan.put
    monkeypatch.setattr(
        plan.Plan,
        "put",
        lambda self, value, *rest: sent.append(value.nbytes) or put(self, value, *rest),
    )
    held = retrieval.Gallery(g, devices=jax.devices()[:1])
    assert sum(sent) >= g.nbytes
    want = stable(g[:3], g, 10)[1]
    g[:] = 0  # nor is the array looked at again
    sent.clear()
    queries = np.random.default_rng(3).normal(size=(5000, 32)).astype(np.float32)[:3]
    np.testing.assert_array_equal(held.top_k(queries, 10)[1], want)
    assert sum(sent) < 5000


def test_embeddings_of_learners_are_their_concatenation():
    e = np.random.default_rng(4).normal(size=(90, 4, 8)).astype(np.float32)
    flat, y = e.reshape(90, -1), np.arange(90) % 9
    want = retrieval.top_k(flat[:5], flat, 3)
    for found in (retrieval.top_k(e[:5], e, 3), retrieval.Gallery(e).top_k(e[:5], 3)):
        np.testing.assert_array_equal(found, want)
    ours = retrieval.evaluate_retrieval(e, y, (1, 2))
    assert ours == retrieval.evaluate_retrieval(flat, y, (1, 2))


ROWS = np.eye(4, dtype=np.float32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: retrieval.Gallery(ROWS[0]), r"shape \(4,\).*must be \[number"),
        (lambda: retrieval.Gallery([[1.0], [1.0, 2.0]]), "equally long"),
        (lambda: retrieval.Gallery(ROWS / 0 * ROWS), r"embeddings\[0\] is not finite"),
        (lambda: retrieval.Gallery(ROWS).top_k(ROWS[:, :2], 1), "2 columns.* has 4"),
        (lambda: retrieval.Gallery(ROWS).top_k(ROWS, 5), "from 1 to 4"),
        (lambda: retrieval.Gallery(ROWS).top_k(ROWS, True), "k is True"),
        (lambda: retrieval.Gallery(ROWS[:1]).top_k(ROWS[:1], 1, own_rows=[0]), "only"),
        (lambda: retrieval.top_k(ROWS, ROWS, 1, own_rows=[0, 1]), "4 integers"),
        (lambda: retrieval.top_k(ROWS, ROWS, 1, own_rows=[0, 1, 2, 4]), "from 0 to 3"),
        (lambda: retrieval.top_k(ROWS, ROWS, 1, own_rows=np.ones(4)), "4 integers"),
        (
            lambda: retrieval.top_k(ROWS, ROWS, 1, own_rows=[0] * 4, exclude_self=True),
            "give one",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
