"""What a data set on disk consists of, and the checks that every layout shares.

A layout is read in three steps: the files below a folder are listed once (`tree`), a
reader finds out which layout they form and what each image is (`Listing`), and
`check_counts` holds the numbers against the official ones. No image is opened.
"""

import contextlib
import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping, Sequence

from abe_jax.data.prepared import ROLES
from abe_jax.errors import UserError

# What `prepare.archives` makes of parquet files: name of the image, label.
PARQUET_LABELS = "parquet_labels.csv"

# Of each role: number of classes, number of images.
Expected = Mapping[str, tuple[int, int]]

# Left, top, right, bottom in pixels of the image file.
Box = tuple[float, float, float, float]


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """An image of a data set, not yet opened.

    Attributes:
      path: where its file is.
      name: the same below the data set's folder, with forward slashes.
      class_id: official id of its class, as in the data set's own files.
      role: "train", "test", "query" or "gallery".
      box: bounding box of the object, where the data set has one.
    """

    path: str
    name: str
    class_id: str
    role: str
    box: Box | None = None


@dataclasses.dataclass(frozen=True)
class Listing:
    """What a reader makes of a folder.

    Attributes:
      layout: which of the known layouts it is, in words.
      records: the images; by role, then by class, then by name.
      class_names: class id to a name for people, in the order of the labels.
    """

    layout: str
    records: list[Record]
    class_names: dict[str, str]


def as_number(text: str, what: str) -> float:
    """A finite number from a text file.

    Raises:
      UserError: it is none; `what` says where.
    """
    with contextlib.suppress(ValueError):
        if math.isfinite(number := float(text)):
            return number
    raise UserError(f"{what}: {text!r} is no finite number.")


def as_id(text: str, what: str) -> int:
    """An integer id from a text file.

    Raises:
      UserError: it is none; `what` says where.
    """
    try:
        return int(text)
    except ValueError as error:
        raise UserError(f"{what}: {text!r} is no whole number.") from error


def role_of(class_id: int, expected: Expected) -> str:
    """Role of a class where the first of the official ids train and the rest test."""
    return "train" if class_id <= expected["train"][0] else "test"


def check_ids(ids: Collection[int], expected: Expected, where: str) -> None:
    """Refuses class ids that are shifted against the official ones, 1 and up.

    Raises:
      UserError: the ids start elsewhere than at 1, or go beyond the number of classes
        of all roles.
    """
    count = sum(classes for classes, _ in expected.values())
    low, high = min(ids), max(ids)
    if low == 1 and high <= count:
        return
    shifted = high - low == count - 1
    raise UserError(
        f"class ids in {where} go from {low} to {high}, but the official ones from 1 "
        f"to {count}: "
        + (
            f"the labels are shifted by {'one' if abs(low - 1) == 1 else low - 1}; "
            "take the original file."
            if shifted
            else "this is another data set or a changed copy."
        )
    )


def check_files(
    listed: Sequence[str], present: Collection[str], annotation: str, folder: str
) -> None:
    """Refuses images that are listed and missing, or present and not listed.

    Args:
      listed: names in the annotation file.
      present: names of the images on disk, written in the same way.
      annotation: name of the file that lists them.
      folder: where the images are, in words.

    Raises:
      UserError: the two differ, or a name is listed twice.
    """
    known = set(listed)
    if len(known) != len(listed):
        seen: set[str] = set()
        twice = next(n for n in listed if n in seen or seen.add(n))
        raise UserError(f"{annotation} lists {twice!r} twice; take the original file.")
    present = set(present)
    missing, extra = sorted(known - present), sorted(present - known)
    if missing:
        raise UserError(
            f"{len(missing)} of the {len(known)} images listed in {annotation} are not "
            f"in {folder}, the first is {missing[0]!r}: the copy is incomplete; unpack "
            "the archive again."
        )
    if extra:
        raise UserError(
            f"{len(extra)} image(s) in {folder} are not listed in {annotation}, the "
            f"first is {extra[0]!r}: files were added or data sets mixed; remove them."
        )


def check_boxes(
    boxed: Collection[str], listed: Collection[str], annotation: str
) -> None:
    """Refuses boxes of some images only: the others would be taken whole.

    Args:
      boxed: keys (ids or names) of the images that have a box.
      listed: keys of all images.
      annotation: where the boxes are, in words.

    Raises:
      UserError: there are boxes, and a listed image has none.
    """
    missing = len(set(listed) - set(boxed))
    if boxed and missing:
        raise UserError(
            f"{len(listed) - missing:,} of {len(listed):,} images have a box in "
            f"{annotation}, the others none: a file is cut short or changed; take the "
            "original one."
        )


def refuse_twice(name: str, found: Mapping[str, str], path: str) -> None:
    """Refuses a second image of a name.

    Args:
      name: of the image, as the annotations have it.
      found: name -> relative path of each image so far.
      path: relative path of this one.

    Raises:
      UserError: the name was found before.
    """
    if name in found:
        raise UserError(
            f"{name!r} is there twice, as {found[name]!r} and {path!r}; remove one of "
            "them, or give one copy of the data set as --source."
        )


def check_counts(
    dataset: str,
    records: Iterable[Record],
    expected: Expected,
    cause: str = "files are missing, or this is another data set",
) -> None:
    """Holds the classes and images of each role against the official numbers.

    Raises:
      UserError: a number differs; the message has both, and the likely cause.
    """
    classes: dict[str, set[str]] = {role: set() for role in expected}
    images = dict.fromkeys(expected, 0)
    for record in records:
        classes[record.role].add(record.class_id)
        images[record.role] += 1
    for role, (num_classes, num_images) in expected.items():
        found = (len(classes[role]), images[role])
        if found != (num_classes, num_images):
            raise UserError(
                f"{dataset}: the {role} part has {found[0]:,} classes and "
                f"{found[1]:,} images, the official one {num_classes:,} and "
                f"{num_images:,}; the likely cause: {cause}."
            )


def check_disjoint(dataset: str, records: Iterable[Record], where: str) -> None:
    """Refuses classes that are in training and in another role.

    Raises:
      UserError: there is such a class.
    """
    trained: set[str] = set()
    others: set[str] = set()
    for record in records:
        (trained if record.role == "train" else others).add(record.class_id)
    shared = trained & others
    if shared:
        raise UserError(
            f"{dataset}: {len(shared):,} of the {len(others):,} classes that test are "
            f"also trained on, the first is {min(shared)!r}: {where} offers training "
            "images as test images; take the original files of the zero-shot split."
        )


def make_listing(
    layout: str, records: Iterable[Record], class_names: Mapping[str, str]
) -> Listing:
    """Puts records and classes in order; ids that are numbers go by their value."""
    numbers = all(class_id.isdecimal() for class_id in class_names)
    ordered = sorted(class_names, key=int if numbers else str)
    rank = {class_id: number for number, class_id in enumerate(ordered)}
    return Listing(
        layout,
        sorted(records, key=lambda r: (ROLES.index(r.role), rank[r.class_id], r.name)),
        {class_id: class_names[class_id] for class_id in ordered},
    )
