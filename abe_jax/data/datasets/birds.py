"""Birds: a generated, deterministic fine-grained data set that needs no download.

A class is a combination of part attributes, as a bird species is: one of five
heads, beaks, breasts, wings and tails each. An image of a class varies everything
else: pose, scale, position, plumage colour, background, light and occlusion. Two
classes differ in two parts or more.
"""

import operator

import numpy as np

from abe_jax.data.datasets.bird_drawing import NUM_VALUES, PART_NAMES, PARTS, render
from abe_jax.data.datasets.definition import DataSet
from abe_jax.errors import UserError

MAX_CLASSES = NUM_VALUES ** (len(PARTS) - 1)


class Birds:
    """Generated birds: `num_classes` species with `images_per_class` images each.

    Image i belongs to class ``i // images_per_class``. The class list of a smaller
    `num_classes` is the beginning of that of a larger one. The object is a random
    access data source (`len`, indexing), holds no random state, and is picklable.

    Attributes:
      labels: int32 [N], class of each image, ascending.
      class_names: unique slugs such as
        ``"007.capped-head.hook-beak.spotted-breast.plain-wing.forked-tail"``; their
        alphabetical order is the order of the classes.
      roles: [N], "train" for the first four fifths of the classes, then "test".
      attributes: int64 [num_classes, num_parts], values 0..4 that index `PARTS`.
    """

    storage = "drawn"
    stamp = "version 1"  # of the drawing

    def __init__(
        self,
        *,
        num_classes: int = 128,
        images_per_class: int = 24,
        image_size: int = 64,
        seed: int = 0,
    ):
        """Chooses the classes; images are drawn when they are asked for.

        Args:
          num_classes: number of classes, 1 to 625.
          images_per_class: number of images of each class, at least 1.
          image_size: height and width in pixels, at least 16.
          seed: any non-negative integer; chooses the classes and all images.

        Raises:
          ValueError: an argument is out of its range.
        """
        if not 1 <= num_classes <= MAX_CLASSES:
            raise ValueError(
                f"num_classes is {num_classes}, but must be from 1 to {MAX_CLASSES}, "
                "the number of part combinations that differ in two parts or more."
            )
        for name, value, least in [
            ("images_per_class", images_per_class, 1),
            ("image_size", image_size, 16),
            ("seed", seed, 0),
        ]:
            if value < least:
                raise ValueError(f"{name} is {value}, but must be at least {least}.")
        self.image_size = image_size
        self.images_per_class = images_per_class
        self.seed = seed
        self.attributes = _choose_classes(num_classes, seed)
        self.class_names = tuple(
            f"{number:03d}."
            + ".".join(
                f"{PARTS[part][value]}-{part}"
                for part, value in zip(PART_NAMES, row, strict=True)
            )
            for number, row in enumerate(self.attributes.tolist())
        )
        self.labels = np.repeat(
            np.arange(num_classes, dtype=np.int32), images_per_class
        )
        first_test_class = num_classes * 4 // 5
        self.roles = tuple(
            "train" if label < first_test_class else "test" for label in self.labels
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> np.ndarray:
        """Returns image `index`: uint8 [H, W, 3], RGB; IndexError outside 0..N-1."""
        return self._render(index)[0]

    def part_masks(self, index: int) -> np.ndarray:
        """Returns where each part is visible in image `index`.

        Args:
          index: 0..N-1; IndexError outside.

        Returns:
          bool [num_parts, H, W] in the order of `PART_NAMES`: the pixels of each part
          that nothing hides. The masks are disjoint; one may be empty.
        """
        parts = self._render(index)[1]
        return parts == np.arange(len(PART_NAMES), dtype=np.int8)[:, None, None]

    @property
    def names(self) -> tuple[str, ...]:
        """The name of each image."""
        return tuple(map(self.name, range(len(self))))

    def name(self, index: int) -> str:
        """Returns a unique path-like name, e.g. ``birds/<class name>/0007.png``."""
        label, number = divmod(self._checked(index), self.images_per_class)
        return f"birds/{self.class_names[label]}/{number:04d}.png"

    def _checked(self, index: int) -> int:
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"index is {index}, but must be from 0 to {len(self) - 1}")
        return index

    def _render(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        index = self._checked(index)
        attributes = self.attributes[index // self.images_per_class]
        return render(attributes, self.image_size, seed=self.seed, index=index)


def _choose_classes(num_classes: int, seed: int) -> np.ndarray:
    """Returns int64 [num_classes, num_parts]: distinct, balanced part combinations.

    Combinations whose values sum to 0 modulo 5 differ in at least two parts from one
    another. They fall into groups of five (add 1 to every value), in each of which
    every part takes every value once; taking whole groups in a random order therefore
    keeps both halves of the classes balanced.
    """
    rng = np.random.default_rng((seed, 1))
    free = len(PARTS) - 2
    # One member of each group has 0 as its first value.
    digits = np.indices((NUM_VALUES,) * free).reshape(free, -1).T
    first = np.insert(digits, 0, 0, axis=1)
    groups = np.insert(first, first.shape[1], -first.sum(1), axis=1)
    groups = groups[rng.permutation(len(groups)), None, :]
    shifts = np.argsort(rng.random((len(groups), NUM_VALUES)), axis=1)
    words = (groups + shifts[:, :, None]) % NUM_VALUES
    # Relabelling the values of each part makes the sum rule invisible.
    relabel = np.argsort(rng.random((len(PARTS), NUM_VALUES)), axis=1)
    words = relabel[np.arange(len(PARTS)), words.reshape(-1, len(PARTS))]
    return words[:num_classes].astype(np.int64)


def _open(config) -> Birds:
    if config.path:
        raise UserError(
            f"data.path is {config.path!r}, but data.name = 'birds' draws its images; "
            "for those of a folder or zip file give --config.data.name=image_folder."
        )
    try:
        return Birds(
            num_classes=config.birds_classes,
            images_per_class=config.birds_images_per_class,
            image_size=config.load_size,
        )
    except ValueError as error:
        raise UserError(f"data.birds_*, data.load_size: {error}") from error


DATASET = DataSet(
    name="birds", licence="drawn by abe_jax; no rights but its own", open=_open
)
