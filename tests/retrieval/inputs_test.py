"""What retrieval takes, and the mistakes that it names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from double_loop import units

from abe_jax import retrieval
from abe_jax.retrieval import counting

KS = (1, 2, 4, 1000)
ROWS = np.ones((4, 3), np.float32)
LABELS = np.array([0, 0, 1, 1])
GALLERY = {"gallery_embeddings": ROWS, "gallery_labels": LABELS}


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
        (lambda: retrieval.recall_at_k(ROWS, LABELS, ()), "ks is empty"),
        (lambda: retrieval.recall_at_k(ROWS, LABELS, "12"), "ks is '12'"),
        (lambda: retrieval.recall_at_k(ROWS, LABELS, ["1"]), "each of ks is '1'"),
        (lambda: retrieval.recall_at_k(ROWS, LABELS, 1), "ks is 1"),
        (lambda: retrieval.recall_at_k(ROWS, LABELS, (0,)), "each of ks is 0"),
        (lambda: retrieval.recall_at_k(ROWS, LABELS[:3], (1,)), r"must be \(4,\)"),
        (
            lambda: retrieval.recall_at_k(ROWS, LABELS * 1.0, (1,)),
            "all must be integers",
        ),
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
        (lambda: retrieval.map_at_r(ROWS, LABELS, devices=()), r"devices is \(\)"),
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


class Dated:
    """No label."""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"devices": "cpu"}, "devices is 'cpu'; it must hold devices"),
        ({"devices": [0]}, r"devices is \[0\]; it must hold devices"),
        ({"devices": jax.devices()[0]}, "it must hold devices"),
        ({"block_memory_mb": "64"}, "block_memory_mb is '64'"),
        ({"block_memory_mb": [64]}, r"block_memory_mb is \[64\]"),
        ({"block_memory_mb": np.nan}, "block_memory_mb is nan"),
        ({"block_memory_mb": True}, "block_memory_mb is True"),
        ({"progress": 3}, "progress is 3; it must be a function"),
        ({"precision": 7}, "precision is 7"),
        ({"query_range": (0, 2.5)}, r"query_range is \(0, 2.5\); it must be two whole"),
        ({"query_range": 3}, "query_range is 3"),
        ({"query_range": (3,)}, "query_range is"),
        ({"query_range": "01"}, "query_range is '01'"),
        ({"query_range": (2, 1)}, "query_range is"),
        ({"own_rows": [0, 1, 2, 3]}, "own_rows needs gallery_embeddings"),
        ({"gallery_groups": LABELS}, "gallery_groups needs gallery_embeddings"),
        ({"groups": LABELS * 0.5}, "groups is of type float64"),
        ({"groups": LABELS, "own_rows": LABELS}, "give one"),
        (GALLERY | {"groups": LABELS}, "belong together"),
        (GALLERY | {"own_rows": [0, 1, 2, 4]}, r"own_rows\[3\] is 4"),
        (
            GALLERY | {"groups": LABELS, "gallery_groups": list("abcd")},
            "groups are integers and gallery_groups are strings",
        ),
        (GALLERY | {"gallery_labels": [b"a"] * 4}, "are byte strings"),
        # All of its rows are left out.
        ({"groups": np.zeros(4, int)}, "no query has a positive"),
    ],
)
def test_options_of_the_wrong_kind(options, message):
    with pytest.raises(ValueError, match=message):
        retrieval.evaluate_retrieval(ROWS, LABELS, (1,), **options)
    if "own_rows" not in options or len(options) > 1:
        with pytest.raises(ValueError, match=message):
            retrieval.recall_at_k(ROWS, LABELS, (1,), **options)
    search = {"devices", "block_memory_mb", "progress", "precision"} & set(options)
    if search:
        with pytest.raises(ValueError, match=message):
            retrieval.top_k(ROWS, ROWS, 1, **options)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.array(["a", "b", None, "a"], object), r"labels\[2\] is None"),
        (np.array([1, "1", 1, 2], object), r"labels\[1\] is '1'"),
        ([1, "1", 1, 2], r"labels\[1\] is '1'"),
        (np.array(["a", np.nan, "b", "a"], object), r"labels\[1\] is nan"),
        ([Dated()] * 4, r"labels\[0\] is <"),
        (np.array(["2020-01-01"] * 4, "datetime64[D]"), "datetime64"),
        (LABELS[:, None], r"shape \(4, 1\)"),
        ([[0], [0, 1], [1], [1]], r"labels\[0\] is|equally|shape"),
        (None, r"shape \(\)"),
        (3, r"shape \(\)"),
    ],
)
def test_labels_that_are_none(labels, message):
    with pytest.raises(ValueError, match=message) as caught:
        retrieval.recall_at_k(ROWS, labels, (1,))
    assert "\n" not in str(caught.value)


def test_labels_as_pandas_gives_them():
    e, y = units(4, 60, 8, 9)
    want = retrieval.evaluate_retrieval(e, y, (1, 3))

    class Column:  # a pandas Series: a dtype that is not NumPy's, and __array__
        dtype = "category"

        def __init__(self, values):
            self.values = values

        def __array__(self, dtype=None, copy=None):
            return np.array(self.values, object)

    for values in (
        Column([f"class {i}" for i in y]),
        np.array([f"class {i}" for i in y], object),
        Column([int(i) for i in y]),
        [np.int16(i) for i in y],
        [bytes([65 + i]) for i in y],
        [int(i) * 10**30 for i in y],
    ):
        result = retrieval.evaluate_retrieval(e, values, (1, 3), per_query=True)
        assert result == want
    strings = np.array([f"{i}" for i in y])
    half = retrieval.evaluate_retrieval(
        e[:30], y[:30], (1,), gallery_embeddings=e[30:], gallery_labels=y[30:]
    )
    assert half == retrieval.evaluate_retrieval(
        e[:30],
        strings[:30],
        (1,),
        gallery_embeddings=e[30:],
        gallery_labels=strings[30:].astype(object),
    )


def test_large_integers_never_merge():
    """In NumPy int64 meets uint64 in float64, where 2^53 and 2^53 + 1 are one."""
    e = np.eye(3, dtype=np.float32)
    labels = np.array([2**53, 2**53 + 1, -1], np.int64)
    gallery = np.array([2**53 + 1, 2**53, 2**64 - 1], np.uint64)
    result = retrieval.evaluate_retrieval(
        e, labels, (1,), gallery_embeddings=e, gallery_labels=gallery
    )
    assert result.hits == {1: 0}
    assert (result.num_queries, result.num_lone_queries) == (2, 1)  # -1 is not 2^64 - 1
    same = retrieval.evaluate_retrieval(
        e, labels[:2][[0, 1, 0]], (1,), gallery_embeddings=e, gallery_labels=labels
    )
    assert same.hits == {1: 2}
    mixed = retrieval.recall_at_k(
        e, labels, (1,), gallery_embeddings=e, gallery_labels=labels.astype(np.int8)
    )
    assert mixed == {1: 1.0}  # only -1 is left in eight bits


def test_ks_of_any_iterable():
    e, y = units(4, 60, 8, 9)
    want = retrieval.recall_at_k(e, y, (1, 2, 4))
    assert retrieval.recall_at_k(e, y, (2**i for i in range(3))) == want
    assert retrieval.recall_at_k(e, y, {1: 0, 2: 0, 4: 0}) == want
    assert retrieval.recall_at_k(e, y, np.array([1, 2, 4, 2])) == want
    assert retrieval.recall_at_k(e, y, [2**80])[2**80] == 1.0


def test_under_64_bits_as_an_accelerator_counts(monkeypatch):
    """There the sums over a tile are others than on a CPU."""
    tile = counting._count_tile
    monkeypatch.setattr(
        counting, "_count_tile", lambda *a, on_cpu: tile(*a, on_cpu=False)
    )
    counting._counter.cache_clear()
    e, y = units(13, 500, 16, 60)
    g = {"gallery_embeddings": e[100:], "gallery_labels": y[100:]}
    want = [retrieval.evaluate_retrieval(e, y, KS, **x) for x in ({}, g)]
    with jax.enable_x64(True):
        assert [retrieval.evaluate_retrieval(e, y, KS, **x) for x in ({}, g)] == want
    counting._counter.cache_clear()


@pytest.mark.parametrize("devices", [1, 3])
def test_under_64_bits(devices):
    e, y = units(13, 500, 16, 60)
    e[:40] = e[100:140]
    chosen = {"devices": jax.devices()[:devices]}
    groups = np.arange(500) % 7

    def everything():
        return (
            retrieval.evaluate_retrieval(e, y, KS, **chosen, per_query=True),
            retrieval.evaluate_retrieval(e, y, KS, **chosen, groups=groups),
            retrieval.recall_at_k(e, y, KS, **chosen, block_memory_mb=0.05),
            retrieval.map_at_r(
                e[:50], y[:50], gallery_embeddings=e, gallery_labels=y, **chosen
            ),
            retrieval.r_precision(e, y, **chosen),
            *retrieval.top_k(e, e, 3, exclude_self=True, **chosen),
            *retrieval.top_k(e[140:], e[140:], 1, exclude_self=True, **chosen),
            *retrieval.Gallery(e, **chosen).top_k(e[:7], 5, own_rows=np.arange(7)),
        )

    want = everything()
    with jax.enable_x64(True):
        assert jnp.zeros(1).dtype == jnp.float64
        found = everything()
    assert found[:5] == want[:5]
    for ours, theirs in zip(found[5:], want[5:], strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
