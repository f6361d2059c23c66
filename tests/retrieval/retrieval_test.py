"""Retrieval against a double loop, on random and on awkward inputs."""

import math
import re
from pathlib import Path

import faiss
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax import lax

from abe_jax import retrieval
from abe_jax.retrieval import counting, search

KS = (1, 2, 4, 1000)
DEVICES = jax.devices()
COMMON = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def similarities(queries, gallery):
    """Exact inner products rounded to float32, one pair at a time."""
    result = np.empty((len(queries), len(gallery)), np.float32)
    for i, a in enumerate(np.asarray(queries, np.float64)):
        for j, b in enumerate(np.asarray(gallery, np.float64)):
            result[i, j] = math.fsum(a * b)
    return result


def expected(e, y, ks, gallery=None, gallery_labels=None):
    """(hits, MAP@R, R-precision, counted queries) by the rules, pair by pair."""
    own = gallery is None
    g, gy = (e, y) if own else (gallery, gallery_labels)
    sims = similarities(e, g)
    hits, counted, average, share = dict.fromkeys(ks, 0), 0, 0.0, 0.0
    for i in range(len(e)):
        positives, negatives = [], []
        for j in range(len(g)):
            if gy[j] != y[i]:
                negatives.append(sims[i, j])
            elif not (own and i == j):
                positives.append(sims[i, j])
        if not positives:
            continue
        counted += 1
        found = 0
        for r, p in enumerate(sorted(positives, reverse=True), start=1):
            rank = r + sum(n >= p for n in negatives)
            if r == 1:
                for k in ks:
                    hits[k] += int(rank <= k)
            if rank <= len(positives):
                found += 1
                average += r / rank / len(positives)
        share += found / len(positives)
    return hits, average / max(counted, 1), share / max(counted, 1), counted


def check(result, want):
    hits, average, share, counted = want
    assert result.hits == hits
    assert result.num_queries == counted
    assert result.recall == {k: n / counted for k, n in hits.items()}
    assert result.map_at_r == pytest.approx(average, abs=1e-12)
    assert result.r_precision == pytest.approx(share, abs=1e-12)


def draw_rows(rng, number, dim, kind):
    if kind == "integers":  # exact in any arithmetic, and full of ties
        return rng.integers(-2, 3, (number, dim)).astype(np.float32)
    rows = rng.normal(size=(number, dim)).astype(np.float32)
    if kind == "close":  # similarities apart by about a rounding error
        rows = 1 + 1e-4 * rows
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def units(seed, number, dim, classes):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, number)
    e = 0.7 * rng.normal(size=(classes, dim))[y] + rng.normal(size=(number, dim))
    return (e / np.linalg.norm(e, axis=1, keepdims=True)).astype(np.float32), y


@COMMON
@given(
    seed=st.integers(0, 2**32 - 1),
    number=st.integers(2, 70),
    other=st.none() | st.sampled_from([1, 20, 50]),
    classes=st.integers(1, 24),
    dim=st.sampled_from([2, 7]),
    kind=st.sampled_from(["normal", "integers", "close"]),
    copies=st.integers(0, 40),
    devices=st.sampled_from([1, 2, 8]),
    memory=st.sampled_from([None, None, 0.004]),
)
def test_metrics_equal_a_double_loop(
    seed, number, other, classes, dim, kind, copies, devices, memory
):
    rng = np.random.default_rng(seed)
    total = number + (other or 0)
    e = draw_rows(rng, total, dim, kind)
    e[rng.integers(0, total, copies)] = e[rng.integers(0, total, copies)]
    y = rng.integers(0, classes, total)
    options = {"devices": DEVICES[:devices], "block_memory_mb": memory}
    gallery = {}
    if other:
        gallery = {"gallery_embeddings": e[number:], "gallery_labels": y[number:]}
    e, y = e[:number], y[:number]
    want = expected(e, y, KS, *gallery.values())
    if not want[-1]:
        with pytest.raises(ValueError, match="no query has a positive"):
            retrieval.evaluate_retrieval(e, y, KS, **gallery, **options)
        return
    check(retrieval.evaluate_retrieval(e, y, KS, **gallery, **options), want)


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


def test_counts_do_not_depend_on_devices_or_blocks():
    e, y = units(1, 900, 48, 60)
    e = np.concatenate([e, e[:200]])  # equal rows far apart, of another label
    y = np.concatenate([y, y[:200] + 1])
    want = retrieval.evaluate_retrieval(e, y, KS, devices=DEVICES[:1])
    assert 0 < want.hits[1] < want.num_queries
    for devices, memory in ((8, None), (1, 0.1), (3, 1.0)):
        result = retrieval.evaluate_retrieval(
            e, y, KS, devices=DEVICES[:devices], block_memory_mb=memory
        )
        assert result == want


@pytest.mark.parametrize("devices", [1, 8])
def test_equal_rows_tie_against_the_model(devices):
    rng = np.random.default_rng(2)
    row = rng.normal(size=(1, 333)).astype(np.float32)
    e, y = np.repeat(row, 600, axis=0), np.arange(600) % 20
    result = retrieval.evaluate_retrieval(
        e, y, (1, 570, 571), devices=DEVICES[:devices]
    )
    # Each of the 570 negatives stands before the first positive.
    assert result.recall == {1: 0.0, 570: 0.0, 571: 1.0}
    assert result.map_at_r == result.r_precision == 0.0
    _, index = retrieval.top_k(e, e, 599, exclude_self=True, devices=DEVICES[:devices])
    others = np.array([np.delete(np.arange(600), i) for i in range(600)])
    np.testing.assert_array_equal(index, others)


def test_large_classes_are_counted_in_portions():
    e, y = units(3, 400, 5, 2)
    want = expected(e[:150], y[:150], KS)
    check(retrieval.evaluate_retrieval(e[:150], y[:150], KS), want)
    whole = retrieval.evaluate_retrieval(e, y, KS, devices=DEVICES[:1])
    small = retrieval.evaluate_retrieval(
        e, y, KS, devices=DEVICES[:1], block_memory_mb=0.5
    )
    assert small == whole


def test_hand_made_angles():
    angles = np.deg2rad([0, 20, 50, 90, 180])
    e = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    y = np.array([0, 0, 1, 1, 2])
    # Nearest others: 0 -> 20; 20 -> 0; 50 -> 20 (wrong); 90 -> 50; 180 is lone.
    result = retrieval.evaluate_retrieval(e, y, (1, 2))
    assert result.hits == {1: 3, 2: 4}
    assert (result.num_queries, result.num_lone_queries) == (4, 1)
    assert result.num_gallery == 5
    assert result.map_at_r == result.r_precision == 0.75
    assert retrieval.recall_at_k(e, y, (1, 2)) == {1: 0.75, 2: 1.0}
    assert retrieval.map_at_r(e, y) == retrieval.r_precision(e, y) == 0.75


def test_perfect_and_worst():
    e = np.eye(4, dtype=np.float32)[np.arange(12) % 4]
    best = retrieval.evaluate_retrieval(e, np.arange(12) % 4, (1,))
    assert best.recall[1] == best.map_at_r == best.r_precision == 1.0
    worst = retrieval.evaluate_retrieval(e, np.arange(12) // 3, (1,))
    assert worst.recall[1] == worst.map_at_r == worst.r_precision == 0.0


def test_types_of_labels_and_arrays():
    e, y = units(4, 90, 8, 12)
    want = retrieval.evaluate_retrieval(e, y, (1, 3))
    # Neighbours far above 2^24 and 2^53: float labels would run together.
    for labels in (y + 2**60, y.astype(str), jnp.asarray(y, jnp.int32), list(y)):
        assert retrieval.evaluate_retrieval(e, labels, (1, 3)) == want
    assert retrieval.evaluate_retrieval(jnp.asarray(e), y, (1, 3)) == want
    assert retrieval.evaluate_retrieval(e.astype(np.float64), y, (1, 3)) == want
    result = retrieval.recall_at_k(e, y, np.array([3, 1]))
    assert list(result) == [3, 1] and all(type(v) is float for v in result.values())
    sims, index = retrieval.top_k(jnp.asarray(e), e, 2)
    assert type(sims) is np.ndarray and type(index) is np.ndarray


def test_low_precision_keeps_the_ranks(monkeypatch):
    """The product as a TPU does it by default: operands rounded to bfloat16."""

    def rounded(left, right, precision):
        if precision == lax.Precision.DEFAULT:
            left, right = (
                x.astype(jnp.bfloat16).astype(jnp.float32) for x in (left, right)
            )
        return lax.dot_general(left, right, (((1,), (1,)), ((), ())))

    e, y = units(5, 300, 32, 40)
    e = e + 3  # all alike, as those of a fresh network are
    e = (e / np.linalg.norm(e, axis=1, keepdims=True)).astype(np.float32)
    want = expected(e, y, KS)
    naive = np.array(rounded(jnp.asarray(e), jnp.asarray(e), lax.Precision.DEFAULT))
    np.fill_diagonal(naive, -np.inf)
    assert (y[naive.argmax(axis=1)] == y).sum() != want[0][1]
    monkeypatch.setattr(counting, "product", rounded)
    counting._counter.cache_clear()
    for precision in ("default", "high", lax.Precision.HIGHEST):
        result = retrieval.evaluate_retrieval(e, y, KS, precision=precision)
        check(result, want)
    counting._counter.cache_clear()


def test_products_are_float32_by_default(monkeypatch):
    seen = []

    def product(left, right, precision):
        seen.append(precision)
        return lax.dot_general(left, right, (((1,), (1,)), ((), ())))

    for module in (counting, search):
        monkeypatch.setattr(module, "product", product)
    counting._counter.cache_clear()
    search._searcher.cache_clear()
    e, y = units(6, 40, 4, 3)
    retrieval.recall_at_k(e, y, (1,))
    retrieval.top_k(e, e, 3)
    assert len(seen) >= 2 and set(seen) == {lax.Precision.HIGHEST}
    counting._counter.cache_clear()
    search._searcher.cache_clear()


@pytest.mark.parametrize("devices", [1, 8])
def test_memory_map_is_streamed_within_the_memory_given(tmp_path, monkeypatch, devices):
    e, y = units(7, 1200, 40, 90)
    np.save(tmp_path / "e.npy", e)
    mapped = np.load(tmp_path / "e.npy", mmap_mode="r")
    sizes = []
    put = counting.Plan.put

    def recording(self, value, *rest):
        sizes.append(value.nbytes)
        return put(self, value, *rest)

    options = {"devices": DEVICES[:devices], "block_memory_mb": 0.1}
    want = retrieval.evaluate_retrieval(e, y, KS, devices=DEVICES[:1])
    wanted = retrieval.top_k(e[:50], e, 7)
    monkeypatch.setattr(counting.Plan, "put", recording)
    assert retrieval.recall_at_k(mapped, y, KS, **options) == want.recall
    result = retrieval.recall_at_k(
        mapped, y, KS, gallery_embeddings=mapped, gallery_labels=y, **options
    )
    assert result[1] == 1.0  # an explicit gallery holds the query itself
    assert max(sizes) <= 0.1 * 2**20 / 4 < mapped.nbytes / 7
    sims, index = retrieval.top_k(mapped[:50], mapped, 7, **options)
    assert max(sizes) <= 0.1 * 2**20 / 4 * devices  # a shard on each
    np.testing.assert_allclose(sims, wanted[0], atol=1e-6)
    np.testing.assert_array_equal(index, wanted[1])


def test_progress_reaches_the_end():
    e, y = units(8, 500, 8, 40)
    for memory in (None, 0.05):
        told = []
        options = {
            "block_memory_mb": memory,
            "progress": lambda a, b, told=told: told.append((a, b)),
        }
        retrieval.evaluate_retrieval(e, y, (1,), **options)
        assert told == sorted(told) and told[-1] == (500, 500)
        told.clear()
        retrieval.top_k(e, e, 3, **options)
        assert told == sorted(told) and told[-1] == (500, 500)
    assert len(told) > 2


ROWS = np.ones((4, 3), np.float32)
LABELS = np.array([0, 0, 1, 1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: retrieval.top_k(ROWS[0], ROWS, 1), r"shape \(3,\).*\[number, dim"),
        (lambda: retrieval.top_k(ROWS, ROWS[:, :2], 1), "3 columns.* has 2"),
        (lambda: retrieval.top_k(ROWS, ROWS, 0), "k is 0.*from 1"),
        (lambda: retrieval.top_k(ROWS, ROWS, 1.5), "k is 1.5"),
        (lambda: retrieval.top_k(ROWS, ROWS, 5), "k must be from 1 to 4"),
        (
            lambda: retrieval.top_k(ROWS, ROWS, 4, exclude_self=True),
            "k must be from 1 to 3",
        ),
        (
            lambda: retrieval.top_k(ROWS, ROWS[:2], 1, exclude_self=True),
            "4 queries and only 2 gallery rows",
        ),
        (lambda: retrieval.recall_at_k(ROWS, LABELS, ()), "ks is"),
        (lambda: retrieval.recall_at_k(ROWS, LABELS, 1), "ks is 1"),
        (lambda: retrieval.recall_at_k(ROWS, LABELS, (0,)), "each of ks is 0"),
        (lambda: retrieval.recall_at_k(ROWS, LABELS[:3], (1,)), r"must be \(4,\)"),
        (lambda: retrieval.recall_at_k(ROWS, LABELS * 1.0, (1,)), "integers or str"),
        (lambda: retrieval.recall_at_k(ROWS[:0], LABELS[:0], (1,)), "at least 1"),
        (lambda: retrieval.recall_at_k(ROWS * 1j, LABELS, (1,)), "hold numbers"),
        (lambda: retrieval.recall_at_k(ROWS, np.arange(4), (1,)), "no query has"),
        (
            lambda: retrieval.map_at_r(ROWS, LABELS, gallery_embeddings=ROWS),
            "belong together",
        ),
        (
            lambda: retrieval.r_precision(
                ROWS,
                LABELS,
                gallery_embeddings=ROWS,
                gallery_labels=LABELS.astype(str),
            ),
            "both must be integers",
        ),
        (
            lambda: retrieval.map_at_r(ROWS, LABELS, block_memory_mb=0),
            "block_memory_mb is 0",
        ),
        (lambda: retrieval.map_at_r(ROWS, LABELS, devices=()), "devices is empty"),
        (lambda: retrieval.map_at_r(ROWS, LABELS, precision="x"), "precision is 'x'"),
        (lambda: retrieval.map_at_r(ROWS * 1e30, LABELS), "overflow"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_first_row_that_is_not_finite_is_named(bad):
    e, y = units(9, 50, 4, 5)
    e[[30, 17], 2] = bad
    with pytest.raises(ValueError, match=r"embeddings\[17\] is not finite"):
        retrieval.evaluate_retrieval(e, y, (1,))
    with pytest.raises(ValueError, match=r"gallery\[17\] is not finite"):
        retrieval.top_k(e[:10], e, 1)


def test_code_in_the_documentation_runs():
    page = Path(__file__).parents[2] / "docs" / "retrieval.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert blocks
    names = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)


def test_parts_of_the_queries_add_up():
    rng = np.random.default_rng(0)
    e, y = rng.normal(size=(50, 8)), rng.integers(0, 12, 50)
    y[:5] = 100 + np.arange(5)  # a part with lone queries only
    whole = retrieval.evaluate_retrieval(e, y, KS)
    parts = [
        retrieval.evaluate_retrieval(e, y, KS, query_range=(start, stop))
        for start, stop in ((0, 5), (5, 6), (6, 31), (31, 50))
    ]
    assert parts[0].num_queries == 0 and parts[0].num_lone_queries == 5
    assert {k: sum(p.hits[k] for p in parts) for k in KS} == whole.hits
    assert sum(p.num_queries for p in parts) == whole.num_queries
    total = sum(p.map_at_r * p.num_queries for p in parts)
    np.testing.assert_allclose(total / whole.num_queries, whole.map_at_r, rtol=1e-12)
    with pytest.raises(ValueError, match="must lie within"):
        retrieval.evaluate_retrieval(e, y, KS, query_range=(0, 51))
