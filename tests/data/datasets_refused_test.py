"""Data sets that are not whole, or not what they are taken for: each is refused."""

import pathlib
import shutil

import fake_datasets as fake
import pytest

from abe_jax.data.datasets import DATASETS
from abe_jax.data.datasets.tree import Tree
from abe_jax.data.prepare import layouts
from abe_jax.errors import UserError


def read(dataset, root, scratch, expected=None):
    expected = fake.SMALL[dataset] if expected is None else expected
    return layouts.read(DATASETS[dataset], root, scratch, expected)


# What was done to a data set, and what its user is told.


def _first(root, suffix=".jpg"):
    return min(p for p in root.rglob("*") if p.name.lower().endswith(suffix))


def _one_too_many(root):
    first = _first(root)
    shutil.copy(first, first.with_name("99999.jpg"))


def _one_missing(root):
    _first(root).unlink()


# Rows of parquet files are not lost or added by accident.
@pytest.mark.parametrize("layout", [x for x in fake.LAYOUTS if "parquet" not in x])
@pytest.mark.parametrize("change", [_one_too_many, _one_missing])
def test_one_file_more_or_less(layout, change, tmp_path):
    dataset, write, _ = fake.LAYOUTS[layout]
    root = write(tmp_path / "source", fake.SMALL[dataset], fake.no_image)
    change(root)
    if layout == "cub200 classes":
        found = 34 if change is _one_too_many else 32
        message = f"train part has 8 classes and {found} images, the official one 8 "
    elif change is _one_too_many:
        message = "1 image.s. in .* are not listed in .*files were added"
    else:
        message = "1 of the .* images listed in .* are not in .*incomplete"
    with pytest.raises(UserError, match=message):
        read(dataset, tmp_path / "source", tmp_path / "scratch")


def _edit(path, change):
    path.write_text("".join(change(path.read_text().splitlines(keepends=True))))


def _shift_cub(root):
    """Class ids from 0."""

    def change(lines):
        rows = (line.split() for line in lines)
        return [f"{i} {int(c) - 1}\n" for i, c in rows]

    _edit(root / "CUB_200_2011" / "image_class_labels.txt", change)


def _shift_rows_of_cub(root):
    """Each image the label of the next."""

    def change(lines):
        rows = [line.split() for line in lines]
        labels = [row[1] for row in rows]
        labels = labels[1:] + labels[-1:]
        return [f"{r[0]} {c}\n" for r, c in zip(rows, labels, strict=True)]

    _edit(root / "CUB_200_2011" / "image_class_labels.txt", change)


def _shift_sop(root):
    for role in ("train", "test"):

        def change(lines):
            rows = [line.split() for line in lines[1:]]
            return lines[:1] + [f"{a} {int(b) - 1} {c} {d}\n" for a, b, c, d in rows]

        _edit(root / "Stanford_Online_Products" / f"Ebay_{role}.txt", change)


def _shift_cars_b(root):
    expected = fake.SMALL["cars196"]
    for half, part in fake._halves(expected).items():
        records = [{**fake._corners(), "class": c - 1, "fname": n} for c, n in part]
        name = {
            "train": "devkit/cars_train_annos.mat",
            "test": "cars_test_annos_withlabels.mat",
        }[half]
        fake._annotations(root, name, records)


def _shift_rows_of_csv(root):
    for half in ("train", "test"):
        path = root / f"anno_{half}.csv"
        fake.rewrite_csv(path, lambda row: [*row[:-1], str(int(row[-1]) % 16 + 1)])


def _shift_inshop(root):
    def change(lines):
        rows = [line.split() for line in lines[2:]]
        items = [row[1] for row in rows]
        items = items[1:] + items[:1]
        rows = zip(rows, items, strict=True)
        return lines[:2] + [f"{row[0]}  {item}  {row[2]}\n" for row, item in rows]

    _edit(root / "Eval" / "list_eval_partition.txt", change)


def _train_as_test_sop(root):
    base = root / "Stanford_Online_Products"
    shutil.copy(base / "Ebay_train.txt", base / "Ebay_test.txt")


def _train_as_test_cars(root):
    shutil.rmtree(root / "cars_test")
    shutil.copytree(root / "cars_train", root / "cars_test")


def _train_as_query(root):
    def change(lines):
        return [
            line.replace(" train", " query") if i % 5 == 3 else line
            for i, line in enumerate(lines)
        ]

    _edit(root / "Eval" / "list_eval_partition.txt", change)


def _mixed_cars(root):
    fake.cars196_form_a(root, fake.SMALL["cars196"])


def _annotations_of_form_a(root):
    (root / "devkit" / "cars_train_annos.mat").unlink()
    fake.cars196_form_a(root / "a", fake.SMALL["cars196"])
    shutil.move(root / "a" / "cars_annos.mat", root / "cars_annos.mat")
    shutil.rmtree(root / "a")


def _annotations_of_form_b(root):
    (root / "cars_annos.mat").unlink()
    fake.cars196_form_b(root / "b", fake.SMALL["cars196"])
    shutil.move(root / "b" / "devkit" / "cars_train_annos.mat", root)
    shutil.rmtree(root / "b")


def _no_test_labels(root):
    (root / "cars_test_annos_withlabels.mat").unlink()


def _one_parquet_half(root):
    for path in (root / "data").glob("test-*"):
        path.unlink()


def _classification_half_of_cub(root):
    """Only what train_test_split.txt calls training."""
    base = root / "CUB_200_2011"
    kept = {
        line.split()[0]
        for line in (base / "train_test_split.txt").read_text().splitlines()
        if line.endswith(" 1")
    }
    for line in (base / "images.txt").read_text().splitlines():
        key, name = line.split()
        if key not in kept:
            (base / "images" / name).unlink()
    for name in ("images.txt", "image_class_labels.txt"):
        _edit(base / name, lambda lines: [x for x in lines if x.split()[0] in kept])


def _no_csv(root):
    (root / "anno_train.csv").unlink()
    (root / "anno_test.csv").unlink()


def _cut_partition(root):
    _edit(root / "Eval" / "list_eval_partition.txt", lambda lines: lines[:-5])


def _no_images(root):
    shutil.rmtree(root / "Img")


def _two_copies(root):
    shutil.copytree(root / "CUB_200_2011", root / "backup")


def _truncated_mat(root):
    path = root / "cars_annos.mat"
    path.write_bytes(path.read_bytes()[:200])


def _content_of_form_b(root):
    other = fake.LAYOUTS["cars196 form B"][1]
    other(root.parent / "b", fake.SMALL["cars196"])
    annotations = root.parent / "b" / "devkit" / "cars_train_annos.mat"
    shutil.copy(annotations, root / "cars_annos.mat")


def _damaged_boxes(root):
    path = root / "Anno" / "list_bbox_inshop.txt"
    _edit(path, lambda lines: [*lines, "img/1.jpg 3 5\n"])


def _cut_boxes(root):
    path = next(p for p in root.rglob("*.txt") if "box" in p.name)
    _edit(path, lambda lines: lines[:-20])


def _boxes_of_nan(root):
    path = root / "CUB_200_2011" / "bounding_boxes.txt"
    _edit(path, lambda lines: [*lines[:-1], "67 nan 2 3 4\n"])


def _row_without_a_box(root):
    def change(lines):
        name, *_, class_id = lines[0].split(",")
        return [f"{name},{class_id}", *lines[1:]]

    _edit(root / "anno_test.csv", change)


def _in_two_classes(root):
    first, second, *_ = sorted((root / "car_data" / "car_data" / "train").iterdir())
    shutil.copy(_first(first), second)


def _mat_that_ends_its_reader(root):
    """SciPy's reader ends its process at this one byte."""
    path = root / "devkit" / "cars_meta.mat"
    content = bytearray(path.read_bytes())
    content[1121] = 219
    path.write_bytes(content)


def _empty_annotations(root):
    for name in ("images.txt", "image_class_labels.txt"):
        (root / "CUB_200_2011" / name).write_text("")


def _empty_partition(root):
    (root / "Eval" / "list_eval_partition.txt").write_text("\n")


def _header_only(root):
    base = root / "Stanford_Online_Products"
    _edit(base / "Ebay_test.txt", lambda lines: lines[:1])


def _damaged_line(root):
    _edit(root / "CUB_200_2011" / "images.txt", lambda lines: [*lines, "77\n"])


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        ("cub200", _shift_cub, "go from 0 to 15, but the official ones from 1 to 16"),
        ("cub200", _shift_rows_of_cub, "the labels are shifted against the images"),
        ("cub200", _classification_half_of_cub, "classification split .train_test"),
        ("cub200", _two_copies, "holds CUB-200-2011 2 times"),
        ("cub200", _empty_annotations, "images.txt in .* is empty; take the original"),
        ("cub200", _cut_boxes, "47 of 67 images have a box in bounding_boxes.txt, the"),
        ("cub200", _boxes_of_nan, "bounding_boxes.txt: 'nan' is no finite number"),
        ("cub200", _damaged_line, "line 68 of .*images.txt has 1 columns, expected 2"),
        ("sop", _shift_sop, "go from 0 to 14.*shifted by one"),
        ("sop", _train_as_test_sop, "Ebay_test.txt offers training images as test"),
        ("cars196 form B", _shift_cars_b, "go from 0 to 15.*shifted by one"),
        ("cars196 form B", _train_as_test_cars, "training images are offered as test"),
        ("cars196 form B", _mixed_cars, "mixes two layouts of Cars-196, form A"),
        ("cars196 form B", _annotations_of_form_a, "numbers the images otherwise"),
        ("cars196 form B", _no_test_labels, "the labels of cars_test/ are missing"),
        ("cars196 nested", _no_test_labels, "the labels of cars_test/ are missing"),
        ("cars196 form A", _annotations_of_form_b, "belongs to form B"),
        (
            "cars196 form A",
            _mat_that_ends_its_reader,
            "cars_meta.mat is not the MAT",
        ),
        ("cars196 form A", _truncated_mat, "is not the MATLAB file that Cars-196 has"),
        ("cars196 form A", _content_of_form_b, "has no field 'relative_im_path'"),
        ("cars196 by class", _shift_rows_of_csv, "labels are shifted against the fold"),
        ("cars196 by class", _row_without_a_box, "66 of 67 images have a box in anno_"),
        ("cars196 by class", _in_two_classes, "'train/00001.jpg' is there twice, as "),
        ("cars196 by class", _no_csv, "neither anno_train.csv nor anno_test.csv"),
        ("cars196 parquet", _one_parquet_half, "only the train part of the classif"),
        ("inshop", _shift_inshop, "labels are shifted against the images"),
        ("inshop", _train_as_query, "list_eval_partition.txt offers training images"),
        ("inshop", _cut_partition, "says 68 images in its first line and lists 63"),
        ("inshop", _empty_partition, "list_eval_partition.txt in .* is empty"),
        ("sop", _header_only, "Ebay_test.txt in .* has a header only"),
        ("inshop", _damaged_boxes, "list_bbox_inshop.txt has a line without four corn"),
        ("inshop", _cut_boxes, "48 of 68 images have a box in list_bbox_inshop.txt"),
        ("inshop", _no_images, "but not its images, such as 'img/WOMEN"),
    ],
)
def test_refused(layout, change, message, tmp_path):
    dataset, write, _ = fake.LAYOUTS[layout]
    write(tmp_path / "source", fake.SMALL[dataset])
    change(tmp_path / "source")
    with pytest.raises(UserError, match=message) as caught:
        read(dataset, tmp_path / "source", tmp_path / "scratch")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("expected", "cause"),
    [
        ({"train": (3, 9), "test": (3, 9)}, "go from 1 to 16, but the official ones"),
        ({"train": (8, 34), "test": (8, 33)}, "8 classes and 33 images, .* 8 and 34"),
    ],
)
def test_mismatch_names_both_numbers(expected, cause, tmp_path):
    fake.cub200(tmp_path, fake.SMALL["cub200"], fake.no_image)
    with pytest.raises(UserError, match=cause):
        read("cub200", tmp_path, tmp_path / "scratch", expected)


def test_half_of_the_classification_split_is_told(tmp_path):
    halves = ("train/", "test/")
    fake.cub200_classes(tmp_path, fake.SMALL["cub200"], fake.no_image, halves=halves)
    listing = read("cub200", tmp_path, tmp_path / "scratch")
    assert "merged" in listing.layout
    shutil.rmtree(tmp_path / "test")
    with pytest.raises(UserError, match="the train/ part of the classification split"):
        read("cub200", tmp_path, tmp_path / "scratch")


@pytest.mark.parametrize("other", ["me.parquet", "damaged.tgz", "notes.zip"])
def test_what_else_lies_there_does_not_hide_what_is_wrong(other, tmp_path):
    root = fake.cub200(tmp_path / "source", fake.SMALL["cub200"], fake.no_image)
    _one_missing(root)
    fake.write(root, other, b"")
    if other == "notes.zip":
        (tmp_path / "notes").mkdir()
        shutil.make_archive(str(root / "notes"), "zip", tmp_path / "notes")
    with pytest.raises(UserError) as caught:
        read("cub200", tmp_path / "source", tmp_path / "scratch")
    first, _, last = str(caught.value).partition(" Its archives were tried, too: ")
    assert first.startswith("1 of the 67 images listed in images.txt are not in")
    assert first.endswith(".") and last.startswith(
        "cannot unpack damaged.tgz" if other == "damaged.tgz" else ""
    )
    assert bool(last) == (other == "damaged.tgz")


def test_an_archives_errors_name_what_the_user_gave(tmp_path):
    fake.write(tmp_path, "notes/readme.txt", b"nothing")
    path = shutil.make_archive(str(tmp_path / "notes"), "zip", tmp_path / "notes")
    with pytest.raises(UserError) as caught:
        read("cub200", pathlib.Path(path), tmp_path / "scratch")
    assert str(caught.value).startswith(f"{path} holds no CUB-200-2011")
    assert "scratch" not in str(caught.value)


def test_a_parquet_file_alone_is_no_data_set(tmp_path):
    fake.cars196_parquet(tmp_path, fake.SMALL["cars196"])
    path = next((tmp_path / "data").glob("train-*"))
    with pytest.raises(UserError, match="of parquet files give the folder"):
        read("cars196", path, tmp_path / "scratch")


@pytest.mark.parametrize("dataset", ["cub200", "cars196", "sop", "inshop"])
def test_another_folder_is_refused(dataset, tmp_path):
    fake.write(tmp_path, "notes/readme.txt", b"nothing")
    with pytest.raises(UserError, match="hold"):
        read(dataset, tmp_path, tmp_path / "scratch")


def test_missing_source(tmp_path):
    with pytest.raises(UserError, match="is no folder"):
        read("cub200", tmp_path / "nowhere", tmp_path / "scratch")


def test_unreadable_folder(tmp_path, unreadable):
    fake.cub200(tmp_path, fake.SMALL["cub200"], fake.no_image)
    unreadable("003.Bird_3")
    with pytest.raises(UserError, match="cannot read the folder .*003.Bird_3"):
        Tree.of(tmp_path)
