"""Folders as users have them: numbered, in parts, with other things among them."""

import logging
import os
import pathlib
import shutil
import tracemalloc
import zipfile

import numpy as np
import pytest
from PIL import Image

from abe_jax import data
from abe_jax.data.datasets.copies import count_copies
from abe_jax.data.datasets.image_folder import ImageFolder
from abe_jax.data.decoding import FORMATS, SUFFIXES
from abe_jax.errors import UserError
from configs import default


def write_image(path, colour=(9, 9, 9), size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, "PNG")


def make(root, classes, images=2):
    for number, name in enumerate(classes):
        for i in range(images):
            write_image(root / name / f"{i}.png", (number, i, 9))
    return root


def splits_of(path, **fields):
    config = default.get_config().data
    config.update(path=str(path), load_size=8, image_size=8, **fields)
    return data.create(config)


def classes_of(part):
    return [part.source.class_names[label] for label in np.unique(part.labels)]


@pytest.mark.parametrize(
    ("names", "ordered"),
    [
        (["1", "10", "11", "2"], ["1", "2", "10", "11"]),
        (["class1", "class10", "class2", "class9"], None),
        (["1.oak", "10_ash", "2-elm", "9 fir"], ["1.oak", "2-elm", "9 fir", "10_ash"]),
        (["001.a", "002.b", "010.c", "100.d"], ["001.a", "002.b", "010.c", "100.d"]),
        # No numbers, or not all: as text.
        (["1f600", "203c", "23e9", "9"], ["1f600", "203c", "23e9", "9"]),
        (["a10", "a9", "b", "c"], ["a10", "a9", "b", "c"]),
        (["a10", "a9", "b1", "b2"], ["a10", "a9", "b1", "b2"]),
    ],
)
def test_numbered_classes_go_by_their_numbers(names, ordered, tmp_path):
    source = ImageFolder(make(tmp_path / "photos", names), 8)
    expected = ordered or ["class1", "class2", "class9", "class10"]
    assert list(source.class_names) == expected
    for name, label in zip(source.names, source.labels, strict=True):
        assert name.split("/")[0] == source.class_names[label]
    splits = splits_of(tmp_path / "photos")
    assert classes_of(splits.train) == expected[:2]


def test_the_split_is_told_in_one_line(tmp_path, caplog):
    make(tmp_path / "photos", list("abcdef"))
    with caplog.at_level(logging.INFO):
        splits_of(tmp_path / "photos", validation_fraction=0.4)
    line = (
        "train: 2 classes, 'a' to 'b', 4 images; "
        "validation: 1 classes, 'c' to 'c', 2 images"
    )
    assert [record.getMessage() for record in caplog.records] == [line]


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train", "test"),
        ("Train", "Test"),
        ("training", "testing"),
        ("train", "val"),
        ("TRAIN", "Validation"),
        ("train", "valid"),
    ],
)
def test_usual_names_of_parts(train, test, tmp_path):
    make(tmp_path / "photos" / train, ["ash", "elm"])
    make(tmp_path / "photos" / test, ["fir", "oak", "yew"])
    splits = splits_of(tmp_path / "photos")
    assert classes_of(splits.train) == ["ash", "elm"]
    assert classes_of(splits.evaluation) == ["fir", "oak", "yew"]


def test_a_validation_part_beside_a_test_part_is_left_out_and_told(tmp_path, caplog):
    make(tmp_path / "photos" / "train", ["ash", "elm"])
    make(tmp_path / "photos" / "valid", ["box", "fig"])
    make(tmp_path / "photos" / "test", ["fir", "oak"])
    splits = splits_of(tmp_path / "photos")
    assert classes_of(splits.train) == ["ash", "elm"]
    assert classes_of(splits.evaluation) == ["fir", "oak"]
    assert "4 images of valid/ are neither trained on nor tested with" in caplog.text


def _beside_classes(root):
    for part in ("train", "val"):
        make(root / part, ["ash", "elm"])
    make(root, ["oak"])


def _two_of_a_kind(root):
    for part in ("train", "training", "test"):
        make(root / part, ["ash", "elm"])


def _other_names(root):
    for part in ("train", "dev", "query"):
        make(root / part, ["ash", "elm"])


def _no_training(root):
    for part in ("val", "test"):
        make(root / part, ["ash", "elm"])


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (
            _beside_classes,
            "train/ and val/, which are parts of a data set, beside 'oak'",
        ),
        (
            _other_names,
            "train/ with folders in it.*beside 'dev'; parts are called trai",
        ),
        (_two_of_a_kind, "train/ and training/ and test/; one part must be for train"),
        (_no_training, "val/ and test/; one part must be for training"),
    ],
)
def test_parts_that_do_not_fit_are_refused_by_name(write, message, tmp_path):
    write(tmp_path / "photos")
    with pytest.raises(UserError, match=message):
        ImageFolder(tmp_path / "photos", 8)


def test_a_class_may_be_called_train(tmp_path):
    make(tmp_path / "photos", ["bus", "car", "test", "train"])
    names = ("bus", "car", "test", "train")
    assert ImageFolder(tmp_path / "photos", 8).class_names == names
    shutil.rmtree(tmp_path / "photos" / "test")
    write_image(tmp_path / "photos" / "train" / "old" / "0.png")
    assert ImageFolder(tmp_path / "photos", 8).class_names == ("bus", "car", "train")


def test_thumbnails_of_network_drives_are_left_out_and_told(tmp_path, caplog):
    folder = make(tmp_path / "photos", ["ash", "oak"])
    for name in ("ash", "oak"):
        write_image(folder / name / "@eaDir" / "0.png" / "SYNOPHOTO_THUMB_SM.jpg")
    write_image(folder / "#recycle" / "0.png")
    assert ImageFolder(folder, 8).names == (
        *("ash/0.png", "ash/1.png", "oak/0.png", "oak/1.png"),
    )
    assert (
        "left out 3 system folders: '#recycle', 'ash/@eaDir', 'oak/@eaDir'"
        in caplog.text
    )
    caplog.clear()
    archive = shutil.make_archive(str(tmp_path / "photos"), "zip", folder)
    assert len(ImageFolder(archive, 8)) == 4
    assert "left out 3 system folders" in caplog.text


def test_the_workdir_of_a_run_among_the_classes_is_left_out_and_told(tmp_path, caplog):
    folder = make(tmp_path / "photos", ["ash", "oak"])
    run = folder / "my_run"
    (run / "checkpoints" / "100").mkdir(parents=True)
    (run / "config.json").write_text("{}")
    write_image(run / "checkpoints" / "picture.png")
    assert ImageFolder(folder, 8).class_names == ("ash", "oak")
    assert "left out 1 workdirs of runs: 'my_run'" in caplog.text


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_known_suffixes_are_those_of_formats_that_are_read(suffix):
    assert Image.registered_extensions()[suffix] in FORMATS


@pytest.mark.parametrize(
    ("name", "format"),
    [
        *(("0.jfif", "JPEG"), ("0.bmp", "BMP"), ("0.TIF", "TIFF"), ("0.gif", "GIF")),
        *(("0.jpe", "JPEG"), ("0.ppm", "PPM"), ("0.webp", "WEBP")),
    ],
)
def test_images_of_every_suffix_are_taken(name, format, tmp_path):
    folder = make(tmp_path / "photos", ["ash", "oak"])
    Image.new("RGB", (8, 8), (200, 30, 40)).save(folder / "elm", format)
    (folder / "elm").rename(folder / "ash" / name)
    source = ImageFolder(folder, 8)
    assert len(source) == 5
    image = source[source.names.index(f"ash/{name}")].astype(int)
    assert abs(image - [200, 30, 40]).max() < 8


def test_the_first_frame_of_a_moving_picture_is_taken(tmp_path):
    folder = make(tmp_path / "photos", ["ash", "oak"])
    first, second = (Image.new("RGB", (8, 8), c) for c in ("red", "blue"))
    first.save(folder / "ash" / "9.gif", save_all=True, append_images=[second])
    source = ImageFolder(folder, 8)
    assert source[2][0, 0].tolist() == [255, 0, 0]


def test_what_is_left_out_is_counted_by_suffix(tmp_path, caplog):
    folder = make(tmp_path / "photos", ["ash", "oak"])
    for name in ("1.heic", "2.HEIC", "3.mp4", "4"):
        (folder / "oak" / name).write_bytes(b"x")
    (folder / "licence.txt").write_text("free")
    assert len(ImageFolder(folder, 8)) == 4
    line = "4 files beside the images are left out: 2 .heic, 1 .mp4, 1 without a suffix"
    assert line in caplog.text


def test_a_class_with_nothing_left_says_what_it_holds(tmp_path):
    folder = make(tmp_path / "photos", ["ash", "oak"])
    (folder / "elm").mkdir()
    (folder / "elm" / "1.heic").write_bytes(b"x")
    with pytest.raises(UserError, match=r"'elm' \(1 .heic\); images end in .*Put im"):
        ImageFolder(folder, 8)


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_messages_name_the_outer_folders(kind, tmp_path):
    folder = make(tmp_path / "outer" / "photos", ["ash", "oak"])
    (folder / "ash" / "0.png").write_bytes(b"broken")
    path = tmp_path / "outer"
    if kind == "zip":
        path = pathlib.Path(shutil.make_archive(str(path), "zip", path))
    with pytest.raises(UserError, match=f"cannot read {path}/photos/ash/0.png as an"):
        ImageFolder(path, 8)[0]
    (folder / "elm").mkdir()
    with pytest.raises(UserError, match=r"outer/photos hold no image, .* is 'elm'"):
        ImageFolder(tmp_path / "outer", 8)


def test_links_to_class_folders_are_followed_but_not_in_circles(tmp_path, caplog):
    make(tmp_path / "elsewhere", ["ash", "oak"])
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("ash", "oak"):
        (folder / name).symlink_to(tmp_path / "elsewhere" / name)
    (tmp_path / "elsewhere" / "ash" / "up").symlink_to(folder)
    assert len(ImageFolder(folder, 8)) == 4
    assert "left out 1 links to folders that they are in: 'ash/up'" in caplog.text


def test_a_link_to_a_class_folder_that_is_gone_is_told(tmp_path, caplog):
    folder = make(tmp_path / "photos", ["ash", "oak"])
    (folder / "fir").symlink_to(tmp_path / "nothing")
    assert len(ImageFolder(folder, 8)) == 4
    assert "left out 1 links to what is not there: 'fir'" in caplog.text


def test_links_to_themselves_are_left_out(tmp_path, caplog):
    folder = make(tmp_path / "photos", ["ash", "oak"])
    (folder / "loop").symlink_to("loop")
    (folder / "ash" / "loop").symlink_to("loop")
    assert len(ImageFolder(folder, 8)) == 4
    assert "left out 2 links to what is not there: 'loop', 'ash/loop'" in caplog.text


def test_pipes_are_not_waited_for(tmp_path, caplog):
    folder = make(tmp_path / "photos", ["ash", "oak"])
    os.mkfifo(folder / "ash" / "7.png")
    assert len(ImageFolder(folder, 8)) == 4
    assert "left out 1 pipes or devices: 'ash/7.png'" in caplog.text


def test_an_unreadable_class_folder_is_not_taken_for_an_empty_one(tmp_path, unreadable):
    folder = make(tmp_path / "photos", ["ash", "elm", "oak"])
    unreadable("elm")
    with pytest.raises(UserError, match="cannot read the folder '.*elm'.*make it read"):
        ImageFolder(folder, 8)


def test_copies_are_found_in_little_memory(tmp_path):
    """Of a million images of one size, such as bitmaps, too."""
    paths = [str(tmp_path / str(number)) for number in range(200)]
    for number, path in enumerate(paths):
        pathlib.Path(path).write_bytes(number.to_bytes() * 5000)
    tracemalloc.start()
    try:
        assert count_copies(paths, paths[:100]) == 100
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 2**19  # most of it the buffer that a file is read into


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_copies_of_training_images_are_counted(kind, tmp_path, caplog):
    folder = make(tmp_path / "photos", list("abcd"))
    splits_of(folder)
    assert "copies" not in caplog.text
    shutil.copy(folder / "a" / "0.png", folder / "d" / "8.png")
    shutil.copy(folder / "a" / "0.png", folder / "d" / "9.png")
    shutil.copy(folder / "b" / "0.png", folder / "a" / "9.png")  # both are trained on
    # Of one size, and yet no copy.
    other = bytearray((folder / "a" / "1.png").read_bytes())
    other[-20] ^= 1
    (folder / "c" / "9.png").write_bytes(other)
    path = folder
    if kind == "zip":
        path = shutil.make_archive(str(tmp_path / "photos"), "zip", folder)
    splits_of(path)
    assert "2 of the 7 images to evaluate are copies of training images" in caplog.text


def test_a_damaged_member_of_a_zip_file_is_one_line(tmp_path):
    folder = make(tmp_path / "photos", ["ash", "oak"])
    noise = np.random.default_rng(0).integers(0, 9, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(folder / "ash" / "0.png", compress_level=0)
    path = tmp_path / "photos.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*.png")):
            archive.write(file, file.relative_to(folder))
    content = bytearray(path.read_bytes())
    start = 30 + len("ash/0.png")  # of the deflated bytes
    content[start : start + 9] = b"\xff" * 9
    path.write_bytes(content)
    with pytest.raises(UserError, match="cannot read ash/0.png in .*photos.zip: "):
        ImageFolder(path, 8)[0]
