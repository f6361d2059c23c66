"""Folders and zip files of every kind of image that users have."""

import io
import pickle
import zipfile

import numpy as np
import pytest
from PIL import Image

from abe_jax import data
from abe_jax.data.datasets.image_folder import ImageFolder
from abe_jax.data.prepare import archives
from abe_jax.errors import UserError
from configs import default


def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def make_tree(root, classes, images_per_class=3, prefix=""):
    for number, name in enumerate(classes):
        for i in range(images_per_class):
            path = root / prefix / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            colour = (40 * number % 256, 10 * i, 77)
            path.write_bytes(encoded(Image.new("RGB", (8, 8), colour)))
    return root


def make_zip(folder, path, before="", separator="/"):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            # By itself the archive would take a "./" away.
            info = zipfile.ZipInfo.from_file(file, file.relative_to(folder.parent))
            info.filename = before + info.filename.replace("/", separator)
            archive.writestr(info, b"" if file.is_dir() else file.read_bytes())
    return path


def config_of(path, **fields):
    config = default.get_config().data
    config.update(path=str(path), load_size=8, image_size=8, **fields)
    return config


@pytest.mark.parametrize(
    "kind", ["folder", "zip", "wrapped zip", "dotted zip", "backslashed zip"]
)
def test_folder_and_zip_hold_the_same(tmp_path, kind):
    classes = ["oak", "ash", "elm", "fir"]
    inner = "trees" if kind == "wrapped zip" else ""
    folder = make_tree(tmp_path / "photos", classes, prefix=inner)
    before = "./" if kind == "dotted zip" else ""  # as some packers write
    separator = "\\" if kind == "backslashed zip" else "/"  # as some of Windows do
    packed = make_zip(folder, tmp_path / "photos.zip", before, separator)
    source = ImageFolder(folder if kind == "folder" else packed, 8)
    assert source.class_names == ("ash", "elm", "fir", "oak")
    assert len(source) == 12
    assert source.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert source.names[:2] == ("ash/0.png", "ash/1.png")
    np.testing.assert_array_equal(source[1], np.full((8, 8, 3), (40, 10, 77)))
    again = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(again[11], source[11])
    assert source.count_copies(np.arange(6), np.arange(4, 12)) == 2
    if kind != "folder":
        archives.unpack(packed, tmp_path / "unpacked", skip_encrypted=False)
        unpacked = ImageFolder(tmp_path / "unpacked", 8)
        assert (unpacked.prefix, unpacked.names) == (source.prefix, source.names)


def test_hidden_and_other_files_are_ignored(tmp_path):
    folder = make_tree(tmp_path / "photos", ["ash", "oak"])
    (folder / "ash" / "._0.png").write_bytes(b"resource fork")
    (folder / "ash" / "notes.txt").write_text("an ash")
    (folder / "__MACOSX" / "ash").mkdir(parents=True)
    (folder / "__MACOSX" / "ash" / "0.png").write_bytes(b"resource fork")
    (folder / ".cache").mkdir()
    (folder / "licence.txt").write_text("free")
    assert len(ImageFolder(folder, 8)) == 6


def test_first_half_of_the_sorted_classes_trains(tmp_path):
    splits = data.create(config_of(make_tree(tmp_path / "photos", list("fbdace"))))
    names = splits.train.source.class_names
    assert [names[i] for i in np.unique(splits.train.labels)] == ["a", "b", "c"]
    assert [names[i] for i in np.unique(splits.evaluation.labels)] == ["d", "e", "f"]
    assert splits.evaluation_name == "test" and splits.zero_shot


def test_explicit_train_and_test_folders(tmp_path):
    make_tree(tmp_path / "photos", ["z", "y"], prefix="train")
    folder = make_tree(tmp_path / "photos", ["a", "b", "c"], prefix="test")
    splits = data.create(config_of(folder))
    names = splits.train.source.class_names
    assert [names[i] for i in np.unique(splits.train.labels)] == ["y", "z"]
    assert [names[i] for i in np.unique(splits.evaluation.labels)] == ["a", "b", "c"]
    assert (len(splits.train), len(splits.evaluation)) == (6, 9)
    assert splits.zero_shot


def test_classes_shared_by_train_and_test_are_not_zero_shot(tmp_path):
    make_tree(tmp_path / "photos", ["ash", "oak"], prefix="train")
    folder = make_tree(tmp_path / "photos", ["ash", "oak"], prefix="test")
    assert not data.create(config_of(folder)).zero_shot


def test_validation_classes_come_from_the_training_half(tmp_path):
    folder = make_tree(tmp_path / "photos", list("abcdefghij"))
    splits = data.create(config_of(folder, validation_fraction=0.4))
    names = splits.train.source.class_names
    assert [names[i] for i in np.unique(splits.train.labels)] == ["a", "b", "c"]
    assert [names[i] for i in np.unique(splits.evaluation.labels)] == ["d", "e"]
    assert splits.evaluation_name == "validation"


def test_in_memory_gives_the_same(tmp_path):
    folder = make_tree(tmp_path / "photos", list("abcd"))
    kept = data.create(config_of(folder, in_memory=True)).evaluation
    read = data.create(config_of(folder)).evaluation
    for _ in range(2):
        np.testing.assert_array_equal(
            [kept[i] for i in range(6)], [read[i] for i in range(6)]
        )


def _empty_class(folder):
    make_tree(folder, ["ash", "oak"])
    (folder / "elm").mkdir()


def _loose(folder):
    make_tree(folder, ["ash", "oak"])
    (folder / "0.png").write_bytes(encoded(Image.new("RGB", (8, 8))))


def _loose_beside_parts(folder):
    for part in ("train", "test"):
        make_tree(folder, ["ash", "oak"], prefix=part)
    (folder / "0.png").write_bytes(encoded(Image.new("RGB", (8, 8))))


def _loose_in_a_wrapper(folder):
    _loose(folder / "trees")


def _no_class_in_train(folder):
    make_tree(folder, ["train", "test"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "does not exist"),
        (lambda folder: folder.mkdir(), "holds no images"),
        (lambda folder: make_tree(folder, ["ash"]), r"1 class\(es\); at least 2"),
        (_empty_class, "hold no image, the first is 'elm'"),
        (_loose, "1 image.s. outside any folder, as '0.png'; expected one folder a"),
        (_loose_beside_parts, "1 image.s. outside any folder, as '0.png'"),
        (_loose_in_a_wrapper, "1 class.*; 'trees/0.png' lies beside folders that may"),
        (_no_class_in_train, "train/ and test/ must hold class folders"),
        (lambda folder: folder.write_text("text"), "neither a folder nor a zip file"),
    ],
)
def test_bad_folders_are_refused(tmp_path, make, message):
    folder = tmp_path / "photos"
    make(folder)
    with pytest.raises(UserError, match=message):
        ImageFolder(folder, 8)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"path": ""}, "data.path is not set"),
        ({"name": "cub2000"}, "known are 'cub200', 'cars196', 'sop', 'inshop'"),
        ({"square": "circle"}, "known are 'centre', 'squeeze', 'pad'"),
        ({"name": "birds", "square": "circle"}, "known are 'centre', 'squeeze', 'pad'"),
        ({"name": "birds"}, "'birds' draws its images; .*=image_folder"),
        ({"box_crop": True}, "box_crop is for prepared data sets with boxes"),
        ({"name": "sop"}, "holds no prepared sop; make one with python -m"),
        ({"name": "sop", "path": ""}, "data.path is not set; give a prepared sop"),
        ({"load_size": 7}, "load_size = 7 is below data.image_size = 8"),
        ({"validation_fraction": 1.0}, "at least one class on either side"),
        ({"validation_fraction": -0.5}, "at least one class on either side"),
        ({"validation_fraction": 0.1}, "at least one class on either side"),
    ],
)
def test_bad_fields_are_refused(tmp_path, fields, message):
    config = config_of(make_tree(tmp_path / "photos", list("abcd")))
    config.update(fields)
    with pytest.raises(UserError, match=message):
        data.create(config)


def test_a_link_to_an_image_that_is_gone_is_told_when_it_is_read(tmp_path):
    folder = make_tree(tmp_path / "photos", ["ash", "oak"])
    (folder / "ash" / "9.png").symlink_to(tmp_path / "gone.png")
    source = ImageFolder(folder, 8)
    before = source.stamp
    with pytest.raises(UserError, match="ash/9.png.* Put a sound image of that name"):
        source[source.names.index("ash/9.png")]
    (tmp_path / "gone.png").write_bytes(encoded(Image.new("RGB", (8, 8))))
    assert source.stamp != before
