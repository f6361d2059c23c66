"""What `abe_jax.retrieval` takes, checked: embeddings, labels and numbers."""

import operator
from typing import Any

import numpy as np

from abe_jax.retrieval.exact import Rows


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


def pair_of(left: Rows, values: Any, name: str) -> tuple[Rows, Rows]:
    """Two sides of the similarity matrix; a ValueError where their widths differ."""
    right = Rows(values, name)
    if left.dim != right.dim:
        raise ValueError(
            f"{left.name} has {left.dim} columns but {name} has {right.dim}; both "
            "must come from the same model."
        )
    return left, right


def check_range(left: Rows, right: Rows) -> None:
    """Raises a ValueError where inner products could overflow float32."""
    if float(left.norms.max()) * float(right.norms.max()) > 1e38:
        raise ValueError(
            "inner products overflow float32: the longest rows have length "
            f"{left.norms.max():.1e} and {right.norms.max():.1e}; scale them down."
        )


def whole(value: Any, name: str) -> int:
    """A whole number from 1 on; else a ValueError that calls it by name."""
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(f"{name} is {value!r}; it must be a whole number from 1 on.")
    return number
