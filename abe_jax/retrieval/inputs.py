"""What `abe_jax.retrieval` takes, checked: rows that fit each other, and numbers."""

import operator
from typing import Any

import numpy as np

from abe_jax.retrieval.rows import Rows


def own_rows_of(values: Any | None, queries: int, gallery: int) -> np.ndarray | None:
    """Gallery rows that queries leave out, `[queries]` int64 from -1; or None."""
    if values is None:
        return None
    array = np.asarray(values)
    if array.shape != (queries,) or array.dtype.kind not in "iu":
        raise ValueError(
            f"own_rows is of shape {array.shape} and type {array.dtype}; it must hold "
            f"{queries} integers, the gallery row that each query leaves out or -1."
        )
    wrong = np.flatnonzero((array < -1) | (array >= gallery))
    if len(wrong):
        raise ValueError(
            f"own_rows[{wrong[0]}] is {array[wrong[0]]}; it must be a gallery row, "
            f"from 0 to {gallery - 1}, or -1 where the query has none."
        )
    return array.astype(np.int64)


def check_widths(left: Rows, name: str, dim: int) -> None:
    """Raises a ValueError where queries and gallery are not equally wide."""
    if left.dim != dim:
        raise ValueError(
            f"{left.name} has {left.dim} columns but {name} has {dim}; both must come "
            "from the same model."
        )


def check_lengths(left: Rows, longest: float) -> None:
    """Raises a ValueError where inner products could overflow float32."""
    if float(left.norms.max()) * longest > 1e38:
        raise ValueError(
            "inner products overflow float32: the longest rows have length "
            f"{left.norms.max():.1e} and {longest:.1e}; scale them down."
        )


def short_repr(value: Any) -> str:
    """A value as error messages show it: one line, not a long one."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."


def whole(value: Any, name: str) -> int:
    """A whole number from 1 on; else a ValueError that calls it by name."""
    try:
        number = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(
            f"{name} is {short_repr(value)}; it must be a whole number from 1 on."
        )
    return number


def ks_of(values: Any) -> tuple[int, ...]:
    """The K of Recall@K, each once, from any iterable; else a ValueError."""
    if isinstance(values, str | bytes) or not np.iterable(values):
        raise ValueError(
            f"ks is {short_repr(values)}; it must hold numbers, as (1, 2, 4, 8) does."
        )
    ks = tuple(dict.fromkeys(whole(k, "each of ks") for k in values))
    if not ks:
        raise ValueError("ks is empty; it must hold numbers, as (1, 2, 4, 8) does.")
    return ks


def query_range_of(values: Any | None, number: int) -> tuple[int, int]:
    """The queries that ask, (start, stop) within (0, number); else a ValueError."""
    if values is None:
        return 0, number
    try:
        start, stop = (operator.index(value) for value in values)
    except (TypeError, ValueError):
        start, stop = -1, -1
    if not 0 <= start <= stop <= number:
        raise ValueError(
            f"query_range is {short_repr(values)}; it must be two whole numbers within "
            f"(0, {number}), the first query and the one after the last."
        )
    return start, stop
