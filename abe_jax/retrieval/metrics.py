"""Recall@K, MAP@R, R-precision and what each query adds to them."""

import warnings
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from jax import lax

from abe_jax.retrieval.comparison import compare
from abe_jax.retrieval.evaluation import evaluate
from abe_jax.retrieval.plan import Device, ProgressCallback, make_plan
from abe_jax.retrieval.results import RetrievalResult


def evaluate_retrieval(
    embeddings: Any,
    labels: Any,
    ks: Iterable[int],
    *,
    gallery_embeddings: Any | None = None,
    gallery_labels: Any | None = None,
    own_rows: Any | None = None,
    groups: Any | None = None,
    gallery_groups: Any | None = None,
    per_query: bool = False,
    query_range: tuple[int, int] | None = None,
    block_memory_mb: float | None = None,
    precision: lax.PrecisionLike = lax.Precision.HIGHEST,
    devices: Sequence[Device] | None = None,
    progress: ProgressCallback | None = None,
) -> RetrievalResult:
    """Measures Recall@K, MAP@R and R-precision in one pass over the similarities.

    The package's docstring has the rules of ties, lone queries and self matches.

    Args:
      embeddings: [Q, D] or [Q, M, D/M] finite numbers; a memory map is read block by
        block.
      labels: [Q] integers or strings.
      ks: the K of Recall@K, each at least 1. A K beyond the gallery gives 1.0.
      gallery_embeddings: [N, D] or [N, M, D/M]; None if the queries are the gallery.
      gallery_labels: [N], of the kind of `labels`.
      own_rows: [Q] integers, the gallery row that is the query itself (its own copy)
        and is left out for it; -1 where there is none.
      groups: [Q] integers or strings: each query leaves out the gallery rows of its
        group, as those of the same camera or sequence, whatever their label.
      gallery_groups: [N], of the kind of `groups`; None if the queries are the gallery.
      per_query: whether to give each query's results as well. Every rank is then
        counted exactly, which can take a float64 product of all rows on the host.
      query_range: (start, stop) of the queries that ask, so that several processes
        can share them; the others are gallery only. All by default. If a range short
        of all holds no query with a positive, `num_queries` is 0.
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
    comparison = compare(
        embeddings,
        labels,
        gallery_embeddings,
        gallery_labels,
        own_rows,
        groups,
        gallery_groups,
    )
    return evaluate(
        comparison,
        ks,
        query_range,
        partial(make_plan, devices, block_memory_mb, precision, progress),
        all_positives=True,
        per_query=per_query,
    )


def recall_at_k(
    embeddings: Any,
    labels: Any,
    ks: Iterable[int],
    *,
    gallery_embeddings: Any | None = None,
    gallery_labels: Any | None = None,
    own_rows: Any | None = None,
    groups: Any | None = None,
    gallery_groups: Any | None = None,
    query_range: tuple[int, int] | None = None,
    block_memory_mb: float | None = None,
    precision: lax.PrecisionLike = lax.Precision.HIGHEST,
    devices: Sequence[Device] | None = None,
    progress: ProgressCallback | None = None,
) -> dict[int, float]:
    """Measures only Recall@K.

    It costs half a matrix product where the queries are the gallery, else nearly a
    whole one, and float64 products of each query with its positives on the host, which
    count where classes are few and large.

    Arguments and errors are those of `evaluate_retrieval`.

    Returns:
      {K: share of the queries, in [0, 1], with a positive among their K nearest}.

    Warns:
      UserWarning: every query finds a copy of itself in the gallery.
    """
    comparison = compare(
        embeddings,
        labels,
        gallery_embeddings,
        gallery_labels,
        own_rows,
        groups,
        gallery_groups,
    )
    result = evaluate(
        comparison,
        ks,
        query_range,
        partial(make_plan, devices, block_memory_mb, precision, progress),
        all_positives=False,
    )
    return _warn_of_copies(result, gallery_embeddings).recall


def map_at_r(embeddings: Any, labels: Any, **options: Any) -> float:
    """Mean average precision at R, R being each query's number of positives.

    Arguments and errors are those of `evaluate_retrieval`, without `ks`.

    Returns:
      The mean over the queries of 1/R times the sum, over the positives of rank at
      most R, of the precision at that rank; in [0, 1].

    Warns:
      UserWarning: every query finds a copy of itself in the gallery.
    """
    result = evaluate_retrieval(embeddings, labels, (1,), **options)
    return _warn_of_copies(result, options.get("gallery_embeddings")).map_at_r


def r_precision(embeddings: Any, labels: Any, **options: Any) -> float:
    """Mean share of the positives that have a rank of at most R, their number.

    Arguments and errors are those of `evaluate_retrieval`, without `ks`.

    Returns:
      The mean over the queries, in [0, 1].

    Warns:
      UserWarning: every query finds a copy of itself in the gallery.
    """
    result = evaluate_retrieval(embeddings, labels, (1,), **options)
    return _warn_of_copies(result, options.get("gallery_embeddings")).r_precision


def _warn_of_copies(result: RetrievalResult, gallery: Any | None) -> RetrievalResult:
    """The result; warns where it is meaningless, for callers that return one figure."""
    if gallery is not None and 0 < result.num_queries == result.num_copies:
        warnings.warn(
            "every query has its copy (cosine 1) in the gallery and finds it: are the "
            "queries a part of the gallery? own_rows= leaves them out.",
            stacklevel=3,
        )
    return result
