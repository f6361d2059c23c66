"""Exact retrieval: nearest neighbours, Recall@K, MAP@R and R-precision.

NumPy in, NumPy out: nothing else of the package is needed. JAX arrays and NumPy
memory maps are taken too; embeddings of another type are rounded to float32.

Similarity is the inner product of the rows as given. Among rows of equal length,
such as unit vectors, its order is that of the Euclidean distance.

The rules of the metrics, which count in exact arithmetic, so that neither block
sizes nor devices nor the precision of the device's products change a result:

- The similarity of two rows is their exact inner product rounded to float32. So
  equal rows tie, wherever they stand.
- Without a gallery, the queries are the gallery, and each query leaves itself out by
  its index. A gallery given explicitly is another set: nothing is left out.
- Positives of a query are the gallery rows of its label. Ties count against the
  model: the r-th best positive has rank r plus the number of negatives at or above
  it, in Recall@K, MAP@R and R-precision alike.
- A query without positives (a lone query) is left out and counted as such.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from jax import lax

from abe_jax.retrieval.counting import count_exactly
from abe_jax.retrieval.exact import positive_similarities
from abe_jax.retrieval.gallery import Gallery as Gallery
from abe_jax.retrieval.gallery import top_k as top_k
from abe_jax.retrieval.inputs import (
    check_lengths,
    check_widths,
    labels_of,
    number_labels,
    whole,
)
from abe_jax.retrieval.plan import Device, Plan, ProgressCallback, make_plan
from abe_jax.retrieval.rows import Rows, Side

_LEAST_QUERIES = 256  # counted at once, however many positives they have
_BYTES_A_POSITIVE = 40  # its bounds and counts, on the host and on the device


@dataclass(frozen=True)
class RetrievalResult:
    """What `evaluate_retrieval` measures.

    Attributes:
      recall: for each K the share of queries, in [0, 1], with at least one positive
        among their K nearest.
      hits: the same as a number of queries.
      map_at_r: mean average precision at R, in [0, 1].
      r_precision: mean share of positives among the R nearest, in [0, 1].
      num_queries: queries counted; lone queries are not among them.
      num_gallery: rows of the gallery.
      num_lone_queries: queries left out for want of a positive.
    """

    recall: dict[int, float]
    hits: dict[int, int]
    map_at_r: float
    r_precision: float
    num_queries: int
    num_gallery: int
    num_lone_queries: int


def evaluate_retrieval(
    embeddings: Any,
    labels: Any,
    ks: Sequence[int],
    *,
    gallery_embeddings: Any | None = None,
    gallery_labels: Any | None = None,
    query_range: tuple[int, int] | None = None,
    block_memory_mb: float | None = None,
    precision: lax.PrecisionLike = lax.Precision.HIGHEST,
    devices: Sequence[Device] | None = None,
    progress: ProgressCallback | None = None,
) -> RetrievalResult:
    """Measures Recall@K, MAP@R and R-precision in one pass over the similarities.

    The module's docstring has the rules of ties, lone queries and self matches.

    Args:
      embeddings: [Q, D] finite numbers; a memory map is read block by block.
      labels: [Q] integers or strings.
      ks: the K of Recall@K, each at least 1. A K beyond the gallery gives 1.0.
      gallery_embeddings: [N, D]; None if the queries are the gallery.
      gallery_labels: [N], of the kind of `labels`.
      query_range: (start, stop) of the queries that ask, so that several processes
        can share them; the others are gallery only. All by default. A true part of
        the queries may hold none with a positive: `num_queries` is 0 then.
      block_memory_mb: MiB that blocks may take on each device. By default 256 on a
        CPU, half of what is free on an accelerator. What does not fit is streamed.
      precision: of the first pass. Results are the same for every choice, as
        whatever that pass cannot decide is counted exactly; `HIGH` and `DEFAULT`
        make it faster on TPUs and GPUs and leave more to count.
      devices: devices that share the work; all local ones by default.
      progress: called as progress(done, total), in queries, as the work goes on.

    Returns:
      A `RetrievalResult`.

    Raises:
      ValueError: shapes, labels or ks do not fit, a value is not finite (the first
        such row is named), or no query has a positive.
    """
    return _evaluate(
        embeddings,
        labels,
        ks,
        gallery_embeddings,
        gallery_labels,
        query_range,
        True,
        partial(make_plan, devices, block_memory_mb, precision, progress),
    )


def recall_at_k(
    embeddings: Any,
    labels: Any,
    ks: Sequence[int],
    *,
    gallery_embeddings: Any | None = None,
    gallery_labels: Any | None = None,
    block_memory_mb: float | None = None,
    precision: lax.PrecisionLike = lax.Precision.HIGHEST,
    devices: Sequence[Device] | None = None,
    progress: ProgressCallback | None = None,
) -> dict[int, float]:
    """Measures only Recall@K, at the cost of half a matrix product.

    Arguments and errors are those of `evaluate_retrieval`.

    Returns:
      {K: share of the queries, in [0, 1], with a positive among their K nearest}.
    """
    return _evaluate(
        embeddings,
        labels,
        ks,
        gallery_embeddings,
        gallery_labels,
        None,
        False,
        partial(make_plan, devices, block_memory_mb, precision, progress),
    ).recall


def map_at_r(
    embeddings: Any,
    labels: Any,
    *,
    gallery_embeddings: Any | None = None,
    gallery_labels: Any | None = None,
    **options: Any,
) -> float:
    """Mean average precision at R, R being each query's number of positives.

    Arguments and errors are those of `evaluate_retrieval`.

    Returns:
      The mean over the queries of 1/R times the sum, over the positives of rank at
      most R, of the precision at that rank; in [0, 1].
    """
    return evaluate_retrieval(
        embeddings,
        labels,
        (1,),
        gallery_embeddings=gallery_embeddings,
        gallery_labels=gallery_labels,
        **options,
    ).map_at_r


def r_precision(
    embeddings: Any,
    labels: Any,
    *,
    gallery_embeddings: Any | None = None,
    gallery_labels: Any | None = None,
    **options: Any,
) -> float:
    """Mean share of the positives that have a rank of at most R, their number.

    Arguments and errors are those of `evaluate_retrieval`.

    Returns:
      The mean over the queries, in [0, 1].
    """
    return evaluate_retrieval(
        embeddings,
        labels,
        (1,),
        gallery_embeddings=gallery_embeddings,
        gallery_labels=gallery_labels,
        **options,
    ).r_precision


def _evaluate(
    embeddings: Any,
    labels: Any,
    ks: Sequence[int],
    gallery_embeddings: Any | None,
    gallery_labels: Any | None,
    query_range: tuple[int, int] | None,
    all_positives: bool,
    plan_for: Callable[[int], Plan],
) -> RetrievalResult:
    if isinstance(ks, str) or not np.iterable(ks) or not len(ks):
        raise ValueError(f"ks is {ks!r}; it must be a sequence such as (1, 2, 4, 8).")
    ks = tuple(dict.fromkeys(whole(k, "each of ks") for k in ks))
    if (gallery_embeddings is None) != (gallery_labels is None):
        raise ValueError(
            "gallery_embeddings and gallery_labels belong together; give both, or "
            "neither to search the embeddings themselves."
        )
    left = right = Rows(embeddings, "embeddings")
    own = gallery_embeddings is None
    y = gy = labels_of(labels, "labels", left.number)
    if not own:
        right = Rows(gallery_embeddings, "gallery_embeddings")
        check_widths(left, right.name, right.dim)
        gy = labels_of(gallery_labels, "gallery_labels", right.number)
        if (y.dtype.kind in "US") != (gy.dtype.kind in "US"):
            raise ValueError(
                f"labels are of type {y.dtype} and gallery_labels of {gy.dtype}; both "
                "must be integers, or both strings."
            )
    check_lengths(left, float(right.norms.max()))
    y, gy = number_labels(y, gy)
    sizes = np.bincount(gy, minlength=int(y.max()) + 1)
    wanted = sizes[y] - int(own)
    order = np.argsort(y, kind="stable")
    by_label = order if own else np.argsort(gy, kind="stable")
    start, stop = query_range or (0, left.number)
    if not 0 <= start <= stop <= left.number:
        raise ValueError(
            f"query_range is {query_range}; it must lie within (0, {left.number})."
        )
    order = order[(order >= start) & (order < stop)]
    number = int((wanted[order] > 0).sum())
    if not number and len(order) == left.number:
        raise ValueError(
            "no query has a positive: at least one query's label must occur in the "
            "gallery, beside the query itself; check the labels."
        )
    starts = np.cumsum(sizes) - sizes

    def members(label: int) -> np.ndarray:
        return by_label[starts[label] : starts[label] + sizes[label]]

    reading = np.arange(right.number) if right.on_disk else by_label
    gallery = Side(right, reading, gy[reading])
    plan = plan_for(left.number)
    hits = np.zeros(len(ks), int)
    precisions, found = [], []
    for start, stop in _portions(wanted[order], all_positives, plan.memory):
        rows = order[start:stop]
        width = max(1, int(wanted[rows].max())) if all_positives else 1
        positives = positive_similarities(
            left, right, members, rows, y[rows], width, own
        )
        if left.on_disk:
            back = np.argsort(rows)
            rows, positives = rows[back], positives[back]
        side = Side(left, rows, y[rows], positives)
        counts = count_exactly(
            side,
            gallery,
            own and len(rows) == left.number,
            wanted[rows],
            ks,
            plan.part(start / len(order), stop / len(order)),
        )
        asked = wanted[rows] > 0
        counts, r_of = counts[asked], wanted[rows][asked, None]
        r = np.arange(1, width + 1)
        hits += [(counts[:, 0] < k).sum() for k in ks]
        good = (r + counts <= r_of) & (r <= r_of)
        # Added up in an order that neither padding nor portions change.
        found += (good.cumsum(axis=1)[:, -1:] / r_of).ravel().tolist()
        at_rank = np.where(good, r / (r + counts), 0.0)
        precisions += (at_rank.cumsum(axis=1)[:, -1:] / r_of).ravel().tolist()
    return RetrievalResult(
        recall={k: int(n) / max(number, 1) for k, n in zip(ks, hits, strict=True)},
        hits={k: int(n) for k, n in zip(ks, hits, strict=True)},
        map_at_r=math.fsum(precisions) / max(number, 1),
        r_precision=math.fsum(found) / max(number, 1),
        num_queries=number,
        num_gallery=right.number,
        num_lone_queries=len(order) - number,
    )


def _portions(
    wanted: np.ndarray, all_positives: bool, memory: float
) -> list[tuple[int, int]]:
    """Cuts the queries so that the bounds of their positives fit in memory."""
    most = memory / 2 / _BYTES_A_POSITIVE
    cuts, start = [], 0
    while start < len(wanted):
        stop = len(wanted)
        if all_positives:
            width = np.maximum(1, np.maximum.accumulate(wanted[start:]))
            fits = width * np.arange(1, len(width) + 1) <= most
            stop = start + max(min(_LEAST_QUERIES, len(fits)), int(fits.sum()))
        cuts.append((start, stop))
        start = stop
    return cuts
