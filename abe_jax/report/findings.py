"""What the report shows of an evaluation: failures, confusions, cosines, a map."""

import collections
import dataclasses
import itertools

import numpy as np

from abe_jax import data, retrieval
from abe_jax.evaluate import Evaluation

_BLOCK = 1024  # queries of a class that are compared at once
_SAMPLED = 1000  # images for histograms and the map, spread evenly


@dataclasses.dataclass(frozen=True)
class Nearest:
    """What every query finds.

    Attributes:
      scores: `[n, k]` float32, mean cosine of the learners, largest first.
      rows: `[n, k]`, of what was searched.
      best: `[n]`, the score of the query's best image of its class; -inf where it has
        none.
      wrong: bool `[n]`, whether Recall@1 counts a failure: an image of another class
        is as near as the best of the query's own, or nearer.
    """

    scores: np.ndarray
    rows: np.ndarray
    best: np.ndarray
    wrong: np.ndarray

    def hardest(self) -> np.ndarray:
        """Queries that fail, the worst first: by how far a wrong image is nearer than
        the best of the query's class; those with ties come last.
        """
        lead = np.where(np.isfinite(self.best), self.scores[:, 0] - self.best, -1)
        return np.flatnonzero(self.wrong)[np.argsort(-lead[self.wrong], kind="stable")]


def searched(evaluation: Evaluation) -> tuple[data.Subset, np.ndarray]:
    """The images that were searched, and their embeddings."""
    return evaluation.gallery or (evaluation.queries, evaluation.embeddings)


def nearest(evaluation: Evaluation, count: int) -> Nearest:
    """Looks every query up once more; at most `count` nearest of each."""
    others, gallery = searched(evaluation)
    queries, labels = evaluation.embeddings, evaluation.queries.labels
    learners = queries.shape[1]
    own = evaluation.gallery is None
    count = min(count, len(gallery) - own)
    # The same array twice where each is looked for among the others: half the work.
    scores, found = retrieval.top_k(queries, gallery, count, exclude_self=own)
    flat, rows = (x.reshape(len(x), -1) for x in (queries, gallery))
    best = np.full(len(flat), -np.inf, np.float32)
    for label in np.unique(labels):
        asked = np.flatnonzero(labels == label)
        there = np.flatnonzero(others.labels == label)
        if len(there) <= own:
            continue
        for start in range(0, len(asked), _BLOCK):
            some = asked[start : start + _BLOCK]
            similarities = flat[some] @ rows[there].T
            if own:
                similarities[some[:, None] == there] = -np.inf
            best[some] = similarities.max(axis=1)
    other = others.labels[found] != labels[:, None]
    # Where all that is found is right, no wrong image is nearer than the last of it.
    rival = np.where(other, scores, scores[:, -1:]).max(axis=1)
    wrong = (rival > best) & np.isfinite(best)
    # What two float32 products of rows of length sqrt(M) may be off.
    slack = learners * (flat.shape[1] + 16) * 2.0**-23
    close = np.flatnonzero(np.abs(rival - best) <= slack)
    if len(close):
        wrong[close] = _fail(evaluation, close)
    return Nearest(scores / learners, found, best / learners, wrong)


def _fail(evaluation: Evaluation, asked: np.ndarray) -> np.ndarray:
    """Bool, whether these queries fail by the exact rules of Recall@1."""
    others, gallery = searched(evaluation)
    result = retrieval.evaluate_retrieval(
        evaluation.embeddings[asked],
        evaluation.queries.labels[asked],
        [1],
        gallery_embeddings=gallery,
        gallery_labels=others.labels,
        own_rows=asked if evaluation.gallery is None else None,
        per_query=True,
    )
    assert result.queries is not None and len(result.queries.rows) == len(asked)
    return result.queries.first_rank > 1


def confusions(
    evaluation: Evaluation, found: Nearest, count: int
) -> list[tuple[str, str, int, int]]:
    """Pairs of classes that are taken for each other most often.

    A failure counts for the class of the nearest wrong image that was found.

    Returns:
      class of the queries, class that they find, how many do, and of how many.
    """
    labels = evaluation.queries.labels
    matched = searched(evaluation)[0].labels[found.rows]
    names = evaluation.queries.source.class_names
    other = (matched != labels[:, None]) & found.wrong[:, None]
    failed = np.flatnonzero(other.any(axis=1))
    asked, taken = labels[failed], matched[failed, other[failed].argmax(axis=1)]
    pairs = collections.Counter(zip(asked.tolist(), taken.tolist(), strict=True))
    sizes = np.bincount(labels)
    return [
        (names[query], names[other], number, int(sizes[query]))
        for (query, other), number in pairs.most_common(count)
    ]


def cosines(evaluation: Evaluation) -> dict[str, np.ndarray]:
    """Cosines as in the paper's Figure 5.

    Returns:
      by name: of two learners on one image, of one learner on two images of a class,
      and of one learner on two images of two classes; over a part of the images.
    """
    chosen = data.evenly(len(evaluation.embeddings), _SAMPLED)
    embeddings = evaluation.embeddings[chosen]
    labels = evaluation.queries.labels[chosen]
    pairs = itertools.combinations(range(embeddings.shape[1]), 2)
    parts = [np.sum(embeddings[:, p] * embeddings[:, q], axis=1) for p, q in pairs]
    upper = np.triu_indices(len(labels), 1)
    same = (labels[:, None] == labels)[upper]
    similarities = [(e @ e.T)[upper] for e in embeddings.transpose(1, 0, 2)]
    together = np.stack(similarities)
    named = {
        "positive pairs": together[:, same].ravel(),
        "negative pairs": together[:, ~same].ravel(),
    }
    if not parts:
        return named
    return {"self pairs (two learners, one image)": np.concatenate(parts), **named}


@dataclasses.dataclass(frozen=True)
class Plane:
    """Embeddings in two dimensions, by principal components.

    Attributes:
      points: `[n, 2]`.
      labels: `[n]`, index into `names`, or -1.
      names: of the classes that are told apart.
      share: of the variance that the plane has, in [0, 1].
    """

    points: np.ndarray
    labels: np.ndarray
    names: list[str]
    share: float


def plane(evaluation: Evaluation, num_classes: int) -> Plane:
    """A map of a part of the images; classes are spread evenly over all of them."""
    chosen = data.evenly(len(evaluation.embeddings), _SAMPLED)
    flat = evaluation.embeddings[chosen].reshape(len(chosen), -1)
    centred = flat - flat.mean(axis=0)
    _, lengths, axes = np.linalg.svd(centred, full_matrices=False)
    points = centred @ axes[:2].T
    if points.shape[1] < 2:
        points = np.pad(points, ((0, 0), (0, 2 - points.shape[1])))
    labels = evaluation.queries.labels[chosen]
    present = np.unique(labels)
    few = present[data.evenly(len(present), num_classes)]
    number = np.full(labels.max() + 1, -1)
    number[few] = np.arange(len(few))
    names = [evaluation.queries.source.class_names[label] for label in few]
    squares = lengths**2
    share = float(squares[:2].sum() / max(squares.sum(), 1e-12))
    return Plane(points, number[labels], names, share)
