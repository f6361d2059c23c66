"""Embeddings and labels to the fields of `evaluation.json` that speak of retrieval."""

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from abe_jax import processes, retrieval
from abe_jax.errors import UserError
from abe_jax.evaluate.diversity import diversity

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Metric:
    """A figure of the ensemble and of each learner.

    Named here once, it appears in the JSON, the flat metrics, the table and the report.

    Attributes:
      title: heads its column; "{k}" stands for K where there is one figure for each.
      of: gives the figure, or one for each K that was asked for.
    """

    title: str
    of: Callable[[retrieval.RetrievalResult], float | Mapping[int, float]]


METRICS = {
    "recall": Metric("R@{k}", lambda result: result.recall),
    "map_at_r": Metric("MAP@R", lambda result: result.map_at_r),
}


def measure(
    embeddings: np.ndarray,
    labels: np.ndarray,
    recall_at: Iterable[int],
    gallery: tuple[np.ndarray, np.ndarray] | None = None,
) -> dict:
    """Every metric of the ensemble and of each learner, their mean, and diversity.

    Args:
      embeddings: float32 `[n, M, D/M]`, unit length per learner.
      labels: integer `[n]`.
      recall_at: the values of K.
      gallery: embeddings `[g, M, D/M]` and labels `[g]` that the queries are looked for
        in; None where the queries are each other's gallery.

    Returns:
      the fields of `evaluation.json` that speak of retrieval.

    Raises:
      UserError: no query has another image of its class, or an embedding is not finite.
    """
    ks = tuple(recall_at)
    _warn_of_certainties(labels if gallery is None else gallery[1], gallery is None, ks)
    index, count = processes.place()
    # Every process asks its share of the queries.
    share = (index * len(labels) // count, (index + 1) * len(labels) // count)

    def one(rows: np.ndarray, others: np.ndarray | None) -> retrieval.RetrievalResult:
        try:
            part = retrieval.evaluate_retrieval(
                rows,
                labels,
                sorted({1, *ks}),  # the gain of the ensemble is one of Recall@1
                gallery_embeddings=others,
                gallery_labels=None if gallery is None else gallery[1],
                query_range=share,
            )
        except ValueError as error:
            raise UserError(f"the evaluation failed: {error}") from error
        return _together(part)

    # The squared distance of the concatenation is the sum over the learners.
    everyone = None if gallery is None else gallery[0].reshape(len(gallery[0]), -1)
    ensemble = one(embeddings.reshape(len(embeddings), -1), everyone)
    learners = [ensemble]
    if embeddings.shape[1] > 1:
        learners = [
            one(embeddings[:, m], None if gallery is None else gallery[0][:, m])
            for m in range(embeddings.shape[1])
        ]
    if gallery is not None and ensemble.num_copies == ensemble.num_queries:
        _log.warning(
            "every query has its like (cosine 1) in the gallery: are the queries part "
            "of it? Then they find themselves, and Recall@K says nothing."
        )
    figures = [_figures(learner, ks) for learner in learners]
    mean_recall = float(np.mean([learner.recall[1] for learner in learners]))
    gain = ensemble.recall[1] - mean_recall
    return {
        "num_queries": ensemble.num_queries,
        "num_gallery": ensemble.num_gallery,
        "num_lone_queries": ensemble.num_lone_queries,
        **_figures(ensemble, ks),
        "learners": figures,
        "mean_learner": _mean(figures),
        "diversity": {
            "gain": gain,
            "gain_of_errors": gain / (1.0 - mean_recall) if mean_recall < 1.0 else 0.0,
            **diversity(embeddings, labels, gallery),
        },
    }


def _warn_of_certainties(searched: np.ndarray, queries_too: bool, ks: tuple[int, ...]):
    """Says which figures are 1 whatever the model."""
    if len(np.unique(searched)) == 1:
        _log.warning("one class is evaluated: every figure is 1, whatever the model.")
        return
    others = len(searched) - queries_too
    certain = [k for k in ks if k >= others]
    if certain:
        _log.warning(
            "a query is compared with %d images: Recall@%d is 1, whatever the model.",
            others,
            certain[0],
        )


def _figures(result: retrieval.RetrievalResult, ks: tuple[int, ...]) -> dict:
    figures = {}
    for name, metric in METRICS.items():
        value = metric.of(result)
        if isinstance(value, Mapping):
            figures[name] = {str(k): value[k] for k in ks}
        else:
            figures[name] = value
    return figures


def _mean(figures: list[dict]) -> dict:
    return {
        name: _mean([part[name] for part in figures])
        if isinstance(value, dict)
        else float(np.mean([part[name] for part in figures]))
        for name, value in figures[0].items()
    }


def _together(part: retrieval.RetrievalResult) -> retrieval.RetrievalResult:
    """The result of all queries from those of the processes' shares."""
    if processes.place()[1] == 1:
        return part
    sums = part.num_queries * np.array([part.map_at_r, part.r_precision])
    counts = np.array(
        [
            *(part.num_queries, part.num_lone_queries, part.num_copies),
            *part.hits.values(),
        ]
    )
    sums = processes.gather(sums).sum(axis=0)
    number, lone, copies, *hits = (int(n) for n in processes.gather(counts).sum(axis=0))
    if not number:
        raise UserError(
            "the evaluation failed: no query has another image of its class."
        )
    return retrieval.RetrievalResult(
        recall={k: n / number for k, n in zip(part.hits, hits, strict=True)},
        hits=dict(zip(part.hits, hits, strict=True)),
        map_at_r=float(sums[0] / number),
        r_precision=float(sums[1] / number),
        num_queries=number,
        num_gallery=part.num_gallery,
        num_lone_queries=lone,
        num_copies=copies,
    )
