"""What an evaluation gives: means over the queries, and each query on its own."""

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class QueryResults:
    """Each query that was counted; n of them, in the order of their rows.

    Attributes:
      rows: [n] int, which row of the embeddings each is.
      labels: [n], their labels as they were given.
      num_positives: [n] int, R.
      first_rank: [n] int, the rank of the first positive, from 1.
      average_precision: [n] float64, over all positives: the mean of r / rank.
      average_precision_at_r: [n] float64, what MAP@R is the mean of.
      r_precision: [n] float64, the share of positives among the R nearest.
      precision: for each K, [n] float64, the share of positives among the K nearest.
    """

    rows: np.ndarray
    labels: np.ndarray
    num_positives: np.ndarray
    first_rank: np.ndarray
    average_precision: np.ndarray
    average_precision_at_r: np.ndarray
    r_precision: np.ndarray
    precision: dict[int, np.ndarray]

    @property
    def mean_reciprocal_rank(self) -> float:
        """The mean of 1 / `first_rank`; nan without a query."""
        return _mean(1 / self.first_rank)

    @property
    def mean_average_precision(self) -> float:
        """The mean of `average_precision`; nan without a query."""
        return _mean(self.average_precision)

    @property
    def mean_precision(self) -> dict[int, float]:
        """Precision@K: for each K the mean of `precision[K]`; nan without a query."""
        return {k: _mean(values) for k, values in self.precision.items()}

    def class_means(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Means over the queries of each class.

        Args:
          values: [n], one of the arrays above or made from them.

        Returns:
          the classes' labels [c], sorted, and the means [c] float64.
        """
        labels, which, counts = np.unique(
            self.labels, return_inverse=True, return_counts=True
        )
        return labels, np.bincount(which, np.asarray(values, float)) / counts

    def worst(self, number: int) -> np.ndarray:
        """Places in these arrays of the worst queries, the worst first.

        Ordered by average precision, then by the rank of the first positive.
        """
        order = np.lexsort((self.rows, -self.first_rank, self.average_precision))
        return order[:number]


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
      num_copies: queries counted that have a positive of cosine 1, to within 1e-6. If
        all of them have one, the queries are probably part of the gallery and find
        themselves (or the embedding has collapsed).
      queries: each query on its own, if asked for.
    """

    recall: dict[int, float]
    hits: dict[int, int]
    map_at_r: float
    r_precision: float
    num_queries: int
    num_gallery: int
    num_lone_queries: int
    num_copies: int = 0
    queries: QueryResults | None = field(default=None, compare=False)


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else float("nan")
