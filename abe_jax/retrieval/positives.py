"""Similarities of queries to their positives, on the host."""

from collections.abc import Iterator

import numpy as np

from abe_jax.retrieval.comparison import Comparison
from abe_jax.retrieval.exact import exact_products
from abe_jax.retrieval.rows import READ_ROWS


def positive_similarities(
    comparison: Comparison, rows: np.ndarray, width: int, exact: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Similarities of queries to their positives, largest first.

    Args:
      comparison: queries and gallery.
      rows: query rows [n] int, those of one label side by side.
      width: how many of each query's best positives to keep.
      exact: whether to round the exact products instead of multiplying in float64.

    Returns:
      [n, width] float64, filled up with +inf where there are fewer, and the largest
      cosine to a positive, [n] float64, -inf where there is none.
    """
    queries, gallery = comparison.queries, comparison.gallery
    groups, gallery_groups = comparison.groups, comparison.gallery_groups
    result = np.full((len(rows), width), np.inf)
    cosines = np.full(len(rows), -np.inf)
    for begin, count, found in _runs(comparison, comparison.labels[rows]):
        part = rows[begin : begin + found.shape[0] * count]
        part = part.reshape(found.shape[0], count)
        size = found.shape[1]
        if not size:
            continue
        b = gallery.take(found)
        lengths = np.maximum(gallery.norms[found], np.finfo(np.float64).tiny)
        b64 = None if exact else b.astype(np.float64).transpose(0, 2, 1)
        step = max(1, 2**22 // (size * len(part)))
        for first in range(0, count, step):
            some = part[:, first : first + step]
            a = queries.take(some)
            if b64 is not None:
                sims = np.matmul(a.astype(np.float64), b64)
            elif len(part) == 1:
                sims = exact_products(a[0], b[0])[None]
            else:
                sims = exact_products(a, b)
            if groups is not None and gallery_groups is not None:
                left_out = groups[some][:, :, None] == gallery_groups[found][:, None, :]
                sims[left_out] = -np.inf
            kept = min(size, width)
            if width == 1:
                best = sims.max(axis=2, keepdims=True)
            else:
                best = -np.sort(-sims, axis=2)[:, :, :kept]
            where = begin + np.arange(len(part))[:, None] * count
            where = where + np.arange(first, first + some.shape[1])
            result[where, :kept] = np.where(best == -np.inf, np.inf, best)
            own = np.maximum(queries.norms[some], np.finfo(np.float64).tiny)
            cosines[where] = (sims / lengths[:, None, :]).max(axis=2) / own
    return result, cosines


def _runs(
    comparison: Comparison, labels: np.ndarray
) -> Iterator[tuple[int, int, np.ndarray]]:
    """Runs of labels alike in size: (first row, rows a label, [labels, members])."""
    starts = np.flatnonzero(np.r_[True, labels[1:] != labels[:-1]])
    counts = np.diff(np.r_[starts, len(labels)])
    run: list[np.ndarray] = []
    begin = 0
    for i, start in enumerate(starts):
        found = comparison.members(int(labels[start]))
        if run and (
            counts[i] != counts[i - 1]
            or len(found) != len(run[0])
            or len(run) * max(counts[i], len(found)) >= READ_ROWS
        ):
            yield begin, int(counts[i - 1]), np.stack(run)
            run, begin = [], int(start)
        run.append(found)
    yield begin, int(counts[-1]), np.stack(run)
