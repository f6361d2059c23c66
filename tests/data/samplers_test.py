"""What each batch holds, over a grid of sizes."""

import collections
import itertools

import numpy as np
import pytest

from abe_jax.data import samplers
from abe_jax.errors import UserError


def labels_of(sizes, *, shuffle=True):
    labels = np.repeat(np.arange(len(sizes)), sizes).astype(np.int32)
    return np.random.default_rng(0).permutation(labels) if shuffle else labels


SIZES = {
    "even": [8] * 12,
    "uneven": [2, 9, 4, 4, 3, 7, 5, 4, 1, 6, 4, 4],
    "one large": [1] * 11 + [40],
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize(
    ("classes", "per_class"), list(itertools.product([2, 3, 5, 12], [2, 4, 7]))
)
def test_classes_batch_holds_p_classes_of_k_images(sizes, classes, per_class):
    labels = labels_of(sizes)
    sampler = samplers.ClassSampler(labels, classes * per_class, per_class, seed=3)
    for step in range(25):
        batch = sampler.batch(step)
        assert batch.shape == (classes * per_class,)
        counts = collections.Counter(labels[batch].tolist())
        assert len(counts) == classes
        assert set(counts.values()) == {per_class}
        for label in counts:
            chosen = batch[labels[batch] == label]
            times = collections.Counter(chosen.tolist()).values()
            # As many different images as the class has, each equally often up to one.
            assert len(times) == min(per_class, sizes[label])
            assert max(times) - min(times) <= 1


def test_classes_epoch_visits_every_class_once():
    labels = labels_of([5] * 12)
    sampler = samplers.ClassSampler(labels, 3 * 4, 4, seed=0)
    for epoch in range(3):
        batches = [sampler.batch(4 * epoch + i) for i in range(4)]
        visited = labels[np.concatenate(batches)]
        assert collections.Counter(visited.tolist()) == {c: 4 for c in range(12)}


def test_classes_leftover_changes_between_epochs():
    labels = labels_of([5] * 5)
    sampler = samplers.ClassSampler(labels, 2 * 4, 4, seed=0)
    missing = set()
    for epoch in range(30):
        seen = np.concatenate([sampler.batch(2 * epoch), sampler.batch(2 * epoch + 1)])
        missing |= set(range(5)) - set(labels[seen].tolist())
    assert missing == set(range(5))


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("batch_size", [4, 8, 32, 64])
def test_pairs_batch_is_the_papers(sizes, batch_size):
    labels = labels_of([2 * s for s in sizes])
    sampler = samplers.PairSampler(labels, batch_size, seed=1)
    for step in range(25):
        batch = sampler.batch(step)
        anchors, partners = np.split(batch, 2)
        assert len(batch) == batch_size
        assert len(set(anchors.tolist())) == batch_size // 2  # without replacement
        assert not np.any(anchors == partners)
        same = labels[anchors] == labels[partners]
        assert same[: batch_size // 4].all()
        assert not same[batch_size // 4 :].any()


def test_pairs_partners_are_drawn_evenly():
    """Of all images that fit an anchor, whatever the size and place of its class."""
    labels = np.array([2, 0, 1, 0, 2, 2, 0, 2], np.int32)
    sampler = samplers.PairSampler(labels, 4, seed=0)
    drawn = np.zeros((2, 8, 8))
    for step in range(6000):
        (positive, negative), partners = np.split(sampler.batch(step), 2)
        drawn[0, positive, partners[0]] += 1
        drawn[1, negative, partners[1]] += 1
    same = labels[:, None] == labels[None, :]
    for counts, fits in zip(drawn, (same & ~np.eye(8, dtype=bool), ~same), strict=True):
        assert not counts[~fits].any()
        expected = (
            fits
            * counts.sum(axis=1, keepdims=True)
            / np.maximum(1, fits.sum(axis=1, keepdims=True))
        )
        error = np.abs(counts - expected)[fits] / np.sqrt(np.maximum(1, expected[fits]))
        assert error.max() < 4.5  # standard deviations


def test_pairs_lone_images_are_never_positive():
    labels = np.array([0, 1, 2, 3, 4, 4, 5, 5], np.int32)
    sampler = samplers.PairSampler(labels, 8, seed=0)
    drawn = np.concatenate([np.split(sampler.batch(s), 2)[0][:2] for s in range(50)])
    assert set(drawn.tolist()) == {4, 5, 6, 7}


@pytest.mark.parametrize("name", ["classes", "pairs"])
def test_batch_is_a_pure_function_of_seed_and_step(name):
    labels = labels_of([6] * 20)

    def make(seed):
        return samplers.create(
            labels, name=name, batch_size=16, images_per_class=4, seed=seed
        )

    forwards = [make(7).batch(step) for step in range(40)]
    sampler = make(7)
    backwards = [sampler.batch(step) for step in reversed(range(40))][::-1]
    np.testing.assert_array_equal(forwards, backwards)
    assert len({tuple(batch) for batch in forwards}) == 40
    assert not np.array_equal(make(8).batch(0), forwards[0])


@pytest.mark.parametrize("name", ["classes", "pairs"])
def test_every_image_is_drawn(name):
    labels = labels_of([2, 3, 5, 8])
    sampler = samplers.create(
        labels, name=name, batch_size=8, images_per_class=2, seed=0
    )
    drawn = np.concatenate([sampler.batch(step) for step in range(200)])
    assert set(drawn.tolist()) == set(range(18))


@pytest.mark.parametrize(
    ("name", "batch_size", "per_class", "sizes", "message"),
    [
        ("classes", 10, 4, [5, 5, 5], "must be a multiple of data.images_per_class"),
        ("classes", 4, 1, [5, 5, 5], "at least 2"),
        ("classes", 4, 4, [5, 5, 5], "one class, and no negative pair; lower data.im"),
        ("classes", 16, 8, [5, 7, 6], "more than any class has; the largest has 7"),
        ("classes", 16, 4, [5, 5, 5], "needs 4 classes; there are 3"),
        ("pairs", 10, 4, [5, 5, 5], "must be a multiple of 4"),
        ("pairs", 8, 4, [5], "at least 2 classes"),
        ("pairs", 64, 4, [5, 5], "Lower train.batch_size"),
        ("pairs", 8, 4, [1] * 20, "Lower train.batch_size"),
        ("balanced", 8, 4, [5, 5], "known are 'classes', 'pairs'"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(
    name, batch_size, per_class, sizes, message
):
    with pytest.raises(UserError, match=message):
        samplers.create(
            labels_of(sizes),
            name=name,
            batch_size=batch_size,
            images_per_class=per_class,
            seed=0,
        )
