"""The metrics against a double loop, on random and on awkward inputs."""

import warnings

import jax
import numpy as np
import pytest
from double_loop import check, draw_rows, expected, units
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from abe_jax import retrieval
from abe_jax.retrieval import plan, recount

KS = (1, 2, 4, 1000)
DEVICES = jax.devices()
COMMON = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@given(
    seed=st.integers(0, 2**32 - 1),
    number=st.integers(2, 60),
    other=st.none() | st.sampled_from([1, 20, 50]),
    classes=st.integers(1, 24),
    dim=st.sampled_from([2, 7]),
    kind=st.sampled_from(["normal", "integers", "close", "signs"]),
    copies=st.integers(0, 40),
    leave_out=st.sampled_from([None, "groups", "own_rows"]),
    per_query=st.booleans(),
    devices=st.sampled_from([1, 2, 8]),
    memory=st.sampled_from([None, None, 0.004]),
    sorts=st.booleans(),
)
@COMMON
def test_metrics_equal_a_double_loop(
    seed,
    number,
    other,
    classes,
    dim,
    kind,
    copies,
    leave_out,
    per_query,
    devices,
    memory,
    sorts,
):
    rng = np.random.default_rng(seed)
    total = number + (other or 0)
    e = draw_rows(rng, total, dim, kind)
    e[rng.integers(0, total, copies)] = e[rng.integers(0, total, copies)]
    y = rng.integers(0, classes, total)
    options = {"devices": DEVICES[:devices], "block_memory_mb": memory}
    gallery, left_out = {}, None
    if other:
        gallery = {"gallery_embeddings": e[number:], "gallery_labels": y[number:]}
    if leave_out == "groups":
        cameras = rng.integers(0, 6, total)
        options["groups"] = cameras[:number].astype(str)
        cameras = np.r_[cameras[:number], 1 + cameras[number:]]  # two of one side only
        if other:
            options["gallery_groups"] = cameras[number:].astype(str)
        offset = number if other else 0

        def left_out(i, j):
            return cameras[i] == cameras[offset + j]

    elif leave_out == "own_rows" and other:
        options["own_rows"] = rng.integers(-1, other, number)

        def left_out(i, j):
            return options["own_rows"][i] == j

    e, y = e[:number], y[:number]
    want = expected(e, y, KS, *gallery.values(), left_out=left_out)
    with pytest.MonkeyPatch.context() as patch:
        if sorts:  # as for classes of hundreds
            patch.setattr(plan.Plan, "most_positives", 2)
            patch.setattr(recount, "_SORTED_FROM", 1)
        if not want.rows:
            with pytest.raises(ValueError, match="no query has a positive"):
                retrieval.evaluate_retrieval(e, y, KS, **gallery, **options)
            return
        result = retrieval.evaluate_retrieval(
            e, y, KS, **gallery, **options, per_query=per_query
        )
        assert (result.queries is not None) == per_query
        check(result, want)
        recall = retrieval.recall_at_k(e, y, KS, **gallery, **options)
        assert recall == result.recall


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
    share = (6, 31)
    assert retrieval.recall_at_k(e, y, KS, query_range=share) == parts[2].recall
    with pytest.raises(ValueError, match="whole numbers within"):
        retrieval.evaluate_retrieval(e, y, KS, query_range=(0, 51))


def test_means_and_worst_queries_of_each_class():
    e, y = units(10, 120, 6, 9)
    names = np.array([f"class {label}" for label in y])
    result = retrieval.evaluate_retrieval(e, names, (1, 3), per_query=True)
    want, queries = expected(e, y, (1, 3)), result.queries
    check(result, want)
    ranks = np.array(want.first_rank)
    assert queries.mean_reciprocal_rank == pytest.approx(np.mean(1 / ranks))
    assert queries.mean_average_precision == pytest.approx(
        np.mean(want.average_precision)
    )
    for k, values in want.precision.items():
        assert queries.mean_precision[k] == pytest.approx(np.mean(values))
    labels, means = queries.class_means(queries.average_precision)
    assert labels.tolist() == sorted(set(names[want.rows]))
    for label, mean in zip(labels, means, strict=True):
        own = [names[row] == label for row in want.rows]
        assert mean == pytest.approx(np.mean(np.array(want.average_precision)[own]))
    _, recalls = queries.class_means(queries.first_rank <= 1)
    counts = np.unique(names[want.rows], return_counts=True)[1]
    assert (recalls * counts).sum() == pytest.approx(result.hits[1])
    worst = queries.worst(7)
    order = sorted(
        range(len(ranks)), key=lambda i: (want.average_precision[i], -ranks[i], i)
    )
    assert worst.tolist() == order[:7]
    assert len(queries.worst(10**6)) == len(ranks)


def test_no_query_in_the_range():
    e, y = units(10, 20, 6, 3)
    result = retrieval.evaluate_retrieval(
        e, y, (1,), query_range=(7, 7), per_query=True
    )
    assert result.num_queries == 0 and result.map_at_r == 0.0
    assert len(result.queries.rows) == 0 and np.isnan(
        result.queries.mean_reciprocal_rank
    )


def test_queries_that_are_in_the_gallery_find_themselves():
    e, y = units(11, 80, 8, 7)
    y[:80] = np.arange(80) % 7
    own = retrieval.evaluate_retrieval(e, y, (1,))
    assert own.num_copies == 0 and own.recall[1] < 1
    gallery = {"gallery_embeddings": e.copy(), "gallery_labels": y}
    all_found = retrieval.evaluate_retrieval(e, y, (1,), **gallery)
    assert all_found.recall[1] == 1.0
    assert all_found.num_copies == all_found.num_queries == 80
    numbers = (
        lambda **to: retrieval.recall_at_k(e, y, (1,), **to),
        lambda **to: retrieval.map_at_r(e, y, **to),
        lambda **to: retrieval.r_precision(e, y, **to),
    )
    for number in numbers:
        with pytest.warns(UserWarning, match="every query has its copy"):
            number(**gallery)
        with warnings.catch_warnings(action="error"):
            number(**gallery, own_rows=np.arange(80))
    # In another order, half of the gallery, decoded a little differently.
    order = np.random.default_rng(0).permutation(80)[:40]
    other = (e[order] * (1 + 1e-7)).astype(np.float32)
    some = retrieval.evaluate_retrieval(
        e, y, (1,), gallery_embeddings=other, gallery_labels=y[order]
    )
    assert some.num_copies == 40
    for leave_out in (
        {"own_rows": np.arange(80)},
        {"groups": np.arange(80), "gallery_groups": np.arange(80)},
    ):
        again = retrieval.evaluate_retrieval(e, y, (1,), **gallery, **leave_out)
        assert again == own


def test_camera_rule_of_re_identification():
    """Of a query's own identity, what the same camera saw is left out: Market-1501."""
    e, y = units(12, 150, 6, 8)
    camera = np.arange(150) % 3
    both = [f"{label} {place}" for label, place in zip(y, camera, strict=True)]
    q, g = slice(0, 60), slice(60, 150)
    result = retrieval.evaluate_retrieval(
        e[q],
        y[q],
        (1, 5),
        gallery_embeddings=e[g],
        gallery_labels=y[g],
        groups=both[q],
        gallery_groups=both[g],
        per_query=True,
    )

    def left_out(i, j):
        return y[i] == y[60 + j] and camera[i] == camera[60 + j]

    check(result, expected(e[q], y[q], (1, 5), e[g], y[g], left_out))
