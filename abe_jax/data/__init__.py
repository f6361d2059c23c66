"""Data on the host: images on disk, or generated, to batches of uint8 pixels."""

import dataclasses

import numpy as np
from absl import logging

from abe_jax.data.birds import Birds
from abe_jax.data.image_folder import ImageFolder
from abe_jax.data.memory import InMemory
from abe_jax.data.pipeline import (
    Batch,
    ImageSource,
    Reading,
    Subset,
    evaluation_batches,
    train_batches,
)
from abe_jax.errors import UserError

__all__ = [
    "Batch",
    "ImageSource",
    "Reading",
    "Splits",
    "Subset",
    "create",
    "evaluation_batches",
    "train_batches",
]


@dataclasses.dataclass(frozen=True)
class Splits:
    """What a run trains on and what it is evaluated on.

    Attributes:
      train: images of the training classes.
      evaluation: images of the classes held out.
      evaluation_name: "validation" where part of the training classes is held out for
        choosing settings, else "test".
      zero_shot: True where no class is in both parts.
    """

    train: Subset
    evaluation: Subset
    evaluation_name: str
    zero_shot: bool


def create(config) -> Splits:
    """Opens the data that `config.data` describes and splits it by classes.

    The first half of the sorted classes trains and the second half tests, unless the
    folder has `train/` and `test/` parts; of the birds three quarters train. With
    `validation_fraction` above 0 that share of the training classes, the last in
    order, is held out and takes the place of the test classes, which are then not
    looked at.

    Args:
      config: the `data` section of a config (see `configs/default.py`).

    Raises:
      UserError: the data is not there, or the fields do not fit it.
    """
    source = _open(config)
    roles = np.array(getattr(source, "roles", ()))
    classes = np.arange(len(source.class_names))
    if len(roles):
        in_train = roles == "train"
        train_classes = np.unique(source.labels[in_train])
    else:
        train_classes = classes[: len(classes) // 2]
        in_train = np.isin(source.labels, train_classes)
    train, evaluation, name = in_train, ~in_train, "test"
    if config.validation_fraction:
        held_out = _held_out(train_classes, config.validation_fraction)
        evaluation = in_train & np.isin(source.labels, held_out)
        train, name = in_train & ~evaluation, "validation"
    if config.in_memory:
        source = InMemory(source)
    train_part = Subset(source, np.flatnonzero(train))
    evaluation_part = Subset(source, np.flatnonzero(evaluation))
    shared = np.intersect1d(train_part.labels, evaluation_part.labels)
    if len(shared):
        logging.warning(
            "%d classes are in both train/ and test/: Recall@K is not zero-shot.",
            len(shared),
        )
    return Splits(train_part, evaluation_part, name, zero_shot=not len(shared))


def _open(config) -> ImageSource:
    if config.load_size < config.image_size:
        raise UserError(
            f"data.load_size = {config.load_size} is below data.image_size = "
            f"{config.image_size}; images are cropped on the device, never enlarged."
        )
    if config.name == "birds":
        try:
            return Birds(
                num_classes=config.birds_classes,
                images_per_class=config.birds_images_per_class,
                image_size=config.load_size,
            )
        except ValueError as error:
            raise UserError(f"data.birds_*, data.load_size: {error}") from error
    if config.name == "image_folder":
        if not config.path:
            raise UserError(
                "data.path is not set; give a folder or a zip file with one folder a "
                "class: --config.data.path=DIR"
            )
        return ImageFolder(config.path, config.load_size)
    raise UserError(
        f"data.name is {config.name!r}; known are 'birds' and 'image_folder'."
    )


def _held_out(train_classes: np.ndarray, fraction: float) -> np.ndarray:
    count = round(len(train_classes) * fraction)
    if not 0 < fraction < 1 or not 0 < count < len(train_classes):
        raise UserError(
            f"data.validation_fraction = {fraction} of {len(train_classes)} training "
            "classes must leave at least one class on either side."
        )
    return train_classes[-count:]
