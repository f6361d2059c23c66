"""Exact retrieval: nearest neighbours, Recall@K, MAP@R and R-precision.

Similarity is the inner product of the rows as given. For rows of equal length
its order is that of the Euclidean distance. NumPy in, NumPy out; this module
needs nothing else of the package.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

ProgressCallback = Callable[[int, int], None]


@dataclass(frozen=True)
class RetrievalResult:
    """What `evaluate_retrieval` measures.

    Attributes:
      recall: share of the counted queries with a positive among the K nearest.
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


def _embeddings(values: Any, name: str) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(
            f"{name} has shape {array.shape}; it must be [number, dimension], "
            "both at least 1."
        )
    array = np.ascontiguousarray(array, dtype=np.float32)
    finite = np.isfinite(array).all(axis=1)
    if not finite.all():
        raise ValueError(
            f"{name}[{int(np.argmin(finite))}] is not finite; every value must be "
            "a finite number."
        )
    return array


def _labels(values: Any, name: str, number: int) -> np.ndarray:
    array = np.asarray(values)
    if array.shape != (number,):
        raise ValueError(
            f"{name} has shape {array.shape}; it must be ({number},), one label "
            "for each embedding."
        )
    return array


def top_k(
    queries: ArrayLike,
    gallery: ArrayLike,
    k: int,
    *,
    exclude_self: bool = False,
    block_memory_mb: float | None = None,
    precision: jax.lax.Precision = jax.lax.Precision.HIGHEST,
    progress: ProgressCallback | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest gallery rows of each query by inner product, exactly.

    Returns:
      similarities [Q, k] float32, largest first, and indices [Q, k] int32; ties:
      lower index first.
    """
    q, g = _embeddings(queries, "queries"), _embeddings(gallery, "gallery")
    limit = len(g) - int(exclude_self)
    if not 1 <= k <= limit:
        raise ValueError(f"k is {k}; it must be from 1 to {limit}.")
    rows = np.arange(len(q))
    sims, idxs = [], []
    for start in range(0, len(q), 1024):
        block = np.array(jnp.matmul(q[start : start + 1024], g.T, precision=precision))
        if exclude_self:
            ids = rows[start : start + 1024]
            block[np.arange(len(ids)), ids] = -np.inf
        s, i = jax.lax.top_k(block, k)
        sims.append(np.asarray(s))
        idxs.append(np.asarray(i))
        if progress:
            progress(min(start + 1024, len(q)), len(q))
    return np.concatenate(sims), np.concatenate(idxs)


def evaluate_retrieval(
    embeddings: ArrayLike,
    labels: ArrayLike,
    ks: Sequence[int],
    *,
    gallery_embeddings: ArrayLike | None = None,
    gallery_labels: ArrayLike | None = None,
    block_memory_mb: float | None = None,
    precision: jax.lax.Precision = jax.lax.Precision.HIGHEST,
    progress: ProgressCallback | None = None,
) -> RetrievalResult:
    """Recall@K, MAP@R and R-precision together; see `RetrievalResult`."""
    q = _embeddings(embeddings, "embeddings")
    y = _labels(labels, "labels", len(q))
    self_search = gallery_embeddings is None
    if self_search != (gallery_labels is None):
        raise ValueError(
            "gallery_embeddings and gallery_labels go together; give both or none."
        )
    if self_search:
        g, gy = q, y
    else:
        g = _embeddings(gallery_embeddings, "gallery_embeddings")
        gy = _labels(gallery_labels, "gallery_labels", len(g))
    hits = {int(k): 0 for k in ks}
    counted, maps, rps = 0, 0.0, 0.0
    for start in range(0, len(q), 1024):
        block = np.asarray(
            jnp.matmul(q[start : start + 1024], g.T, precision=precision)
        )
        for row, sims in enumerate(block):
            same = gy == y[start + row]
            other = ~same
            if self_search:
                same[start + row] = False
            positives = np.sort(sims[same])[::-1]
            if not len(positives):
                continue
            counted += 1
            negatives = np.sort(sims[other])
            above = len(negatives) - np.searchsorted(negatives, positives, "left")
            for k in hits:
                hits[k] += int(above[0] < k)
            r = np.arange(1, len(positives) + 1)
            found = r + above <= len(positives)
            rps += found.mean()
            maps += np.where(found, r / (r + above), 0).mean()
        if progress:
            progress(min(start + 1024, len(q)), len(q))
    if not counted:
        raise ValueError(
            "No query has another gallery row of its label; at least one label "
            "must occur twice."
        )
    return RetrievalResult(
        recall={k: n / counted for k, n in hits.items()},
        hits=hits,
        map_at_r=float(maps / counted),
        r_precision=float(rps / counted),
        num_queries=counted,
        num_gallery=len(g),
        num_lone_queries=len(q) - counted,
    )


def recall_at_k(
    embeddings: ArrayLike,
    labels: ArrayLike,
    ks: Sequence[int],
    *,
    gallery_embeddings: ArrayLike | None = None,
    gallery_labels: ArrayLike | None = None,
    **options: Any,
) -> dict[int, float]:
    """The share of queries with a positive among their K nearest, for each K."""
    return evaluate_retrieval(
        embeddings,
        labels,
        ks,
        gallery_embeddings=gallery_embeddings,
        gallery_labels=gallery_labels,
        **options,
    ).recall


def map_at_r(
    embeddings: ArrayLike,
    labels: ArrayLike,
    *,
    gallery_embeddings: ArrayLike | None = None,
    gallery_labels: ArrayLike | None = None,
    **options: Any,
) -> float:
    """Mean average precision at R, R being each query's number of positives."""
    return evaluate_retrieval(
        embeddings,
        labels,
        (1,),
        gallery_embeddings=gallery_embeddings,
        gallery_labels=gallery_labels,
        **options,
    ).map_at_r


def r_precision(
    embeddings: ArrayLike,
    labels: ArrayLike,
    *,
    gallery_embeddings: ArrayLike | None = None,
    gallery_labels: ArrayLike | None = None,
    **options: Any,
) -> float:
    """Mean share of positives among the R nearest of each query."""
    return evaluate_retrieval(
        embeddings,
        labels,
        (1,),
        gallery_embeddings=gallery_embeddings,
        gallery_labels=gallery_labels,
        **options,
    ).r_precision
