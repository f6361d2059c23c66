"""Exact retrieval: nearest neighbours, Recall@K, MAP@R and R-precision.

NumPy in, NumPy out: nothing else of the package is needed. JAX arrays and NumPy
memory maps are taken too; embeddings of another type are rounded to float32. Those of
M learners, [N, M, D/M], are taken as their concatenation.

Similarity is the inner product of the rows as given. Among rows of equal length,
such as unit vectors, its order is that of the Euclidean distance.

The rules of the metrics, which count in exact arithmetic, so that neither block
sizes nor devices nor the precision of the device's products change a result:

- The similarity of two rows is their exact inner product, rounded once to float64. So
  equal rows tie, wherever they stand.
- Without a gallery, the queries are the gallery, and each query leaves itself out by
  its index. From a gallery given explicitly nothing is left out but what `own_rows`
  or `groups` say.
- Positives of a query are the gallery rows of its label, negatives all others. Ties
  count against the model: the r-th best positive has rank r plus the number of
  negatives at or above it, in all metrics alike.
- A query without positives (a lone query) is left out and counted as such.
"""

from abe_jax.retrieval.gallery import Gallery, top_k
from abe_jax.retrieval.metrics import (
    evaluate_retrieval,
    map_at_r,
    r_precision,
    recall_at_k,
)
from abe_jax.retrieval.results import QueryResults, RetrievalResult

__all__ = [
    "Gallery",
    "QueryResults",
    "RetrievalResult",
    "evaluate_retrieval",
    "map_at_r",
    "r_precision",
    "recall_at_k",
    "top_k",
]
