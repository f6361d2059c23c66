"""How far the learners of an ensemble differ.

Kim et al., ECCV 2018, argue with two of these figures: the cosine between two learners'
embeddings of one image (Figure 5), and their masks (Figure 6). A low cosine alone says
little: rotating one learner's embeddings gives others that rank all images alike. So
the similarities, neighbours and errors of two learners are compared as well.
"""

import itertools
from collections.abc import Iterator

import numpy as np

from abe_jax import data

_NEIGHBOURS = 10
# Spread evenly; all others are looked at as gallery only.
_SAMPLED_QUERIES = 2000
_SAMPLED_PAIRS = 20_000_000  # of images, whose similarities are correlated
_BLOCK_BYTES = 2**27


def diversity(
    embeddings: np.ndarray,
    labels: np.ndarray,
    gallery: tuple[np.ndarray, np.ndarray] | None = None,
) -> dict:
    """Compares the learners' embeddings pair by pair of learners, and means over them.

    Args:
      embeddings: float32 `[n, M, d]`, unit length per learner.
      labels: integer `[n]`.
      gallery: embeddings `[g, M, d]` and labels `[g]`; None where the queries are each
        other's gallery, and no query is its own neighbour.

    Returns:
      cosines in [-1, 1], shares in [0, 1]; those of two learners only where M > 1:
        positive_cosine, negative_cosine: means over pairs of images and learners.
        self_cosine, self_cosine_centred: of two learners on the same image, `mean`,
          `p5` and `p95` over all pairs of learners and images; centred: each learner's
          mean embedding taken off.
        similarity_correlation: Pearson's, of two learners' similarities over the same
          pairs of images.
        neighbour_overlap: share of the 10 nearest that two learners have in common.
        shared_errors, shared_errors_if_independent: share of queries whose nearest
          image is wrong for both, and the product of the two learners' shares.
      At most 2,000 queries, spread evenly, are compared with all images; the
      correlation takes as many of them as make up 20 million pairs of images.
    """
    learners = embeddings.shape[1]
    pairs = list(itertools.combinations(range(learners), 2))
    others, other_labels = (embeddings, labels) if gallery is None else gallery
    sampled = data.evenly(len(labels), _SAMPLED_QUERIES)
    most = max(1, _SAMPLED_PAIRS // len(others))
    correlated = sampled[data.evenly(len(sampled), most)]
    # Close to each learner's mean similarity; subtracted so that sums lose no digits.
    shift = np.sum(np.mean(embeddings, axis=0) * np.mean(others, axis=0), axis=1)
    shift = shift[:, None, None]
    sums, products, count = np.zeros(learners), np.zeros((learners, learners)), 0
    cosines, numbers = np.zeros(2), np.zeros(2)
    overlaps, wrong = [], []
    for queries, similarities in _blocks(embeddings, others, sampled):
        same = labels[queries, None] == other_labels[None]
        seen = np.ones_like(same)
        if gallery is None:
            seen[np.arange(len(queries)), queries] = False
        for kind, chosen in enumerate((same & seen, ~same)):
            numbers[kind] += learners * np.count_nonzero(chosen)
            cosines[kind] += np.sum(similarities * chosen[None], dtype=np.float64)
        few = np.isin(queries, correlated)
        centred = (similarities[:, few] - shift) * seen[None, few]
        centred = centred.reshape(learners, -1)
        sums += centred.sum(axis=1, dtype=np.float64)
        products += centred @ centred.T
        count += np.count_nonzero(seen[few])
        similarities[:, ~seen] = -np.inf
        overlaps.append(_overlaps(similarities, pairs, len(others) - (gallery is None)))
        has_positive = (same & seen).any(axis=1)
        wrong.append(_wrong(similarities, same)[:, has_positive])
    result: dict = {
        "positive_cosine": float(cosines[0] / max(numbers[0], 1)),
        "negative_cosine": float(cosines[1] / max(numbers[1], 1)),
    }
    if not pairs:
        return result
    covariances = products / count - np.outer(sums, sums) / count**2
    # Below that there is rounding only: all images have one embedding.
    deviations = np.sqrt(np.maximum(np.diag(covariances), 1e-12))
    correlations = covariances / np.outer(deviations, deviations)
    errors = np.concatenate(wrong, axis=1)
    first, second = np.array(pairs).T
    rates = errors.mean(axis=1) if errors.size else np.zeros(learners)
    both = errors[first] & errors[second]
    return result | {
        "self_cosine": _spread(_self_cosines(embeddings, pairs)),
        "self_cosine_centred": _spread(_self_cosines(_centred(embeddings), pairs)),
        "similarity_correlation": float(correlations[first, second].mean()),
        "neighbour_overlap": float(np.concatenate(overlaps).mean()),
        "shared_errors": float(both.mean()) if both.size else 0.0,
        "shared_errors_if_independent": float((rates[first] * rates[second]).mean()),
    }


def mask_correlation(masks: np.ndarray) -> dict[str, float]:
    """Pearson correlation of two learners' masks, over images and positions.

    The paper's Figure 6: masks differ within single channels, their means over the
    channels hardly do.

    Args:
      masks: float32 `[n, M, ..., C]` with M > 1.

    Returns:
      `per_channel`: mean over channels and pairs of learners; `of_means`: of the means
      over channels. A channel that does not vary counts 0.
    """
    flat = np.moveaxis(masks, 1, 0).reshape(masks.shape[1], -1, masks.shape[-1])
    learners = len(flat)

    def correlation(values: np.ndarray) -> float:  # [M, positions, channels]
        values = values - values.mean(axis=1, keepdims=True)
        lengths = np.sqrt(np.maximum(np.sum(values**2, axis=1, keepdims=True), 1e-12))
        values = values / lengths
        # The square of the learners' sum has each pair twice, beside their own squares.
        squares = np.sum(values.sum(axis=0) ** 2) - np.sum(values**2)
        return float(squares / (learners * (learners - 1) * values.shape[2]))

    return {
        "per_channel": correlation(flat),
        "of_means": correlation(flat.mean(axis=2, keepdims=True)),
    }


def _blocks(
    embeddings: np.ndarray, others: np.ndarray, sampled: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Queries' indices `[b]` and similarities `[M, b, g]`, block by block."""
    learners = embeddings.shape[1]
    right = np.ascontiguousarray(others.transpose(1, 2, 0))
    rows = max(1, _BLOCK_BYTES // (4 * learners * len(others)))
    for start in range(0, len(sampled), rows):
        queries = sampled[start : start + rows]
        yield queries, embeddings[queries].transpose(1, 0, 2) @ right


def _overlaps(
    similarities: np.ndarray, pairs: list[tuple[int, int]], others: int
) -> np.ndarray:
    """For each query and pair, the share of the nearest that is in common.

    `others` is the number of images that a query may find.
    """
    number = min(_NEIGHBOURS, others)
    nearest = np.argpartition(-similarities, number - 1, axis=2)[:, :, :number]
    shares = [
        (nearest[p][:, :, None] == nearest[q][:, None, :]).sum(axis=(1, 2)) / number
        for p, q in pairs
    ]
    return np.array(shares).T


def _wrong(similarities: np.ndarray, same: np.ndarray) -> np.ndarray:
    """Bool `[M, b]`: the nearest image is of another class, or ties with one."""
    best = np.where(same[None], similarities, -np.inf).max(axis=2)
    worst = np.where(same[None], -np.inf, similarities).max(axis=2)
    return ~(best > worst)


def _self_cosines(embeddings: np.ndarray, pairs: list[tuple[int, int]]) -> np.ndarray:
    """Cosine of each pair of learners on each image, `[pairs, n]`."""
    lengths = np.linalg.norm(embeddings, axis=2, keepdims=True)
    units = embeddings / np.maximum(lengths, 1e-12)
    return np.array([np.sum(units[:, p] * units[:, q], axis=1) for p, q in pairs])


def _centred(embeddings: np.ndarray) -> np.ndarray:
    return embeddings - embeddings.mean(axis=0, keepdims=True)


def _spread(values: np.ndarray) -> dict[str, float]:
    p5, p95 = np.percentile(values, (5, 95))
    return {"mean": float(values.mean()), "p5": float(p5), "p95": float(p95)}
