"""Neighbours within one set, found from half of the similarity matrix."""

import jax
import numpy as np
import pytest

from abe_jax import retrieval
from abe_jax.retrieval import neighbours
from abe_jax.retrieval.plan import Plan
from abe_jax.retrieval.rows import Rows


@pytest.fixture
def calls(monkeypatch):
    """Numbers of neighbours that were asked of the half matrix."""
    seen = []
    find = neighbours.find_others

    def counted(rows, k, plan):
        seen.append(k)
        return find(rows, k, plan)

    monkeypatch.setattr(neighbours, "find_others", counted)
    return seen


def whole_rows(number, dim=12, seed=0):
    """Different rows of small whole numbers: many equal similarities, all exact."""
    rng = np.random.default_rng(seed)
    rows = np.unique(rng.integers(-3, 4, (number + 100, dim)), axis=0)
    rows = rng.permutation(rows)[:number].astype(np.float32)
    assert len(rows) == number
    return rows


def search(rows, k, **options):
    return retrieval.top_k(
        rows, rows, k, exclude_self=True, devices=jax.devices()[:1], **options
    )


# Whole tiles, a part of one, groups of padding only, and one row beyond a group.
@pytest.mark.parametrize(
    ("number", "k"),
    [
        *((1024, 1), (1100, 1), (2049, 2), (3300, 3)),
        pytest.param(10_300, 10, marks=pytest.mark.slow),
    ],
)
def test_equal_to_a_stable_sort(number, k, calls):
    rows = whole_rows(number)
    progress = []
    sims, index = search(rows, k, progress=lambda done, _: progress.append(done))
    assert calls == [k]
    assert sims.dtype == np.float32 and index.dtype == np.int32
    for start in range(0, number, 1000):
        exact = rows[start : start + 1000] @ rows.T
        here = np.arange(len(exact))
        exact[here, start + here] = -np.inf
        order = np.argsort(-exact, axis=1, kind="stable")[:, :k]
        np.testing.assert_array_equal(index[start : start + 1000], order)
        np.testing.assert_array_equal(
            sims[start : start + 1000], np.take_along_axis(exact, order, 1)
        )
    assert progress == sorted(progress) and progress[-1] == number


def test_negative_similarities(calls):
    rows = np.unique(np.abs(whole_rows(1400)), axis=0)[:1100]
    rows[0] = -rows[-1]  # below all that fills up tiles
    sims, index = search(rows, 1)
    exact = rows @ rows.T - 1e6 * np.eye(1100, dtype=np.float32)
    np.testing.assert_array_equal(index[:, 0], exact.argmax(axis=1))
    np.testing.assert_array_equal(sims[:, 0], exact.max(axis=1))
    assert calls == [1]


def test_what_the_host_holds_counts():
    """10,300 x 10 x 10 similarities and positions: 8.24 MB; on the device 3.8 MB."""
    rows = Rows(whole_rows(10_300), "rows")
    devices, precision = tuple(jax.devices()[:1]), jax.lax.Precision.HIGHEST
    for memory, fits in ((8.2e6, False), (8.3e6, True)):
        plan = Plan(devices, memory, precision, None)
        assert neighbours.fits(rows, 10, plan) == fits


def test_other_ways_where_it_does_not_fit(calls):
    rows = whole_rows(1100)
    _, index = search(rows, 1)
    assert calls == [1]
    for arguments in (
        {"k": 2},  # too many of so few rows
        {"k": 1, "block_memory_mb": 0.05},
        {"k": 1, "devices": jax.devices()[:2]},
    ):
        k = arguments.pop("k")
        arguments.setdefault("devices", jax.devices()[:1])
        _, found = retrieval.top_k(rows, rows, k, exclude_self=True, **arguments)
        np.testing.assert_array_equal(found[:, :1], index)
    rows[7] = rows[900] = 10 * rows[900]  # nothing is nearer than the copy
    _, found = search(rows, 1)
    assert found[7] == 900 and found[900] == 7
    assert calls == [1]
