"""Diversity of learners against plain loops over images and learners."""

import itertools

import numpy as np
import pytest

from abe_jax.evaluate import diversity as module
from abe_jax.evaluate.diversity import diversity, mask_correlation

M, PAIRS = 3, list(itertools.combinations(range(3), 2))


def _draw(seed=0, n=40, classes=8):
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    rows = rng.normal(size=(classes, M, 5))[labels] + rng.normal(size=(n, M, 5))
    rows /= np.linalg.norm(rows, axis=-1, keepdims=True)
    return rows.astype(np.float32), labels


def _expected(rows, labels, others, other_labels, own):
    """All figures but the self cosines, query by query."""
    similarities = np.einsum("qmd,gmd->mqg", rows, others).astype(np.float64)
    seen = [
        [g for g in range(len(others)) if not (own and g == q)]
        for q in range(len(rows))
    ]
    flat = [
        [similarities[m, q, g] for q, gs in enumerate(seen) for g in gs]
        for m in range(M)
    ]
    same = [labels[q] == other_labels[g] for q, gs in enumerate(seen) for g in gs]
    overlap, wrong = [], []
    for q, gs in enumerate(seen):
        order = [
            sorted(gs, key=lambda g, m=m, q=q: -similarities[m, q, g]) for m in range(M)
        ]
        nearest = min(10, len(gs))
        overlap += [
            len(set(order[p][:10]) & set(order[r][:10])) / nearest for p, r in PAIRS
        ]
        wrong.append([labels[q] != other_labels[order[m][0]] for m in range(M)])
    wrong = np.array(wrong)
    return {
        "positive_cosine": np.mean([np.array(f)[np.array(same)] for f in flat]),
        "negative_cosine": np.mean([np.array(f)[~np.array(same)] for f in flat]),
        "similarity_correlation": np.mean(
            [np.corrcoef(flat[p], flat[r])[0, 1] for p, r in PAIRS]
        ),
        "neighbour_overlap": np.mean(overlap),
        "shared_errors": np.mean(
            [(wrong[:, p] & wrong[:, r]).mean() for p, r in PAIRS]
        ),
        "shared_errors_if_independent": np.mean(
            [wrong[:, p].mean() * wrong[:, r].mean() for p, r in PAIRS]
        ),
    }


@pytest.mark.parametrize("block", [2**27, 4 * M * 40 * 7])
def test_queries_among_themselves(monkeypatch, block):
    monkeypatch.setattr(module, "_BLOCK_BYTES", block)
    rows, labels = _draw()
    found = diversity(rows, labels)
    for name, value in _expected(rows, labels, rows, labels, own=True).items():
        assert found[name] == pytest.approx(value, abs=1e-5), name


@pytest.mark.parametrize("number", [30, 10, 8])
def test_queries_against_a_gallery(number):
    rows, labels = _draw(1)
    others, other_labels = _draw(2, n=number)
    found = diversity(rows, labels, (others, other_labels))
    for name, value in _expected(rows, labels, others, other_labels, own=False).items():
        assert found[name] == pytest.approx(value, abs=1e-5), name


def test_self_cosines():
    rows, labels = _draw()
    rows = rows + 1.0  # a common offset, which centring takes off
    found = diversity(rows, labels)

    def cosines(x):
        return [
            x[i, p] @ x[i, q] / np.linalg.norm(x[i, p]) / np.linalg.norm(x[i, q])
            for p, q in PAIRS
            for i in range(len(x))
        ]

    for name, x in [
        ("self_cosine", rows),
        ("self_cosine_centred", rows - rows.mean(0)),
    ]:
        expected = cosines(x)
        assert found[name]["mean"] == pytest.approx(np.mean(expected), abs=1e-5)
        assert found[name]["p5"] == pytest.approx(np.percentile(expected, 5), abs=1e-5)
        assert found[name]["p95"] == pytest.approx(
            np.percentile(expected, 95), abs=1e-5
        )
    assert found["self_cosine"]["mean"] > found["self_cosine_centred"]["mean"] + 0.3


def test_a_turned_copy_is_no_diversity():
    """What the cosine alone would not tell."""
    rows, labels = _draw()
    turn = np.linalg.qr(np.random.default_rng(3).normal(size=(5, 5)))[0]
    one = rows[:, 0]
    found = diversity(np.stack([one, one @ turn], 1).astype(np.float32), labels)
    assert found["self_cosine"]["mean"] < 0.9
    assert found["similarity_correlation"] == pytest.approx(1, abs=1e-4)
    assert found["neighbour_overlap"] == pytest.approx(1)


def test_one_learner_has_no_pairs():
    rows, labels = _draw()
    assert set(diversity(rows[:, :1], labels)) == {"positive_cosine", "negative_cosine"}


def test_more_queries_than_are_sampled(monkeypatch):
    monkeypatch.setattr(module, "_SAMPLED_QUERIES", 20)
    rows, labels = _draw(n=400, classes=80)
    few = diversity(rows, labels)["similarity_correlation"]
    monkeypatch.setattr(module, "_SAMPLED_QUERIES", 400)
    monkeypatch.setattr(module, "_SAMPLED_PAIRS", 20 * 400)
    assert diversity(rows, labels)["similarity_correlation"] == few
    monkeypatch.setattr(module, "_SAMPLED_PAIRS", 400 * 400)
    every = diversity(rows, labels)
    assert few == pytest.approx(every["similarity_correlation"], abs=0.1)
    # The bound of pairs is that of the correlation alone, whatever a block holds.
    monkeypatch.setattr(module, "_SAMPLED_PAIRS", 20 * 400)
    monkeypatch.setattr(module, "_BLOCK_BYTES", 4 * M * 400 * 7)
    found = diversity(rows, labels)
    assert found.pop("similarity_correlation") == pytest.approx(few, abs=1e-5)
    del every["similarity_correlation"]
    assert found == {name: pytest.approx(value) for name, value in every.items()}


def test_masks_that_differ_in_channels_and_not_in_their_means():
    rng = np.random.default_rng(0)
    shape, channels = (
        rng.normal(size=(6, 1, 4, 4, 1)),
        rng.normal(size=(6, 2, 4, 4, 50)),
    )
    channels -= channels.mean(axis=-1, keepdims=True)
    masks = (shape + channels).astype(np.float32)
    found = mask_correlation(masks)
    first, second = masks[:, 0].reshape(-1, 50).T, masks[:, 1].reshape(-1, 50).T
    expected = [np.corrcoef(a, b)[0, 1] for a, b in zip(first, second, strict=True)]
    assert found["per_channel"] == pytest.approx(np.mean(expected), abs=1e-5)
    assert found["of_means"] == pytest.approx(1, abs=1e-5)


def test_masks_of_three_learners_are_compared_pair_by_pair():
    masks = np.random.default_rng(1).uniform(size=(6, 3, 4, 4, 7)).astype(np.float32)
    masks[:, 2, ..., 3] = 0.5  # a channel that does not vary
    found = mask_correlation(masks)["per_channel"]
    by_channel = np.moveaxis(masks, (1, -1), (0, 1)).reshape(3, 7, -1)
    expected = [
        0.0 if c == 3 and 2 in pair else np.corrcoef(*by_channel[pair, c])[0, 1]
        for pair in ([0, 1], [0, 2], [1, 2])
        for c in range(7)
    ]
    assert found == pytest.approx(np.mean(expected), abs=1e-6)


def test_a_gallery_of_one_image():
    rows, labels = _draw(1)
    found = diversity(rows, labels, (rows[:1], labels[:1]))
    assert found["neighbour_overlap"] == 1.0


@pytest.mark.parametrize("seed", range(6))
def test_a_collapsed_learner_correlates_with_none(seed):
    rows, labels = _draw(seed, n=60)
    rows[:, 0] = rows[0, 0]  # the same for all images
    found = diversity(rows[:, :2], labels)
    assert abs(found["similarity_correlation"]) < 1e-5
