"""Exact similarities on the host: what decides in `abe_jax.retrieval`.

A float32 matrix product gives bit-identical rows different last digits in
different places, so it cannot settle a tie. Here the similarity of two rows IS
their exact inner product, rounded to float32. float64 products with an error
bound give it nearly always; where the bound leaves two roundings open, an exact
sum decides.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np

from abe_jax.retrieval.rows import READ_ROWS, Rows, Side


def exact_pairs(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Exact inner products of row pairs, rounded to float32: [n]."""
    # A product of two float32 is exact in float64, so only the sum can err.
    products = a.astype(np.float64) * b
    sums = products.sum(axis=1)
    error = np.abs(products).sum(axis=1) * (a.shape[1] * 2.0**-52)
    result = (sums - error).astype(np.float32)
    for i in np.flatnonzero(result != (sums + error).astype(np.float32)):
        result[i] = np.float32(math.fsum(products[i]))
    return result


def _float64_error(norms: np.ndarray, longest: float, dim: int) -> np.ndarray:
    return norms * (longest * (dim + 2) * 2.0**-52)


def positive_similarities(
    queries: Rows,
    gallery: Rows,
    members: Callable[[int], np.ndarray],
    rows: np.ndarray,
    labels: np.ndarray,
    width: int,
    leave_out_self: bool,
) -> np.ndarray:
    """Similarities of queries to their positives, largest first.

    Args:
      queries, gallery: the embeddings.
      members: gives the gallery rows of a label.
      rows: query rows [n] int, those of one label side by side.
      labels: their labels [n] int.
      width: how many of each query's best positives to keep.
      leave_out_self: whether query i is gallery row i.

    Returns:
      [n, width] float32, filled up with +inf where there are fewer.
    """
    result = np.full((len(rows), width), np.inf, np.float32)
    for begin, count, found in _runs(labels, members):
        part = rows[begin : begin + found.shape[0] * count]
        part = part.reshape(found.shape[0], count)
        size = found.shape[1]
        if size <= int(leave_out_self):
            continue
        b = gallery.take(found)
        b64 = b.astype(np.float64)
        same = leave_out_self and np.array_equal(part, found)
        a, a64 = (b, b64) if same else (queries.take(part), None)
        step = max(1, 2**22 // (size * len(part)))
        for first in range(0, count, step):
            some = part[:, first : first + step]
            left = a[:, first : first + step]
            left64 = (
                left.astype(np.float64) if a64 is None else a64[:, first : first + step]
            )
            sims = np.matmul(left64, b64.transpose(0, 2, 1))
            error = _float64_error(
                queries.norms[some], gallery.norms[found].max(), queries.dim
            )[:, :, None]
            rounded = (sims - error).astype(np.float32)
            open_ = np.nonzero(rounded != (sims + error).astype(np.float32))
            for at in range(0, len(open_[0]), READ_ROWS):
                g, q, p = (index[at : at + READ_ROWS] for index in open_)
                rounded[g, q, p] = exact_pairs(left[g, q], b[g, p])
            if leave_out_self:
                rounded[some[:, :, None] == found[:, None, :]] = -np.inf
            positives = min(size - int(leave_out_self), width)
            if width == 1:
                best = rounded.max(axis=2, keepdims=True)
            else:
                best = -np.sort(-rounded, axis=2)[:, :, :positives]
            where = begin + np.arange(len(part))[:, None] * count
            where = where + np.arange(first, first + some.shape[1])
            result[where, : best.shape[2]] = best
    return result


def _runs(
    labels: np.ndarray, members: Callable[[int], np.ndarray]
) -> Iterator[tuple[int, int, np.ndarray]]:
    """Runs of labels alike in size: (first row, rows a label, [labels, members])."""
    starts = np.flatnonzero(np.r_[True, labels[1:] != labels[:-1]])
    counts = np.diff(np.r_[starts, len(labels)])
    run: list[np.ndarray] = []
    begin = 0
    for i, start in enumerate(starts):
        found = members(int(labels[start]))
        if run and (
            counts[i] != counts[i - 1]
            or len(found) != len(run[0])
            or len(run) * max(counts[i], len(found)) >= READ_ROWS
        ):
            yield begin, int(counts[i - 1]), np.stack(run)
            run, begin = [], int(start)
        run.append(found)
    yield begin, int(counts[-1]), np.stack(run)


def recount_exactly(
    left: Side, right: Side, open_rows: np.ndarray, relevant: np.ndarray
) -> np.ndarray:
    """Counts negatives at or above positives in exact arithmetic, on the host.

    Args:
      left, right: queries and gallery.
      open_rows: [u] int, places in the order of `left`.
      relevant: [u, R] bool, which positives to count for.

    Returns:
      [u, R] int32, zero where not relevant.
    """
    assert left.positives is not None
    positives = left.positives[open_rows]
    # float32 values round to a positive or above from half a step below it on.
    below = np.nextafter(positives, np.float32(-np.inf)).astype(np.float64)
    edges = np.where(relevant, (positives.astype(np.float64) + below) / 2, np.inf)
    error = _float64_error(
        left.rows.norms[left.order[open_rows]],
        float(right.rows.norms.max()),
        left.rows.dim,
    )
    counts = np.zeros(relevant.shape, np.int32)
    lowest = edges.min(axis=1) - error
    for start in range(0, len(right.order), READ_ROWS // 2):
        part = right.order[start : start + READ_ROWS // 2]
        gallery = right.rows.take(part)
        gallery64 = gallery.astype(np.float64).T
        labels = right.labels[start : start + READ_ROWS // 2]
        for at in range(0, len(open_rows), 512):
            some = slice(at, at + 512)
            queries = left.rows.take(left.order[open_rows[some]])
            sims = queries.astype(np.float64) @ gallery64
            own = left.labels[open_rows[some]]
            near = (sims >= lowest[some, None]) & (own[:, None] != labels[None, :])
            q, g = np.nonzero(near)
            values, margin = sims[q, g], error[some][q]
            for r in np.flatnonzero(relevant[some].any(axis=0)):
                distance = values - edges[some][q, r]
                above = distance > margin
                unsure = np.flatnonzero(np.abs(distance) <= margin)
                if len(unsure):
                    exact = exact_pairs(queries[q[unsure]], gallery[g[unsure]])
                    above[unsure] = exact >= positives[some][q[unsure], r]
                counts[some, r] += np.bincount(q[above], minlength=len(queries)).astype(
                    np.int32
                )
    return counts
