"""Nearest neighbours of queries in a gallery: once, or again and again."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax import lax

from abe_jax.retrieval import neighbours
from abe_jax.retrieval.inputs import check_lengths, check_widths, own_rows_of, whole
from abe_jax.retrieval.plan import Device, ProgressCallback, make_plan
from abe_jax.retrieval.rows import Rows
from abe_jax.retrieval.search import ChunkedRows


def top_k(
    queries: Any,
    gallery: Any,
    k: int,
    *,
    exclude_self: bool = False,
    own_rows: Any | None = None,
    block_memory_mb: float | None = None,
    precision: lax.PrecisionLike = lax.Precision.HIGHEST,
    devices: Sequence[Device] | None = None,
    progress: ProgressCallback | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Finds the k most similar gallery rows of each query, exactly.

    Equal gallery rows tie exactly and come in the order of their indices. Different
    rows are ordered by the product as the device computes it, in float32: two whose
    similarities lie within its rounding error of each other (about 1e-7 for unit
    vectors) may change places on another device or with other block sizes. Devices take
    subnormal values, those below 1.2e-38, for zero.

    `Gallery` keeps a gallery on its devices for many calls.

    Args:
      queries: [Q, D] or [Q, M, D/M] finite numbers.
      gallery: [N, D] or [N, M, D/M]; a memory map is read block by block.
      k: from 1 to N, or to N - 1 where a query leaves out a row.
      exclude_self: leave out gallery row i for query i; Q is at most N.
      own_rows: [Q] integers, the gallery row that is the query itself (its own copy)
        and is left out for it; -1 where there is none.
      block_memory_mb: MiB that blocks may take on each device. By default 256 on a
        CPU, half of what is free on an accelerator.
      precision: of the products, `HIGHEST` (float32), `HIGH` or `DEFAULT`. The lower
        two are faster on TPUs and GPUs and give approximate similarities.
      devices: devices that share the gallery; all local ones by default.
      progress: called as progress(done, total), in queries, as the search goes on.

    Returns:
      similarities [Q, k] float32, largest first, and indices [Q, k] int32.

    Raises:
      ValueError: shapes or k do not fit, or a value is not finite.
    """
    left, right = Rows(queries, "queries"), Rows(gallery, "gallery")
    check_widths(left, right.name, right.dim)
    check_lengths(left, float(right.norms.max()))
    if exclude_self:
        if own_rows is not None:
            raise ValueError(
                "exclude_self and own_rows are two ways; give one of them."
            )
        if left.number > right.number:
            raise ValueError(
                f"exclude_self takes query i for gallery row i, but there are "
                f"{left.number} queries and only {right.number} gallery rows."
            )
        own = np.arange(left.number)
    else:
        own = own_rows_of(own_rows, left.number, right.number)
    k = _checked_k(k, right.number, own)
    plan = make_plan(devices, block_memory_mb, precision, progress, left.number)
    rows = ChunkedRows(right, plan)
    if exclude_self and left.same_as(right) and len(rows.chosen) == right.number:
        if neighbours.fits(right, k, plan):
            return neighbours.find_others(right, k, plan)
    return rows.find(left, k, own)


class Gallery:
    """A gallery that stays on its devices between searches.

    `top_k` checks, hashes and uploads its gallery in each call; here this is done once.
    The array is not needed afterwards. The answers are those of `top_k`.
    """

    def __init__(
        self,
        embeddings: Any,
        *,
        precision: lax.PrecisionLike = lax.Precision.HIGHEST,
        devices: Sequence[Device] | None = None,
    ):
        """Puts a gallery on the devices, a shard of the rows on each.

        Args:
          embeddings: [N, D] or [N, M, D/M] finite numbers; held as float32, equal rows
            once. A memory map is read block by block.
          precision: as for `top_k`.
          devices: devices that share the rows; all local ones by default.

        Raises:
          ValueError: no such array, or a value is not finite.
        """
        rows = Rows(embeddings, "embeddings")
        plan = make_plan(devices, None, precision, None, rows.number)
        self._rows = ChunkedRows(rows, plan, hold=True)

    def __len__(self) -> int:
        return self._rows.number

    def top_k(
        self, queries: Any, k: int, *, own_rows: Any | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Finds the k most similar gallery rows of each query, exactly.

        Args:
          queries: [Q, D] or [Q, M, D/M] finite numbers.
          k: from 1 to N, or to N - 1 where a query leaves out a row.
          own_rows: [Q] integers, the gallery row that each query leaves out, as its own
            copy; -1 where there is none.

        Returns:
          similarities [Q, k] float32, largest first, and indices [Q, k] int32.

        Raises:
          ValueError: shapes or k do not fit, or a value is not finite.
        """
        left = Rows(queries, "queries")
        check_widths(left, "the gallery", self._rows.dim)
        check_lengths(left, self._rows.longest)
        own = own_rows_of(own_rows, left.number, len(self))
        return self._rows.find(left, _checked_k(k, len(self), own), own)


def _checked_k(k: Any, number: int, own: np.ndarray | None) -> int:
    limit = number - int(own is not None and bool((own >= 0).any()))
    k = whole(k, "k")
    if k > limit:
        raise ValueError(
            f"k is {k}, but there are queries with only {limit} gallery rows to find; "
            f"k must be from 1 to {limit}."
            if limit
            else "the gallery holds only a row that the query leaves out."
        )
    return k
