"""Arguments of every kind: each call succeeds, or names the mistake in one line."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from abe_jax import retrieval

COMMON = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
SIZES = st.sampled_from([1, 4, 12])  # few, as each shape is compiled
NAMES = ["top_k", "Gallery", "evaluate_retrieval", "recall_at_k", "map_at_r"]
NAMES += ["r_precision"]


def spoilt(value):
    def form(rows):
        rows[-1, 0] = value
        return rows

    return form


SOUND_ROWS = [
    lambda rows: rows,
    lambda rows: rows.astype(np.float16),
    lambda rows: rows.astype(np.longdouble),
    lambda rows: rows.astype(np.int8),
    lambda rows: rows > 0,
    lambda rows: rows.tolist(),
    lambda rows: jnp.asarray(rows, jnp.bfloat16),
    lambda rows: np.asfortranarray(rows)[::-1],
    lambda rows: rows[:, None],
    lambda rows: rows * 1e-30,
    lambda rows: rows * 1e-44,
    lambda rows: rows * 1e18,
]
ODD_ROWS = [
    lambda rows: rows * 1e25,
    lambda rows: rows * 1e300,
    spoilt(np.nan),
    spoilt(-np.inf),
    spoilt(1e39),
    spoilt(3e38),
    lambda rows: rows * 1j,
    lambda rows: rows.astype(str),
    lambda rows: rows.astype(object),
    lambda rows: rows[0],
    lambda rows: rows[:, None, None],
    lambda rows: rows[:0],
    lambda rows: rows[:, :0],
    lambda rows: np.hstack([rows, rows]),
    lambda rows: np.vstack([rows, rows]),
    lambda rows: [row[: i + 1] for i, row in enumerate(rows.tolist() + [[0] * 3])],
    lambda rows: (row for row in rows),
    lambda rows: np.zeros(len(rows), "datetime64[s]"),
    lambda rows: np.zeros(len(rows), [("x", float), ("y", float)]),
]
SOUND_LABELS = [
    np.array,
    list,
    lambda x: np.array(x, np.uint8),
    lambda x: np.array(x) - 2**40,
    lambda x: [i * 10**40 for i in x],
    lambda x: np.array(x) > 0,
    lambda x: jnp.array(x, jnp.int32),
    lambda x: np.array(x, np.uint64) + np.uint64(2**63),
]
ODD_LABELS = [
    lambda x: np.array(x).astype(str),
    lambda x: [f"ä\n{i}" for i in x],
    lambda x: np.array([str(i) for i in x], object),
    lambda x: np.array(x, "S"),
    lambda x: np.array(x, float),
    lambda x: [*x[:-1], None],
    lambda x: [*x[:-1], "1"],
    lambda x: [*x[:-1], float("nan")],
    lambda x: np.array(x)[:, None],
    lambda x: x[:-1],
    lambda x: [[i] * (1 + i) for i in x],
    lambda x: np.array(x, "datetime64[s]"),
]
# What nobody should give, of every type.
ODD_VALUES = st.sampled_from(
    [
        *(None, True, 0, -1, 1, 3, 2**70, 0.5, float("nan"), float("inf"), 1j, ""),
        *("12", b"1", (), [], (0, 1), [2, 1], (0, 2.5), (1, 2, 3), {}, {1}, {"a": 1}),
        *(object(), len, np.float32(2), np.int8(1), np.array(3), np.zeros(2)),
        *(np.zeros((40, 3)), "a\nb" * 100, np.arange(999).tolist()),
        *(np.array([0, 1]), jax.devices()[0], jax.devices()[:1], "highest", [None]),
    ]
)


@st.composite
def calls(draw):
    """A public function with arguments of which none, one or two may be wrong."""
    number, gallery = draw(SIZES), draw(SIZES)
    dim = draw(st.sampled_from([1, 3]))
    name = draw(st.sampled_from(NAMES))
    odd = draw(st.sets(st.integers(0, 9), max_size=2))
    options, count = {}, 0

    def pick(sound, odd_ones=None):
        nonlocal count
        count += 1
        if count - 1 not in odd:
            return draw(sound)
        return draw(ODD_VALUES if odd_ones is None else st.one_of(odd_ones, ODD_VALUES))

    def maybe(key, *strategies, odds=3):
        if not draw(st.integers(0, odds)):
            options[key] = pick(*strategies)

    def rows(number):
        def build(seed, form):
            rng = np.random.default_rng(seed)
            return form(rng.integers(-2, 3, (number, dim)) + 0.5 * rng.integers(0, 2))

        return (
            st.builds(build, st.integers(0, 999), st.sampled_from(forms))
            for forms in (SOUND_ROWS, ODD_ROWS)
        )

    def labels(number):
        small = st.lists(st.integers(0, 2), min_size=number, max_size=number)
        return (
            st.builds(lambda form, x: form(x), st.sampled_from(forms), small)
            for forms in (SOUND_LABELS, ODD_LABELS)
        )

    def own_rows(least, most):
        numbers = st.lists(st.integers(least, most), min_size=number, max_size=number)
        return st.builds(np.array, numbers)

    own = own_rows(-1, gallery - 1), own_rows(-3, gallery + 1)
    first = pick(*rows(number))
    if name in ("top_k", "Gallery"):
        second, k = pick(*rows(gallery)), pick(st.sampled_from([1, gallery]))
        maybe("own_rows", *own)
    else:
        second = pick(*labels(number))
        if name in ("evaluate_retrieval", "recall_at_k"):
            ks = pick(st.lists(st.integers(1, 20), min_size=1, max_size=4))
        maybe("groups", *labels(number))
        maybe("query_range", st.tuples(st.just(0), st.integers(0, number)))
        if draw(st.booleans()):
            options["gallery_embeddings"] = pick(*rows(gallery))
            options["gallery_labels"] = pick(*labels(gallery))
            if "groups" in options:
                options["gallery_groups"] = pick(*labels(gallery))
            else:
                maybe("own_rows", *own)
    maybe("precision", st.sampled_from(["highest", "default"]), odds=9)
    maybe("devices", st.just(jax.devices()[:1]))
    if name == "Gallery":
        mine = {"own_rows": options.pop("own_rows", None)}
        return lambda: retrieval.Gallery(second, **options).top_k(first, k, **mine)
    maybe("block_memory_mb", st.sampled_from([1, 0.01, np.float32(64)]))
    maybe("progress", st.just(lambda done, total: None))
    if name == "top_k":
        maybe("exclude_self", st.booleans())
        return functools.partial(retrieval.top_k, first, second, k, **options)
    if name == "evaluate_retrieval":
        maybe("per_query", st.booleans(), odds=1)
    if name in ("evaluate_retrieval", "recall_at_k"):
        options["ks"] = ks
    return functools.partial(getattr(retrieval, name), first, second, **options)


def check(call):
    try:
        result = call()
    except ValueError as error:
        text = str(error)
        assert text and "\n" not in text and len(text) < 400, text
        assert type(error) is ValueError, error
        return
    if isinstance(result, tuple):
        sims, index = result
        assert np.isfinite(sims).all() and (np.diff(sims, axis=1) <= 0).all()
        assert (index >= 0).all() and all(len(set(row)) == len(row) for row in index)
        return
    if isinstance(result, retrieval.RetrievalResult):
        assert 0 <= result.num_copies <= result.num_queries
        assert result.recall == {
            k: n / max(1, result.num_queries) for k, n in result.hits.items()
        }
        if result.queries is not None:
            assert len(result.queries.rows) == result.num_queries
            assert (result.queries.first_rank >= 1).all()
            assert (result.queries.average_precision <= 1 + 1e-12).all()
        result = result.recall
    if isinstance(result, dict):
        shares = [result[k] for k in sorted(result)]
        assert shares == sorted(shares)
    else:
        shares = [result]
    assert all(0 <= share <= 1 for share in shares)


@given(calls())
@settings(COMMON, max_examples=120)
def test_succeeds_or_names_the_mistake(call):
    check(call)


@pytest.mark.slow
@given(calls())
@settings(COMMON, max_examples=800)
def test_succeeds_or_names_the_mistake_often(call):
    check(call)
