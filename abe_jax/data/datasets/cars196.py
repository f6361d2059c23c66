"""Cars-196 (Stanford Cars): classes 1 to 98 train, 99 to 196 test.

Layouts:
  form A: `car_ims/000001.jpg` ... and `cars_annos.mat`;
  form B: `cars_train/00001.jpg` ..., `cars_test/00001.jpg` ..., in folders that may be
    nested doubly as on Kaggle, with `cars_train_annos.mat` and
    `cars_test_annos_withlabels.mat`;
  by class: `train/<class name>/*.jpg` and `test/<class name>/*.jpg` with
    `anno_train.csv`, `anno_test.csv` and `names.csv`;
  parquet mirrors: unpacked by `archives`, which writes `parquet_labels.csv`.

In all but form A the folders train and test are those of the classification split,
which has every class in both: they are merged, and then split by class.
"""

import csv
import re
from collections.abc import Sequence
from typing import Any

from abe_jax.data.datasets import mat_file
from abe_jax.data.datasets.definition import DataSet
from abe_jax.data.datasets.listing import (
    PARQUET_LABELS,
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
from abe_jax.data.datasets.tree import Tree, parent
from abe_jax.errors import UserError

_NUMBERED = re.compile(r"(?:^|/)(cars_train|cars_test)/(?:\1/)?(\d{5}\.jpg)$")
_BY_CLASS = re.compile(r"(?:^|/)(train|test)/([^/]+)/([^/]+)$")
_TEST_LABELS = "cars_test_annos_withlabels.mat"


def read(tree: Tree, expected: Expected) -> Listing:
    """Finds the layout and lists the images.

    Args:
      tree: files of the data set, at any depth.
      expected: numbers to hold it to, such as the official ones; the first half of
        the class ids trains.

    Raises:
      UserError: no known layout, two layouts mixed, or not the official data.
    """
    images = tree.images()
    form_a = [p for p in images if "car_ims/" in p]
    form_b = [p for p in images if _NUMBERED.search(p)]
    csv_files = tree.find("anno_train.csv") + tree.find("anno_test.csv")
    if form_a and form_b:
        raise UserError(
            f"{tree.root} mixes two layouts of Cars-196, form A ({form_a[0]!r}) and "
            f"form B ({form_b[0]!r}); their numbers differ: give the folder of one."
        )
    if tree.find(PARQUET_LABELS):
        return _parquet(tree, expected)
    if form_a:
        return _form_a(tree, form_a, expected)
    if form_b:
        return _form_b(tree, form_b, expected)
    if csv_files:
        return _by_class(tree, csv_files, expected)
    if any(_BY_CLASS.search(p) for p in images):
        raise UserError(
            f"{tree.root} holds Cars-196 by class, but neither anno_train.csv nor "
            "anno_test.csv, so the official class ids are not known; add them."
        )
    raise UserError(
        f"{tree.root} holds no Cars-196: neither car_ims/ with cars_annos.mat, nor "
        "cars_train/ and cars_test/, nor class folders with CSV files, nor parquet "
        "files."
    )


def _form_a(tree: Tree, images: Sequence[str], expected: Expected) -> Listing:
    if not tree.find("cars_annos.mat"):
        others = [*tree.find("cars_train_annos.mat"), *tree.find(_TEST_LABELS)]
        raise UserError(
            f"{tree.root} holds car_ims/ (form A) but not its cars_annos.mat"
            + (f"; {others[0]!r} belongs to form B." if others else "; add it.")
        )
    annotations = _mat(tree, "cars_annos.mat", "relative_im_path")
    fields = _box_fields(annotations)
    base = parent(images[0])
    records = []
    for row in annotations:
        name = "car_ims/" + str(row["relative_im_path"]).rpartition("/")[2]
        path = tree.files.get(base + name.removeprefix("car_ims/"), "")
        records.append(_record(path, name, row["class"], [row[f] for f in fields]))
    present = ["car_ims/" + p.removeprefix(base) for p in images]
    check_files([r.name for r in records], present, "cars_annos.mat", base)
    names = _class_names(tree)
    return _finish(records, names, "form A, car_ims/ and cars_annos.mat", expected)


def _form_b(tree: Tree, images: Sequence[str], expected: Expected) -> Listing:
    if not tree.find("cars_train_annos.mat"):
        form_a = tree.find("cars_annos.mat")
        raise UserError(
            f"{tree.root} holds cars_train/ and cars_test/ (form B) but not "
            "devkit/cars_train_annos.mat"
            + (
                "; cars_annos.mat is that of form A and numbers the images otherwise."
                if form_a
                else "; add it."
            )
        )
    if not tree.find(_TEST_LABELS):
        raise UserError(
            f"{tree.root} holds no {_TEST_LABELS}: the labels of cars_test/ are "
            "missing (devkit/cars_test_annos.mat has none), and the zero-shot split "
            "needs both folders; add it beside devkit/."
        )
    paths: dict[str, str] = {}
    for path in images:
        match = _NUMBERED.search(path)
        assert match is not None
        name = f"{match[1]}/{match[2]}"
        refuse_twice(name, paths, path)
        paths[name] = path
    _refuse_copies(tree, paths)
    records = []
    for folder, annotation in [
        ("cars_train", "cars_train_annos.mat"),
        ("cars_test", _TEST_LABELS),
    ]:
        rows = _mat(tree, annotation, "fname")
        fields = _box_fields(rows)
        part = []
        for row in rows:
            name = f"{folder}/{row['fname']}"
            path = tree.files.get(paths.get(name, ""), "")
            part.append(_record(path, name, row["class"], [row[f] for f in fields]))
        present = [p for p in paths if p.startswith(folder + "/")]
        check_files([r.name for r in part], present, annotation, folder + "/")
        records += part
    nested = any("cars_train/cars_train/" in p for p in images)
    layout = "form B, cars_train/ and cars_test/ of the classification split merged"
    layout += ", nested doubly" if nested else ""
    return _finish(records, _class_names(tree), layout, expected)


def _refuse_copies(tree: Tree, paths: dict[str, str]) -> None:
    """Refuses cars_test/ that holds the files of cars_train/: the names repeat."""
    both = [p for p in paths if p.startswith("cars_test/")]
    both = [p for p in both if p.replace("_test/", "_train/") in paths][:50]
    equal = 0
    for name in both:
        test = tree.files[paths[name]]
        train = tree.files[paths[name.replace("_test/", "_train/")]]
        with open(test, "rb") as one, open(train, "rb") as other:
            equal += one.read() == other.read()
    if equal and equal * 2 > len(both):
        raise UserError(
            f"cars_test/ holds the images of cars_train/ ({equal} of the first "
            f"{len(both)} are equal): training images are offered as test images; "
            "unpack cars_test.tgz again."
        )


def _by_class(tree: Tree, csv_files: Sequence[str], expected: Expected) -> Listing:
    found = {p.rpartition("/")[2]: p for p in csv_files}
    if len(found) != 2 or len(csv_files) != 2:
        raise UserError(
            f"{tree.root} holds {', '.join(csv_files)}; anno_train.csv and "
            "anno_test.csv are both needed, once: the zero-shot split merges both."
        )
    by_name: dict[str, str] = {}
    for path in tree.images():
        if match := _BY_CLASS.search(path):
            name = f"{match[1]}/{match[3]}"
            refuse_twice(name, by_name, path)
            by_name[name] = path
    names = _class_names(tree)
    records = []
    for half in ("train", "test"):
        annotation = found[f"anno_{half}.csv"]
        listed = []
        for row in _csv(tree, annotation):
            name = f"{half}/{row[0]}"
            path = by_name.get(name, "")
            class_id = as_id(row[-1], annotation)
            box = row[1:5] if len(row) == 6 else []
            listed.append(_record(tree.files.get(path, ""), name, class_id, box))
            folder = parent(path).rstrip("/").rpartition("/")[2]
            stated = names.get(str(class_id), "").replace("/", "-")
            if path and stated and _plain(stated) != _plain(folder):
                raise UserError(
                    f"{annotation} gives {path!r} the class {class_id}, which is "
                    f"{stated!r} in names.csv: the labels are shifted against the "
                    "folders; take the original files."
                )
        present = [p for p in by_name if p.startswith(half + "/")]
        check_files([r.name for r in listed], present, annotation, half + "/")
        records += listed
    boxed = [r.name for r in records if r.box]
    check_boxes(boxed, [r.name for r in records], "anno_train.csv and anno_test.csv")
    layout = "class folders and CSV files of the classification split merged"
    return _finish(records, names, layout, expected)


def _parquet(tree: Tree, expected: Expected) -> Listing:
    rows = _csv(tree, tree.find(PARQUET_LABELS)[0])
    base = parent(tree.find(PARQUET_LABELS)[0])
    ids = [as_id(row[1], "the parquet files") for row in rows]
    if len({name.partition("/")[0] for name, *_ in rows}) < 2:
        raise UserError(
            f"{tree.root} holds only the {rows[0][0].partition('/')[0]} part of the "
            "classification split as parquet files, which has every class in both "
            "parts; the zero-shot split needs both: add the other."
        )
    # Mirrors count the classes from 0; the counts tell whether their order is right.
    first = min(ids)
    records = [
        _record(tree.files[base + row[0]], row[0], number + (1 - first), [])
        for row, number in zip(rows, ids, strict=True)
    ]
    layout = f"parquet mirror, classes from {first}, train and test merged, no boxes"
    return _finish(records, {}, layout, expected)


def _finish(
    records: list[Record], names: dict[str, str], layout: str, expected: Expected
) -> Listing:
    check_ids({int(r.class_id) for r in records}, expected, "the annotations")
    records = [
        Record(r.path, r.name, r.class_id, role_of(int(r.class_id), expected), r.box)
        for r in records
    ]
    cause = (
        "one part of the classification split is missing or filtered, or the classes "
        "are in another order than the official one"
    )
    check_counts("Cars-196", records, expected, cause)
    class_names = {
        r.class_id: names.get(r.class_id, f"class {r.class_id}") for r in records
    }
    return make_listing(layout, records, class_names)


def _record(path: str, name: str, class_id: Any, box: Sequence[Any]) -> Record:
    """A record whose role is not yet known."""
    corners: Box | None = None
    if len(box) == 4:
        left, top, right, bottom = (as_number(str(x), f"box of {name}") for x in box)
        corners = (left, top, right, bottom)
    return Record(path, name, str(as_id(str(class_id), name)), "", corners)


def _box_fields(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Names of the fields with left, top, right, bottom; none where there are none."""
    corners = ("x1", "y1", "x2", "y2")
    for prefix in ("bbox_", ""):
        if all(prefix + corner in rows[0] for corner in corners):
            return [prefix + corner for corner in corners]
    return []


def _plain(name: str) -> str:
    """Letters and digits only: folders write "/" as "-" or leave it out."""
    return re.sub(r"[^0-9a-z]", "", name.lower())


def _csv(tree: Tree, name: str) -> list[list[str]]:
    rows = [row for row in csv.reader(tree.lines(name)) if row]
    if rows and not rows[0][-1].strip().isdecimal():
        rows = rows[1:]  # a header
    if not rows:
        raise UserError(
            f"{name} in {tree.root} has a header only; take the original file."
        )
    return rows


def _class_names(tree: Tree) -> dict[str, str]:
    """Class id to name, where `cars_meta.mat` or `names.csv` is there."""
    if found := tree.find("names.csv"):
        names = [line.strip().strip('"') for line in tree.lines(found[0])]
    elif tree.find("cars_meta.mat"):
        names = [str(n) for n in _variable(tree, "cars_meta.mat", "class_names")]
    else:
        names = []
    return {str(number): name for number, name in enumerate(names, 1)}


def _mat(tree: Tree, name: str, image: str) -> list[dict[str, Any]]:
    """The annotations in a MATLAB file, by field name.

    Args:
      tree: holds the file.
      name: of the file.
      image: the field that names the image, which differs between the two forms.

    Raises:
      UserError: no such file, two of them, or another content.
    """
    rows = _variable(tree, name, "annotations")
    fields = rows[0] if rows and isinstance(rows[0], dict) else {}
    if "class" not in fields:
        raise UserError(
            f"{name} has no field 'class'; the labels are in the file of the "
            "same name 'withlabels' or in cars_annos.mat."
        )
    if image not in fields:
        raise UserError(
            f"{name} has no field {image!r}: its content is that of another file of "
            "the data set; take the original one."
        )
    return rows


def _variable(tree: Tree, name: str, variable: str) -> list[Any]:
    found = tree.find(name)
    if len(found) != 1:
        raise UserError(
            f"{tree.root} holds {name} {len(found)} times, expected once; give the "
            "folder of one copy."
        )
    try:
        return mat_file.load(tree.files[found[0]], variable)
    except ValueError as error:
        raise UserError(
            f"{found[0]} is not the MATLAB file that Cars-196 has: {error}."
        ) from error


DATASET = DataSet(
    name="cars196",
    read=read,
    expected={"train": (98, 8_054), "test": (98, 8_131)},
    parquet=True,
    citation=(
        "Krause et al., 3D Object Representations for Fine-Grained Categorization, 2013"
    ),
)
