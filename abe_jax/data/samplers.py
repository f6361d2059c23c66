"""Which images make up the batch of a step: a pure function of (seed, step).

A resumed run, another number of loader threads or another number of hosts therefore
sees the same batches, and nothing of a sampler needs to be in a checkpoint.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np

from abe_jax.errors import UserError, require_known


class Sampler(Protocol):
    """Maps a step to the images of its global batch."""

    def batch(self, step: int) -> np.ndarray:
        """Indices of the images of a step, int64 `[batch_size]`; step counts from 0."""
        ...


class ClassSampler:
    """P classes x K images: `batch_size / images_per_class` classes a batch.

    An epoch goes once through a fresh permutation of the classes; classes that would
    not fill a last batch sit that epoch out. A class with fewer than K images repeats
    them: their counts differ by at most one.
    """

    def __init__(
        self, labels: np.ndarray, batch_size: int, images_per_class: int, seed: int
    ):
        """Makes a sampler.

        Args:
          labels: `[N]`, integer class of each image.
          batch_size: images of the global batch.
          images_per_class: K, at least 2.
          seed: of every choice, 0 or above.

        Raises:
          UserError: the numbers do not fit each other or the labels.
        """
        members = _members(labels)
        if images_per_class < 2 or batch_size % images_per_class:
            raise UserError(
                f"train.batch_size = {batch_size} must be a multiple of "
                f"data.images_per_class = {images_per_class}, which must be at least 2."
            )
        largest = max(map(len, members))
        if images_per_class > largest:
            raise UserError(
                f"data.images_per_class = {images_per_class} is more than any class "
                f"has; the largest has {largest} images."
            )
        classes_per_batch = batch_size // images_per_class
        if classes_per_batch < 2:
            raise UserError(
                f"a batch of {batch_size} images, {images_per_class} a class, has one "
                "class, and no negative pair; lower data.images_per_class."
            )
        if classes_per_batch > len(members):
            raise UserError(
                f"a batch of {batch_size} images, {images_per_class} a class, needs "
                f"{classes_per_batch} classes; there are {len(members)} to train on. "
                "Lower train.batch_size or raise data.images_per_class."
            )
        self._members = members
        self._classes_per_batch = classes_per_batch
        self._images_per_class = images_per_class
        self._seed = seed

    def batch(self, step: int) -> np.ndarray:
        """Indices of a step, int64 `[P * K]`, class by class."""
        num_classes = len(self._members)
        epoch, position = divmod(step, num_classes // self._classes_per_batch)
        order = np.random.default_rng((self._seed, 0, epoch)).permutation(num_classes)
        start = position * self._classes_per_batch
        rng = np.random.default_rng((self._seed, 1, step))
        return np.concatenate(
            [
                np.resize(rng.permutation(self._members[c]), self._images_per_class)
                for c in order[start : start + self._classes_per_batch]
            ]
        )


class PairSampler:
    """The paper's batch: random images, half with a positive partner, half a negative.

    Of `batch_size / 2` images drawn without replacement, half get another image of
    their class as partner, half an image of another class (ABE, section 5: 32 images,
    16 positive and 16 negative pairs). An image alone in its class is drawn for
    negative pairs only.
    """

    def __init__(self, labels: np.ndarray, batch_size: int, seed: int):
        """Makes a sampler.

        Args:
          labels: `[N]`, integer class of each image.
          batch_size: images of the global batch, a multiple of 4.
          seed: of every choice, 0 or above.

        Raises:
          UserError: the numbers do not fit each other or the labels.
        """
        if batch_size < 4 or batch_size % 4:
            raise UserError(
                f"train.batch_size = {batch_size} must be a multiple of 4 with "
                "data.sampler = 'pairs': a quarter is drawn for positive pairs."
            )
        _, classes, sizes = np.unique(labels, return_inverse=True, return_counts=True)
        if len(sizes) < 2:
            raise UserError("negative pairs need at least 2 classes; there is 1.")
        self._size = sizes[classes]  # of each image's class
        self._start = (np.cumsum(sizes) - sizes)[classes]  # its start in `_by_class`
        self._by_class = np.argsort(classes, kind="stable")
        self._position = np.argsort(self._by_class)  # of each image
        self._with_positive = np.flatnonzero(self._size > 1)
        if len(self._with_positive) < batch_size // 4 or len(labels) < batch_size // 2:
            raise UserError(
                f"a batch of {batch_size} needs {batch_size // 4} images with another "
                f"of their class, and {batch_size // 2} images in all; there are "
                f"{len(self._with_positive)} and {len(labels)}. Lower train.batch_size."
            )
        self._pairs = batch_size // 4
        self._seed = seed

    def batch(self, step: int) -> np.ndarray:
        """Indices of a step, int64: `[anchors, partners]`, pair i at i and B/2 + i."""
        rng = np.random.default_rng((self._seed, 2, step))
        positive = rng.choice(self._with_positive, self._pairs, replace=False)
        # Twice as many as needed: enough are left when the positive ones are taken out.
        drawn = rng.choice(len(self._position), 2 * self._pairs, replace=False)
        negative = drawn[~np.isin(drawn, positive)][: self._pairs]
        partners = self._of_its_class(positive, rng), self._of_others(negative, rng)
        return np.concatenate([positive, negative, *partners])

    def _of_its_class(self, images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        positions = self._start[images] + rng.integers(self._size[images] - 1)
        positions += positions >= self._position[images]
        return self._by_class[positions]

    def _of_others(self, images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        positions = rng.integers(len(self._position) - self._size[images])
        positions += np.where(positions >= self._start[images], self._size[images], 0)
        return self._by_class[positions]


# By name: what makes a sampler from labels, batch size, `data.images_per_class`, seed.
SAMPLERS: dict[str, Callable[[np.ndarray, int, int, int], Sampler]] = {
    "classes": ClassSampler,
    "pairs": lambda labels, batch_size, _, seed: PairSampler(labels, batch_size, seed),
}


def create(
    labels: np.ndarray, *, name: str, batch_size: int, images_per_class: int, seed: int
) -> Sampler:
    """Makes the sampler that `config.data.sampler` names, a key of `SAMPLERS`.

    Raises:
      UserError: the name is unknown, or the sampler's numbers do not fit.
    """
    require_known("data.sampler", name, SAMPLERS)
    return SAMPLERS[name](labels, batch_size, images_per_class, seed)


def _members(labels: np.ndarray) -> list[np.ndarray]:
    """Indices of each class's images, in the order of the class numbers."""
    order = np.argsort(labels, kind="stable")
    starts = np.flatnonzero(np.diff(labels[order])) + 1
    return np.split(order, starts)
