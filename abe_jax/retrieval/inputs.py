"""What `abe_jax.retrieval` takes, checked: embeddings, labels and numbers."""

import operator
from typing import Any

import numpy as np

from abe_jax.retrieval.rows import Rows


def number_labels(y: np.ndarray, gy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Labels as numbers from 0: those of small classes first, alike sizes together."""
    _, both = np.unique(np.concatenate([y, gy]), return_inverse=True)
    a, b = both[: len(y)], both[len(y) :]
    number = int(both.max()) + 1
    order = np.lexsort(
        (np.bincount(a, minlength=number), np.bincount(b, minlength=number))
    )
    rank = np.empty(number, np.int32)
    rank[order] = np.arange(number, dtype=np.int32)
    return rank[a], rank[b]


def labels_of(values: Any, name: str, number: int) -> np.ndarray:
    """Labels as an array `[number]` of integers or strings; else a ValueError."""
    array = np.asarray(values)
    if array.shape != (number,):
        raise ValueError(
            f"{name} has shape {array.shape}; it must be ({number},), one label for "
            "each embedding."
        )
    if array.dtype.kind not in "iubUS":
        raise ValueError(
            f"{name} is of type {array.dtype}; labels must be integers or strings."
        )
    return array


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


def whole(value: Any, name: str) -> int:
    """A whole number from 1 on; else a ValueError that calls it by name."""
    try:
        number = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(f"{name} is {value!r}; it must be a whole number from 1 on.")
    return number
