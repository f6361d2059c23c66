"""CUB-200-2011: classes 1 to 100 train, 101 to 200 test.

Layouts:
  official: `images.txt`, `image_class_labels.txt`, `bounding_boxes.txt` and
    `images/001.Black_footed_Albatross/*.jpg`;
  images only: class folders `001.*` to `200.*` anywhere, also below `train/` and
    `test/` (the two parts of the classification split, merged); it has no boxes.

The file `train_test_split.txt` is the classification split and is not used.
"""

import re

from abe_jax.data.datasets.definition import DataSet
from abe_jax.data.datasets.listing import (
    Box,
    Expected,
    Listing,
    Record,
    as_id,
    as_number,
    check_boxes,
    check_counts,
    check_files,
    check_ids,
    make_listing,
    refuse_twice,
    role_of,
)
from abe_jax.data.datasets.tree import Tree
from abe_jax.errors import UserError

_FOLDER = re.compile(r"(\d{3})\.[^/]+")


def read(tree: Tree, expected: Expected) -> Listing:
    """Finds the layout and lists the images.

    Args:
      tree: files of the data set, at any depth.
      expected: numbers to hold it to, such as the official ones; the first half of
        the class ids trains.

    Raises:
      UserError: no known layout, or not the official data.
    """
    bases = tree.folders_with("images.txt", "image_class_labels.txt")
    if len(bases) > 1:
        raise UserError(
            f"{tree.root} holds CUB-200-2011 {len(bases)} times, in {bases[0]!r} and "
            f"{bases[1]!r}; give one of them as --source."
        )
    if bases:
        return _official(tree, bases[0], expected)
    return _images_only(tree, expected)


def _official(tree: Tree, base: str, expected: Expected) -> Listing:
    names = dict(tree.rows(base + "images.txt", 2))
    labels = dict(tree.rows(base + "image_class_labels.txt", 2))
    ids = {key: as_id(label, "image_class_labels.txt") for key, label in labels.items()}
    check_ids(ids.values(), expected, "image_class_labels.txt")
    if names.keys() != labels.keys():
        raise UserError(
            f"images.txt lists {len(names):,} images and image_class_labels.txt "
            f"{len(labels):,}: one of them is cut short; take the original files."
        )
    for key, name in names.items():
        folder = _FOLDER.match(name)
        if folder and int(folder[1]) != ids[key]:
            raise UserError(
                f"image {key} is {name!r} in images.txt but of class {ids[key]} in "
                "image_class_labels.txt: the labels are shifted against the images; "
                "take the original files."
            )
    folder = base + "images/"
    present = [p.removeprefix(folder) for p in tree.images(folder)]
    check_files(list(names.values()), present, "images.txt", folder)
    boxes = _boxes(tree, base + "bounding_boxes.txt")
    check_boxes(boxes, names, "bounding_boxes.txt")
    records = [
        Record(
            path=tree.files[folder + name],
            name="images/" + name,
            class_id=str(ids[key]),
            role=role_of(ids[key], expected),
            box=boxes.get(key),
        )
        for key, name in names.items()
    ]
    check_counts("CUB-200-2011", records, expected, _cause(tree, base, len(records)))
    class_names = {str(ids[key]): name.partition("/")[0] for key, name in names.items()}
    layout = "official CUB_200_2011 folder" + ("" if boxes else ", without boxes")
    return make_listing(layout, records, class_names)


def _boxes(tree: Tree, name: str) -> dict[str, Box]:
    if name not in tree.files:
        return {}
    boxes = {}
    for key, *cells in tree.rows(name, 5):
        x, y, width, height = (as_number(cell, name) for cell in cells)
        boxes[key] = (x, y, x + width, y + height)
    return boxes


def _cause(tree: Tree, base: str, count: int) -> str:
    name = base + "train_test_split.txt"
    if name in tree.files:
        training = sum(row[1] == "1" for row in tree.rows(name, 2))
        if count == training:
            return (
                "this is the training part of the classification split "
                "(train_test_split.txt), which has every class in both parts"
            )
    if count < 7_000:
        return "this is CUB-200 of 2010, not CUB-200-2011, or a part of the images"
    return "files are missing, or this is another data set"


def _images_only(tree: Tree, expected: Expected) -> Listing:
    found: dict[str, str] = {}
    records = []
    class_names: dict[str, str] = {}
    halves = set()
    for path in tree.images():
        *folders, file = path.split("/")
        if not folders or not (match := _FOLDER.fullmatch(folders[-1])):
            continue
        if len(folders) > 1 and folders[-2] in ("train", "test"):
            halves.add(folders[-2])
        name = f"images/{folders[-1]}/{file}"
        refuse_twice(name, found, path)
        found[name] = path
        number = int(match[1])
        role = role_of(number, expected)
        records.append(Record(tree.files[path], name, str(number), role))
        class_names[str(number)] = folders[-1]
    if not records:
        raise UserError(
            f"{tree.root} holds no CUB-200-2011: neither images.txt beside "
            "image_class_labels.txt nor class folders such as "
            "001.Black_footed_Albatross."
        )
    check_ids({int(r.class_id) for r in records}, expected, "the folder names")
    cause = "this is CUB-200 of 2010, not CUB-200-2011, or files are missing"
    if len(halves) == 1:
        cause = (
            f"this is the {halves.pop()}/ part of the classification split, which has "
            "every class in both parts; give both"
        )
    check_counts("CUB-200-2011", records, expected, cause)
    layout = "class folders without boxes"
    if halves:
        layout += ", train/ and test/ of the classification split merged"
    return make_listing(layout, records, class_names)


DATASET = DataSet(
    name="cub200",
    read=read,
    expected={"train": (100, 5_864), "test": (100, 5_924)},
    citation="Wah et al., The Caltech-UCSD Birds-200-2011 Dataset, 2011",
)
