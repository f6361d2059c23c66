"""Labels and groups of `abe_jax.retrieval`: what is taken, and as which numbers."""

from typing import Any

import numpy as np

from abe_jax.retrieval.inputs import short_repr

_KINDS = {
    "b": "integers",
    "i": "integers",
    "u": "integers",
    "S": "byte strings",
    "U": "strings",
}
_OBJECTS = {
    "integers": (int, np.integer, np.bool_),
    "byte strings": (bytes,),
    "strings": (str,),
}


def labels_of(values: Any, name: str, number: int) -> np.ndarray:
    """Labels as an array `[number]` of integers or strings; else a ValueError.

    Strings come as NumPy's or as objects, as pandas' columns and categories give them.
    """
    try:
        # As objects: NumPy would convert a list of 1 and "1", or of 2^63 and -1, to
        # one type.
        array = np.asarray(values, None if hasattr(values, "dtype") else object)
    except (TypeError, ValueError):
        array = np.empty(())
    if array.shape != (number,):
        raise ValueError(
            f"{name} has shape {array.shape}; it must be ({number},), one for each "
            "embedding."
        )
    if array.dtype.kind in "OT":
        array = array.astype(object)
        if any(all(isinstance(x, kind) for x in array) for kind in _OBJECTS.values()):
            return array
        first = type(array[0])
        wrong = next((i for i, x in enumerate(array) if not isinstance(x, first)), 0)
        what = f"{name}[{wrong}] is {short_repr(array[wrong])}"
    else:
        what = f"{name} is of type {array.dtype}"
    if array.dtype.kind not in _KINDS:
        raise ValueError(f"{what}; all must be integers, or all strings.")
    return array


def number_labels(
    y: np.ndarray, gy: np.ndarray, name: str, gallery_name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Labels as numbers from 0, int32, equal where the labels are.

    Those of small classes come first, and classes alike in size side by side.
    """
    kinds = _kind(y), _kind(gy)
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"{name} are {kinds[0]} and {gallery_name} are {kinds[1]}; both must be "
            "integers, or both strings."
        )
    a, b = number_alike(y, gy)
    number = int(max(a.max(), b.max())) + 1
    order = np.lexsort(
        (np.bincount(a, minlength=number), np.bincount(b, minlength=number))
    )
    rank = np.empty(number, np.int32)
    rank[order] = np.arange(number, dtype=np.int32)
    return rank[a], rank[b]


def number_alike(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers from 0 for the entries of two arrays, equal where these are."""
    if {a.dtype.kind, b.dtype.kind} <= set("bi") or a.dtype == b.dtype != object:
        _, both = np.unique(np.concatenate([a, b]), return_inverse=True)
    else:
        # Signed and unsigned integers would meet in float64, where large ones merge.
        seen: dict[Any, int] = {}
        entries = [*a.tolist(), *b.tolist()]
        both = np.array([seen.setdefault(entry, len(seen)) for entry in entries])
    return both[: len(a)], both[len(a) :]


def _kind(labels: np.ndarray) -> str:
    if labels.dtype == object:
        return next(n for n, kind in _OBJECTS.items() if isinstance(labels[0], kind))
    return _KINDS[labels.dtype.kind]
