"""Embeddings on the host as `abe_jax.retrieval` reads them: rows, block by block."""

from dataclasses import dataclass
from typing import Any

import numpy as np

READ_ROWS = 8192  # rows read at once


class Rows:
    """Rows of a host array as float32, read a block at a time.

    The ensemble's embeddings [number, M, D/M] are read as their concatenation.

    Attributes:
      name: what the array is called in error messages.
      number, dim: how many rows, and of how many values.
      on_disk: whether the array is a memory map, best read in its own order.
      norms: upper bounds of the rows' lengths, [number] float64.
    """

    def __init__(self, values: Any, name: str):
        try:
            array = values if isinstance(values, np.memmap) else np.asarray(values)
        except (TypeError, ValueError):
            raise ValueError(
                f"{name} is no array of numbers: its rows must be equally long."
            ) from None
        if array.ndim not in (2, 3) or 0 in array.shape:
            raise ValueError(
                f"{name} has shape {array.shape}; it must be [number, dimension], or "
                "[number, learners, dimension], all at least 1."
            )
        if not np.can_cast(array.dtype, np.float64, "same_kind"):
            raise ValueError(f"{name} is of type {array.dtype}; it must hold numbers.")
        self.name = name
        self._source = values
        self._array = array.reshape(len(array), -1)
        self.number, self.dim = self._array.shape
        self.on_disk = isinstance(array, np.memmap)
        self.norms = np.empty(self.number)
        for start in range(0, self.number, READ_ROWS):
            block = self.block(start, start + READ_ROWS)
            squares = np.einsum("ij,ij->i", block, block, dtype=np.float64)
            if not np.isfinite(squares).all():
                row = start + int(np.argmin(np.isfinite(squares)))
                raise ValueError(
                    f"{name}[{row}] is not finite in float32; every value must be."
                )
            self.norms[start : start + READ_ROWS] = np.sqrt(squares) * (1 + 1e-9)

    def same_as(self, other: "Rows") -> bool:
        """Whether both are the same array."""
        return self._source is other._source

    def block(self, start: int, stop: int) -> np.ndarray:
        """Rows start to stop, [rows, dim] float32, contiguous."""
        with np.errstate(over="ignore"):
            return np.ascontiguousarray(self._array[start:stop], dtype=np.float32)

    def take(self, index: np.ndarray) -> np.ndarray:
        """The rows of an integer index, [*index.shape, dim] float32, contiguous."""
        if index.ndim == 1 and len(index) and (np.diff(index) == 1).all():
            return self.block(int(index[0]), int(index[-1]) + 1)
        with np.errstate(over="ignore"):
            return np.ascontiguousarray(self._array[index], dtype=np.float32)


@dataclass(frozen=True)
class Side:
    """The rows of one side of the similarity matrix, in the order they are read.

    Attributes:
      rows: the embeddings.
      order: [n] int, which row stands at each position.
      labels: [n] int32, the labels in that order; from 0.
      groups: [n] int32, their groups where these leave negatives out, else None.
      positives: [n, R] float64, what `positive_similarities` gives; None for a
        gallery that asks nothing.
    """

    rows: Rows
    order: np.ndarray
    labels: np.ndarray
    groups: np.ndarray | None = None
    positives: np.ndarray | None = None
