"""Small data sets, kept in memory once decoded."""

from collections.abc import Sequence

import numpy as np

from abe_jax.data.pipeline import ImageSource


class InMemory:
    """A source whose images are read once and then kept.

    Attributes:
      labels: those of the source.
      class_names: those of the source.
      storage: that of the source.
      source: which is kept.
    """

    def __init__(self, source: ImageSource):
        self.labels = source.labels
        self.class_names = source.class_names
        self.storage = source.storage
        self.source = source
        self._images: dict[int, np.ndarray] = {}

    @property
    def names(self) -> Sequence[str]:
        """Those of the source."""
        return self.source.names

    @property
    def stamp(self) -> str:
        """That of the source."""
        return self.source.stamp

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> np.ndarray:
        image = self._images.get(index)
        if image is None:
            # A copy: what the source gives may be a part of a larger array.
            image = self._images[index] = np.array(self.source[index])
        return image
