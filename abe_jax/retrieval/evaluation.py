"""An evaluation: portions of the queries are counted, and their ranks summed up."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from abe_jax.retrieval.comparison import Comparison
from abe_jax.retrieval.counting import count_negatives
from abe_jax.retrieval.inputs import ks_of, query_range_of
from abe_jax.retrieval.plan import Plan
from abe_jax.retrieval.positives import positive_similarities
from abe_jax.retrieval.recount import recount_exactly
from abe_jax.retrieval.results import QueryResults, RetrievalResult
from abe_jax.retrieval.rows import Side

_LEAST_QUERIES = 256  # counted at once, however many positives they have
_BYTES_A_POSITIVE = 48  # its bounds and counts, on the host and on the device
_COPY = 1 - 1e-6  # cosine from which a positive is taken for the query's own copy


def evaluate(
    comparison: Comparison,
    ks: Any,
    query_range: Any,
    plan_for: Callable[[int], Plan],
    *,
    all_positives: bool,
    per_query: bool = False,
) -> RetrievalResult:
    """Counts, for each query, the negatives at or above its positives.

    Args:
      comparison: queries and gallery.
      ks, query_range: as `evaluate_retrieval` takes them.
      plan_for: makes the plan, given the number of queries.
      all_positives: whether every positive is ranked, or only the first.
      per_query: whether every rank is wanted exactly, and each query's results.
    """
    ks = ks_of(ks)
    left, right, y = comparison.queries, comparison.gallery, comparison.labels
    begin, end = query_range_of(query_range, left.number)
    plan = plan_for(left.number)
    wanted = comparison.num_positives
    order = np.argsort(y, kind="stable")
    order = order[(order >= begin) & (order < end)]
    number = int((wanted[order] > 0).sum())
    if not number and len(order) == left.number:
        raise ValueError(
            "no query has a positive: at least one query's label must occur in the "
            "gallery, beside the query itself and what it leaves out; check the labels."
        )
    reading = np.arange(right.number) if right.on_disk else comparison.by_label
    groups, gallery_groups = None, None
    if comparison.negatives_left_out:
        groups, gallery_groups = comparison.groups, comparison.gallery_groups
    gallery = Side(
        right,
        reading,
        comparison.gallery_labels[reading],
        None if gallery_groups is None else gallery_groups[reading],
    )
    none = np.empty(0, int)
    found = [_measures(none, np.zeros((0, 1), np.int32), none, none, ks)]
    for start, stop in _portions(wanted[order], all_positives, plan):
        rows = order[start:stop]
        width = max(1, int(wanted[rows].max())) if all_positives else 1
        positives, cosines = positive_similarities(comparison, rows, width)
        if left.on_disk:
            back = np.argsort(rows)
            rows, positives, cosines = rows[back], positives[back], cosines[back]
        side = Side(
            left, rows, y[rows], None if groups is None else groups[rows], positives
        )
        counts = _count(
            comparison,
            side,
            gallery,
            ks,
            per_query,
            plan.part(start / len(order), stop / len(order)),
        )
        asked = wanted[rows] > 0
        found.append(
            _measures(
                rows[asked], counts[asked], wanted[rows][asked], cosines[asked], ks
            )
        )
    each = {name: np.concatenate([part[name] for part in found]) for name in found[0]}
    hits = {k: int((each["first_rank"] <= k).sum()) for k in ks}
    queries = None
    if per_query:
        back = np.argsort(each["rows"])
        each = {name: values[back] for name, values in each.items()}
        queries = QueryResults(
            rows=each["rows"],
            labels=comparison.given_labels[each["rows"]],
            num_positives=each["num_positives"],
            first_rank=each["first_rank"],
            average_precision=each["average_precision"],
            average_precision_at_r=each["average_precision_at_r"],
            r_precision=each["r_precision"],
            precision={k: each[f"among_{k}"] / k for k in ks},
        )
    return RetrievalResult(
        recall={k: n / max(number, 1) for k, n in hits.items()},
        hits=hits,
        # Added up in an order that neither padding nor portions change.
        map_at_r=math.fsum(each["average_precision_at_r"]) / max(number, 1),
        r_precision=math.fsum(each["r_precision"]) / max(number, 1),
        num_queries=number,
        num_gallery=right.number,
        num_lone_queries=len(order) - number,
        num_copies=int(each["copies"].sum()),
        queries=queries,
    )


def _measures(
    rows: np.ndarray,
    counts: np.ndarray,
    wanted: np.ndarray,
    cosines: np.ndarray,
    ks: tuple[int, ...],
) -> dict[str, np.ndarray]:
    """What each query adds, from the negatives at or above its positives [n, R]."""
    r = np.arange(1, counts.shape[1] + 1)
    ranks, positive = r + counts, r <= wanted[:, None]
    good = positive & (ranks <= wanted[:, None])

    def share(mask: np.ndarray, values: Any) -> np.ndarray:
        # `cumsum` adds in order, so that padding changes nothing.
        return np.where(mask, values, 0.0).cumsum(axis=1)[:, -1] / wanted

    among = {f"among_{k}": (positive & (ranks <= k)).sum(axis=1) for k in ks}
    return among | {
        "rows": rows,
        "num_positives": wanted,
        "copies": cosines >= _COPY,
        "first_rank": ranks[:, 0],
        "average_precision": share(positive, r / ranks),
        "average_precision_at_r": share(good, r / ranks),
        "r_precision": share(good, 1.0),
    }


def _count(
    comparison: Comparison,
    side: Side,
    gallery: Side,
    ks: tuple[int, ...],
    every_rank: bool,
    plan: Plan,
) -> np.ndarray:
    """Negatives at or above each positive, [n, R] int32.

    Exact wherever a metric depends on it; elsewhere a count may be too low, which
    changes no metric.
    """
    assert side.positives is not None
    wanted = comparison.num_positives[side.order, None]
    r = np.arange(1, side.positives.shape[1] + 1)

    def exact_positives(positions: np.ndarray) -> np.ndarray:
        together = positions[np.argsort(side.labels[positions], kind="stable")]
        values = np.empty((len(side.order), len(r)))
        values[together], _ = positive_similarities(
            comparison, side.order[together], len(r), exact=True
        )
        return values[positions]

    if len(r) > plan.most_positives:
        relevant = r <= wanted
        rows = np.flatnonzero(wanted > 0)
        counts = np.zeros(relevant.shape, np.int32)
        counts[rows] = recount_exactly(
            side, gallery, rows, relevant[rows], exact_positives, plan.progress
        )
        return counts
    symmetric = comparison.within and len(side.order) == side.rows.number
    surely, perhaps = count_negatives(side, None if symmetric else gallery, plan)
    relevant = r <= wanted
    if not every_rank:
        # A positive surely beyond rank R adds nothing to MAP@R, wherever it stands.
        relevant &= r + surely <= wanted
    relevant &= surely != perhaps
    for k in ks:
        relevant[:, 0] |= (surely[:, 0] < k) & (perhaps[:, 0] >= k)
    relevant[wanted[:, 0] <= 0] = False
    rows = np.flatnonzero(relevant.any(axis=1))
    if len(rows):
        exact = recount_exactly(side, gallery, rows, relevant[rows], exact_positives)
        surely[rows] = np.where(relevant[rows], exact, surely[rows])
    return surely


def _portions(
    wanted: np.ndarray, all_positives: bool, plan: Plan
) -> list[tuple[int, int]]:
    """Cuts the queries so that the bounds of their positives fit in memory."""
    most = plan.memory / 2 / _BYTES_A_POSITIVE
    cuts, start = [], 0
    while start < len(wanted):
        stop = len(wanted)
        if all_positives:
            width = np.maximum(1, np.maximum.accumulate(wanted[start:]))
            fits = width * np.arange(1, len(width) + 1) <= most
            stop = start + max(min(_LEAST_QUERIES, len(fits)), int(fits.sum()))
            # Those with more positives than the device counts well stay by themselves.
            few = int((width <= plan.most_positives).sum())
            stop = min(stop, start + few) if few else stop
        cuts.append((start, stop))
        start = stop
    return cuts
