"""What a run trains on, what it is evaluated on, and how it is known again."""

import dataclasses
import hashlib
import logging
from collections.abc import Iterable

import numpy as np

from abe_jax.data import sources
from abe_jax.data.datasets.image_folder import ImageFolder
from abe_jax.data.memory import InMemory
from abe_jax.data.pipeline import Subset
from abe_jax.data.prepared import PreparedRecords
from abe_jax.errors import UserError

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Splits:
    """What a run trains on and what it is evaluated on.

    Attributes:
      train: images of the training classes.
      evaluation: images of the classes held out; each is a query.
      gallery: the images that are searched, where they are a part of their own, as in
        In-Shop; None where the queries are each other's gallery.
      evaluation_name: "validation" where part of the training classes is held out for
        choosing settings, else "test".
      zero_shot: True where no class is in both parts.
      num_skipped: bad files that the data set was prepared without.
    """

    train: Subset
    evaluation: Subset
    evaluation_name: str
    zero_shot: bool
    gallery: Subset | None = None
    num_skipped: int = 0

    @property
    def parts(self) -> dict[str, Subset]:
        """The parts by name: "train", "validation" or "test", and perhaps "gallery"."""
        parts = {"train": self.train, self.evaluation_name: self.evaluation}
        return parts if self.gallery is None else {**parts, "gallery": self.gallery}

    def description(self) -> dict:
        """What identifies this data, wherever it lies: JSON-able, without pixels.

        Returns:
          "fingerprint": hash of the names, classes and parts of all images, in order;
          "storage": how their pixels are stored; "classes": for each of `parts` the
          number of images by class name.
        """
        digest = hashlib.sha256()
        classes: dict[str, dict[str, int]] = {}
        for part, subset in self.parts.items():
            class_names = subset.source.class_names
            counts: dict[str, int] = {}
            for image, label in zip(subset.names, subset.labels, strict=True):
                name = class_names[label]
                counts[name] = counts.get(name, 0) + 1
                line = f"{part}\0{name}\0{image}\0"  # no name holds a NUL
                digest.update(line.encode("utf-8", "surrogateescape"))
            classes[part] = counts
        return {
            "fingerprint": digest.hexdigest()[:32],
            "storage": self.train.source.storage,
            "classes": classes,
        }

    def seen(self, trained: Iterable[str]) -> list[str]:
        """Names of the evaluated classes that are among those trained on.

        Args:
          trained: class names, such as `description()["classes"]["train"]` of the run.
        """
        names = self.evaluation.source.class_names
        own = {names[label] for label in np.unique(self.evaluation.labels)}
        return sorted(own.intersection(trained))


def differences(there: dict, now: dict) -> list[str]:
    """What differs between two descriptions, for people; empty where nothing does.

    Args:
      there: `Splits.description()` of the data that a run began with.
      now: that of the data it is given now.
    """
    found = []
    for part in dict.fromkeys((*there["classes"], *now["classes"])):
        old, new = (d["classes"].get(part, {}) for d in (there, now))
        gone, more = (
            sorted(old.keys() - new.keys()),
            sorted(new.keys() - old.keys()),
        )
        for words, names in (("no longer", gone), ("new", more)):
            if names:
                found.append(f"{part}: {len(names):,} class(es) {words}, {_few(names)}")
        changed = [n for n in old if n in new and old[n] != new[n]]
        if changed:
            first = changed[0]
            found.append(
                f"{part}: {len(changed):,} class(es) of another number of images, "
                f"{first!r} had {old[first]:,} and has {new[first]:,}"
            )
    if there["fingerprint"] != now["fingerprint"] and not found:
        found.append("files of other names, or in another order")
    if there["storage"] != now["storage"]:
        found.append(f"pixels: {there['storage']} there, {now['storage']} now")
    return found


def _few(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:3]))
    return shown if len(names) < 4 else f"{shown} ..."


def create(config) -> Splits:
    """Opens the data that `config.data` describes and splits it by classes.

    The benchmarks have their official zero-shot split. Of a folder the first half of
    the sorted classes trains and the second half tests, unless it has `train/` and
    `test/` parts; of the birds four fifths train. With `validation_fraction` above
    0 that share of the training classes, the last in order, is held out and takes the
    place of the test classes, which are then not looked at.

    Args:
      config: the `data` section of a config (see `configs/default.py`).

    Raises:
      UserError: the data is not there, or the fields do not fit it.
    """
    source = sources.open_source(config)
    roles = np.asarray(source.roles)
    train, in_gallery = roles == "train", roles == "gallery"
    evaluation, name = ~train & ~in_gallery, "test"
    if config.validation_fraction:
        held_out = _held_out(
            np.unique(source.labels[train]), config.validation_fraction
        )
        evaluation, name = train & np.isin(source.labels, held_out), "validation"
        train = train & ~evaluation
        in_gallery = np.zeros(len(source), bool)
    for part, chosen in (("train", train), (name, evaluation)):
        if not chosen.any():
            raise UserError(
                f"data.path {config.path!r} holds no images in its {part} part; put "
                "class folders there, or leave the part out."
            )
    _require_positives(source.labels[evaluation], source.labels[in_gallery], name)
    if isinstance(source, ImageFolder):  # prepare counted them where it stored images
        copies = source.count_copies(np.flatnonzero(train), np.flatnonzero(evaluation))
        if copies:
            _log.warning(
                "%s: %d of the %d images to evaluate are copies of training images.",
                source.path,
                copies,
                evaluation.sum(),
            )
    num_skipped = source.num_skipped if isinstance(source, PreparedRecords) else 0
    if config.in_memory:
        source = InMemory(source)
    train_part = Subset(source, np.flatnonzero(train))
    evaluation_part = Subset(source, np.flatnonzero(evaluation))
    gallery = Subset(source, np.flatnonzero(in_gallery)) if in_gallery.any() else None
    shared = np.intersect1d(train_part.labels, evaluation_part.labels)
    if len(shared):
        _log.warning(
            "%d classes are in both train/ and test/: Recall@K is not zero-shot.",
            len(shared),
        )
    splits = Splits(
        train_part, evaluation_part, name, not len(shared), gallery, num_skipped
    )
    _log.info("%s", "; ".join(_classes_of(*part) for part in splits.parts.items()))
    return splits


def _classes_of(part: str, subset: Subset) -> str:
    """Which classes a part has: the first, the last, and how many."""
    labels = np.unique(subset.labels)
    if not len(labels):
        return f"{part}: no images"
    names = subset.source.class_names
    return (
        f"{part}: {len(labels):,} classes, {names[labels[0]]!r} to "
        f"{names[labels[-1]]!r}, {len(subset):,} images"
    )


def _require_positives(queries: np.ndarray, gallery: np.ndarray, part: str) -> None:
    """Refuses classes to evaluate of which no query could find another image."""
    if not len(gallery):
        classes, counts = np.unique(queries, return_counts=True)
        gallery = classes[counts > 1]
    if not np.isin(queries, gallery).any():
        raise UserError(
            f"no class of the {part} part has two images, or one to ask and one to be "
            "found: Recall@K cannot be measured; add images."
        )


def _held_out(train_classes: np.ndarray, fraction: float) -> np.ndarray:
    count = round(len(train_classes) * fraction)
    if not 0 < fraction < 1 or not 0 < count < len(train_classes):
        raise UserError(
            f"data.validation_fraction = {fraction} of {len(train_classes)} training "
            "classes must leave at least one class on either side."
        )
    return train_classes[-count:]
