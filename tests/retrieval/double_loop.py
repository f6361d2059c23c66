"""The rules of retrieval written down pair by pair, and data to try them on."""

import math
from dataclasses import dataclass, field

import numpy as np
import pytest


def similarities(queries, gallery):
    """Exact inner products rounded to float64, one pair at a time."""
    result = np.empty((len(queries), len(gallery)))
    for i, a in enumerate(np.asarray(queries, np.float64)):
        for j, b in enumerate(np.asarray(gallery, np.float64)):
            result[i, j] = math.fsum(a * b)
    return result


@dataclass
class Expected:
    """What `evaluate_retrieval` should give, for each query that has a positive."""

    ks: tuple[int, ...]
    rows: list[int] = field(default_factory=list)
    num_positives: list[int] = field(default_factory=list)
    first_rank: list[int] = field(default_factory=list)
    average_precision: list[float] = field(default_factory=list)
    average_precision_at_r: list[float] = field(default_factory=list)
    r_precision: list[float] = field(default_factory=list)
    precision: dict[int, list[float]] = field(default_factory=dict)

    @property
    def hits(self):
        return {k: sum(rank <= k for rank in self.first_rank) for k in self.ks}


def expected(e, y, ks, gallery=None, gallery_labels=None, left_out=None):
    """The rules, pair by pair; `left_out(i, j)`: query i does not ask gallery row j."""
    own = gallery is None
    g, gy = (e, y) if own else (gallery, gallery_labels)
    sims = similarities(e, g)
    result = Expected(ks, precision={k: [] for k in ks})
    for i in range(len(e)):
        positives, negatives = [], []
        for j in range(len(g)):
            if (own and i == j) or (left_out and left_out(i, j)):
                continue
            (positives if gy[j] == y[i] else negatives).append(sims[i, j])
        if not positives:
            continue
        ranks = [
            r + sum(n >= p for n in negatives)
            for r, p in enumerate(sorted(positives, reverse=True), start=1)
        ]
        number = len(positives)
        terms = [r / rank for r, rank in enumerate(ranks, start=1)]
        result.rows.append(i)
        result.num_positives.append(number)
        result.first_rank.append(ranks[0])
        result.average_precision.append(sum(terms) / number)
        good = [term for term, rank in zip(terms, ranks, strict=True) if rank <= number]
        result.average_precision_at_r.append(sum(good) / number)
        result.r_precision.append(len(good) / number)
        for k in ks:
            result.precision[k].append(sum(rank <= k for rank in ranks) / k)
    return result


def check(result, want):
    """Compares a RetrievalResult with what the double loop expects."""
    counted = len(want.rows)
    assert result.hits == want.hits
    assert result.num_queries == counted
    assert result.recall == {k: n / counted for k, n in want.hits.items()}
    close = {"abs": 1e-12}
    assert result.map_at_r == pytest.approx(
        np.mean(want.average_precision_at_r), **close
    )
    assert result.r_precision == pytest.approx(np.mean(want.r_precision), **close)
    if result.queries is None:
        return
    for name in ("rows", "num_positives", "first_rank"):
        assert getattr(result.queries, name).tolist() == getattr(want, name), name
    for name in ("average_precision", "average_precision_at_r", "r_precision"):
        np.testing.assert_allclose(
            getattr(result.queries, name), getattr(want, name), atol=1e-12
        )
    for k in want.ks:
        np.testing.assert_allclose(
            result.queries.precision[k], want.precision[k], atol=1e-12
        )


def draw_rows(rng, number, dim, kind):
    """Random rows: `integers` are full of ties, `close` ones nearly coincide."""
    if kind == "integers":  # exact in any arithmetic
        return rng.integers(-2, 3, (number, dim)).astype(np.float32)
    rows = rng.normal(size=(number, dim)).astype(np.float32)
    if kind == "close":  # similarities apart by about a rounding error of float32
        rows = 1 + 1e-4 * rows
    if kind == "signs":  # many ties of different rows, inexact in float64
        rows = np.sign(rows)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def units(seed, number, dim, classes):
    """Unit vectors in clusters, and their labels."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, number)
    e = 0.7 * rng.normal(size=(classes, dim))[y] + rng.normal(size=(number, dim))
    return (e / np.linalg.norm(e, axis=1, keepdims=True)).astype(np.float32), y
