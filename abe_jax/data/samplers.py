"""Which images make up the batch of a step: a pure function of (seed, step).

A resumed run, another number of loader threads or another number of hosts therefore
sees the same batches, and nothing of a sampler needs to be in a checkpoint.
"""

import dataclasses
from typing import Protocol

import numpy as np

from abe_jax.errors import UserError


class Sampler(Protocol):
    """Maps a step to the images of its global batch."""

    def batch(self, step: int) -> np.ndarray:
        """Indices of the images of a step, int64 `[batch_size]`; step counts from 0."""
        ...


@dataclasses.dataclass(frozen=True)
class ClassSampler:
    """P classes x K images: `batch_size / images_per_class` classes a batch.

    An epoch goes once through a fresh permutation of the classes; the classes left
    over by whole batches sit that epoch out. A class with fewer than K images gives
    each of them equally often, up to one.

    Attributes:
      labels: `[N]`, integer class of each image.
      batch_size: images of the global batch.
      images_per_class: K.
      seed: of every choice.

    Raises:
      UserError: the numbers do not fit each other or the labels.
    """

    labels: np.ndarray
    batch_size: int
    images_per_class: int
    seed: int

    def __post_init__(self):
        k = self.images_per_class
        if k < 2 or self.batch_size % k:
            raise UserError(
                f"train.batch_size = {self.batch_size} must be a multiple of "
                f"data.images_per_class = {k}, which must be at least 2."
            )
        members = _members(self.labels)
        largest = max(map(len, members))
        if k > largest:
            raise UserError(
                f"data.images_per_class = {k} is more than any class has; the largest "
                f"has {largest} images."
            )
        if self.classes_per_batch > len(members):
            raise UserError(
                f"a batch of {self.batch_size} images, {k} a class, needs "
                f"{self.classes_per_batch} classes; there are {len(members)} to train "
                "on. Lower train.batch_size or raise data.images_per_class."
            )
        object.__setattr__(self, "_members", members)

    @property
    def classes_per_batch(self) -> int:
        """P."""
        return self.batch_size // self.images_per_class

    def batch(self, step: int) -> np.ndarray:
        """Indices of a step, int64 `[P * K]`, class by class."""
        members: list[np.ndarray] = getattr(self, "_members")  # noqa: B009
        steps_per_epoch = len(members) // self.classes_per_batch
        epoch, position = divmod(step, steps_per_epoch)
        order = np.random.default_rng((self.seed, 0, epoch)).permutation(len(members))
        start = position * self.classes_per_batch
        rng = np.random.default_rng((self.seed, 1, step))
        return np.concatenate(
            [
                np.resize(rng.permutation(members[c]), self.images_per_class)
                for c in order[start : start + self.classes_per_batch]
            ]
        )


@dataclasses.dataclass(frozen=True)
class PairSampler:
    """The paper's batch: random images, half with a positive partner, half a negative.

    Of `batch_size / 2` images drawn without replacement, the first half gets another
    image of its own class as partner, the second half an image of another class
    (ABE, section 5: 32 images, 16 positive and 16 negative pairs). Images that are
    alone in their class are drawn for negative pairs only.

    Attributes:
      labels: `[N]`, integer class of each image.
      batch_size: images of the global batch, a multiple of 4.
      seed: of every choice.

    Raises:
      UserError: the numbers do not fit each other or the labels.
    """

    labels: np.ndarray
    batch_size: int
    seed: int

    def __post_init__(self):
        if self.batch_size < 4 or self.batch_size % 4:
            raise UserError(
                f"train.batch_size = {self.batch_size} must be a multiple of 4 with "
                "data.sampler = 'pairs': a quarter is drawn for positive pairs."
            )
        members = _members(self.labels)
        if len(members) < 2:
            raise UserError("negative pairs need at least 2 classes; there is 1.")
        size_of = np.zeros(int(self.labels.max()) + 1, np.int64)
        for indices in members:
            size_of[self.labels[indices[0]]] = len(indices)
        sociable = np.flatnonzero(size_of[self.labels] > 1)
        if len(sociable) < self.batch_size // 4 or (
            len(self.labels) < self.batch_size // 2
        ):
            raise UserError(
                f"a batch of {self.batch_size} needs {self.batch_size // 4} images "
                f"with another of their class, and {self.batch_size // 2} images in "
                f"all; there are {len(sociable)} and {len(self.labels)}. Lower "
                "train.batch_size."
            )
        object.__setattr__(self, "_sociable", sociable)

    def batch(self, step: int) -> np.ndarray:
        """Indices of a step, int64: `[anchors, partners]`, pair i at i and B/2 + i."""
        sociable: np.ndarray = getattr(self, "_sociable")  # noqa: B009
        rng = np.random.default_rng((self.seed, 2, step))
        quarter = self.batch_size // 4
        positive = rng.choice(sociable, quarter, replace=False)
        others = np.setdiff1d(np.arange(len(self.labels)), positive)
        negative = rng.choice(others, quarter, replace=False)
        partners = [self._partner(i, True, rng) for i in positive]
        partners += [self._partner(i, False, rng) for i in negative]
        return np.concatenate([positive, negative, np.array(partners)])

    def _partner(self, image: int, same_class: bool, rng: np.random.Generator) -> int:
        fits = (self.labels == self.labels[image]) == same_class
        fits[image] = False
        return rng.choice(np.flatnonzero(fits))


def _members(labels: np.ndarray) -> list[np.ndarray]:
    """Indices of each class's images, in the order of the class numbers."""
    order = np.argsort(labels, kind="stable")
    starts = np.flatnonzero(np.diff(labels[order])) + 1
    return np.split(order, starts)
