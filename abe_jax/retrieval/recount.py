"""Counting negatives on the host, where the device's rounding leaves a count open."""

from collections.abc import Callable

import numpy as np

from abe_jax.retrieval.exact import exact_pairs, exact_products, float64_error
from abe_jax.retrieval.rows import READ_ROWS, Side

_SORTED_FROM = 32  # positives; below, comparing with each is faster than sorting
_PAIRS_TO_PRODUCT = 32  # pairs of a matrix product that cost as much as a lone pair


def recount_exactly(
    left: Side,
    right: Side,
    rows: np.ndarray,
    relevant: np.ndarray,
    exact_positives: Callable[[np.ndarray], np.ndarray],
    progress: Callable[[float], None] | None = None,
) -> np.ndarray:
    """Counts the negatives whose similarity is at least that of a positive.

    float64 products, and exact ones only of negatives that float64 cannot tell from a
    positive: at worst each product is computed once in each way, whatever the data.

    Args:
      left, right: queries and gallery.
      rows: [u] int, positions in the order of `left`.
      relevant: [u, R] bool, which positives to count for.
      exact_positives: gives the exact similarities [n, R] float64 of n positions in the
        order of `left`, as `positive_similarities` does.
      progress: called with the share of the work done, in (0, 1].

    Returns:
      [u, R] int32, zero where not relevant.
    """
    assert left.positives is not None
    thresholds = np.where(relevant, left.positives[rows], np.inf)
    exact = np.full(relevant.shape, np.nan)
    # The errors of a negative and of a positive, and of adding these to a threshold.
    error = float64_error(
        left.rows.norms[left.order[rows]], float(right.rows.norms.max()), left.rows.dim
    )
    margin = 2.1 * error
    counts = np.zeros(relevant.shape, np.int32)
    for start in range(0, len(right.order), READ_ROWS // 2):
        part = slice(start, start + READ_ROWS // 2)
        gallery = right.rows.take(right.order[part])
        gallery64 = gallery.astype(np.float64).T
        for at in range(0, len(rows), 512):
            some = slice(at, at + 512)
            here = rows[some]
            queries = left.rows.take(left.order[here])
            sims = queries.astype(np.float64) @ gallery64
            sims[left.labels[here, None] == right.labels[None, part]] = -np.inf
            if left.groups is not None and right.groups is not None:
                sims[left.groups[here, None] == right.groups[None, part]] = -np.inf
            surely, perhaps = _count(sims, thresholds[some], margin[some])
            open_ = np.flatnonzero((surely != perhaps).any(axis=1))
            if len(open_):
                new = open_[np.isnan(exact[some][open_, 0])]
                if len(new):
                    exact[at + new] = exact_positives(here[new])
                surely[open_] += _correction(
                    sims[open_],
                    queries[open_],
                    gallery,
                    thresholds[some][open_],
                    exact[some][open_],
                    margin[some][open_],
                )
            counts[some] += surely
        if progress is not None:
            progress(min(1.0, part.stop / len(right.order)))
    return np.where(relevant, counts, 0)


def _count(
    sims: np.ndarray, thresholds: np.ndarray, margin: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Similarities [b, m] surely and perhaps at or above thresholds: two [b, R]."""
    high, low = thresholds + margin[:, None], thresholds - margin[:, None]
    surely, perhaps = (np.zeros(thresholds.shape, np.int32) for _ in range(2))
    columns = np.flatnonzero(np.isfinite(thresholds).any(axis=0))
    if len(columns) <= _SORTED_FROM:
        for r in columns:
            surely[:, r] = np.count_nonzero(sims > high[:, r, None], axis=1)
            perhaps[:, r] = np.count_nonzero(sims >= low[:, r, None], axis=1)
        return surely, perhaps
    ascending = np.sort(sims, axis=1)
    for i, values in enumerate(ascending):
        surely[i] = len(values) - np.searchsorted(values, high[i], "right")
        perhaps[i] = len(values) - np.searchsorted(values, low[i], "left")
    return surely, perhaps


def _correction(
    sims: np.ndarray,
    queries: np.ndarray,
    gallery: np.ndarray,
    thresholds: np.ndarray,
    exact: np.ndarray,
    margin: np.ndarray,
) -> np.ndarray:
    """What the sure counts lack: [b, R] int32.

    Args:
      sims: [b, m] float64 products; -inf where they do not count.
      queries, gallery: [b, D] and [m, D] float32.
      thresholds: [b, R], the float64 products of the positives, +inf if not relevant.
      exact: [b, R], their exact similarities.
      margin: [b], beyond which products tell the order of similarities.
    """
    near = np.zeros(sims.shape, bool)
    for i, values in enumerate(thresholds):
        values = np.sort(values[np.isfinite(values)])
        above = np.searchsorted(values, sims[i])
        near[i] = np.abs(sims[i] - values[np.maximum(above - 1, 0)]) <= margin[i]
        above = np.minimum(above, len(values) - 1)
        near[i] |= np.abs(sims[i] - values[above]) <= margin[i]
    q, g = np.nonzero(near)
    if len(q) * _PAIRS_TO_PRODUCT > near.size:
        values = exact_products(queries, gallery)[q, g]
    else:
        parts = [slice(at, at + READ_ROWS) for at in range(0, len(q), READ_ROWS)]
        values = np.concatenate(
            [exact_pairs(queries[q[p]], gallery[g[p]]) for p in parts]
        )
    result = np.zeros(thresholds.shape, np.int32)
    ends = np.searchsorted(q, np.arange(len(sims) + 1))
    for i, (begin, end) in enumerate(zip(ends, ends[1:], strict=False)):
        above = np.sort(values[begin:end])
        counted = np.sort(sims[i, g[begin:end]])
        result[i] = (end - begin) - np.searchsorted(above, exact[i], "left")
        result[i] -= (end - begin) - np.searchsorted(
            counted, thresholds[i] + margin[i], "right"
        )
    return result
