"""Data on the host: images on disk, or generated, to batches of uint8 pixels."""

from abe_jax.data.pipeline import (
    Batch,
    ImageSource,
    Reading,
    Subset,
    evaluation_batches,
    evenly,
    train_batches,
)
from abe_jax.data.splits import Splits, create, differences

__all__ = [
    "Batch",
    "ImageSource",
    "Reading",
    "Splits",
    "Subset",
    "create",
    "differences",
    "evaluation_batches",
    "evenly",
    "train_batches",
]
