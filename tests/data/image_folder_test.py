"""Folders and zip files of every kind of image that users have."""

import io
import pickle
import zipfile

import numpy as np
import pytest
from PIL import Image

from abe_jax import data
from abe_jax.data.image_folder import ImageFolder, decode
from abe_jax.errors import UserError
from configs import default

RED = (200, 30, 40)


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


def make_zip(folder, path):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder.parent))
    return path


def config_of(path, **fields):
    config = default.get_config().data
    config.update(path=str(path), load_size=8, image_size=8, **fields)
    return config


def assert_close(image, colour, tolerance=4):
    assert image.dtype == np.uint8 and image.shape[-1] == 3
    assert np.abs(image.reshape(-1, 3).mean(0) - colour).max() <= tolerance


@pytest.mark.parametrize(
    ("image", "options", "colour"),
    [
        (Image.new("RGB", (9, 9), RED), {}, RED),
        (Image.new("RGB", (9, 9), RED), {"format": "JPEG", "quality": 95}, RED),
        (Image.new("RGB", (9, 9), RED), {"format": "WEBP", "quality": 95}, RED),
        (Image.new("L", (9, 9), 90), {}, (90, 90, 90)),
        (Image.new("L", (9, 9), 90), {"format": "JPEG"}, (90, 90, 90)),
        (Image.new("1", (9, 9), 1), {}, (255, 255, 255)),
        (Image.new("RGB", (9, 9), RED).quantize(4), {}, RED),
        (Image.new("RGBA", (9, 9), (*RED, 255)), {}, RED),
        (Image.new("RGBA", (9, 9), (*RED, 0)), {}, (255, 255, 255)),
        (Image.new("RGBA", (9, 9), (0, 0, 0, 128)), {}, (127, 127, 127)),
        (Image.new("LA", (9, 9), (90, 0)), {}, (255, 255, 255)),
        (Image.new("CMYK", (9, 9), (0, 255, 255, 0)), {"format": "JPEG"}, (254, 0, 0)),
        (
            Image.fromarray(np.full((9, 9), 90 * 257, np.uint16)),
            {},
            (90, 90, 90),
        ),
    ],
    ids=lambda value: getattr(value, "mode", None),
)
def test_becomes_rgb(image, options, colour):
    pixels = decode(encoded(image, **options), 9, "it")
    assert_close(pixels, colour)


def test_transparent_palette_lies_over_white():
    image = Image.new("P", (9, 9), 0)
    image.putpalette([*RED, 0, 0, 0])
    assert_close(decode(encoded(image, transparency=0), 9, "it"), (255, 255, 255))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(orientation):
    upright = Image.new("RGB", (16, 16), "black")
    upright.paste(RED, (0, 0, 8, 8))  # upper left, seen the right way up
    turn = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }.get(orientation)
    stored = upright if turn is None else upright.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = decode(encoded(stored, "PNG", exif=exif), 16, "it")
    assert_close(pixels[1:7, 1:7], RED)
    assert_close(pixels[9:, 9:], (0, 0, 0))


@pytest.mark.parametrize("size", [(64, 32), (32, 64), (1, 1), (3, 1000), (500, 2)])
def test_square_is_the_middle(size):
    image = Image.new("RGB", size, RED)
    assert_close(decode(encoded(image), 16, "it"), RED)
    assert decode(encoded(image), 16, "it").shape == (16, 16, 3)


def test_middle_not_side_is_kept():
    image = Image.new("RGB", (60, 20), "black")
    image.paste(RED, (20, 0, 40, 20))
    assert_close(decode(encoded(image), 20, "it"), RED)


def test_squeeze_keeps_all_and_loses_the_aspect():
    image = Image.new("RGB", (60, 20), "black")
    image.paste(RED, (20, 0, 40, 20))
    pixels = decode(encoded(image), 18, "it", square="squeeze")
    assert_close(pixels[:, 7:11], RED)
    assert_close(pixels[:, :5], (0, 0, 0))
    assert_close(pixels[:, 13:], (0, 0, 0))


def test_box_is_taken_before_the_square():
    image = Image.new("RGB", (60, 20), "black")
    image.paste(RED, (0, 10, 10, 20))
    box = (0.5, 0.0, 1.0, 1 / 6)
    assert_close(decode(encoded(image), 10, "it", box=box), RED)
    whole = (0.0, 0.0, 1.0, 1.0)
    np.testing.assert_array_equal(
        decode(encoded(image), 20, "it", box=whole), decode(encoded(image), 20, "it")
    )


def test_short_side_of_the_size_is_only_cut():
    pixels = np.random.default_rng(0).integers(0, 256, (12, 31, 3), np.uint8)
    np.testing.assert_array_equal(
        decode(encoded(Image.fromarray(pixels)), 12, "it"), pixels[:, 9:21]
    )


def test_same_size_is_untouched():
    pixels = np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8)
    np.testing.assert_array_equal(
        decode(encoded(Image.fromarray(pixels)), 12, "it"), pixels
    )


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n"])
def test_unreadable_image_is_named(content):
    with pytest.raises(UserError, match="cannot read ash/1.png as an image"):
        decode(content, 8, "ash/1.png")


def test_truncated_image_is_named():
    pixels = np.random.default_rng(0).integers(0, 256, (99, 99, 3), np.uint8)
    content = encoded(Image.fromarray(pixels), "JPEG")
    with pytest.raises(UserError, match="cannot read it as an image"):
        decode(content[: len(content) // 2], 8, "it")


def test_decompression_bomb_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UserError, match="cannot read it as an image"):
        decode(encoded(Image.new("RGB", (99, 99))), 8, "it")


@pytest.mark.parametrize("kind", ["folder", "zip", "wrapped zip"])
def test_folder_and_zip_hold_the_same(tmp_path, kind):
    classes = ["oak", "ash", "elm", "fir"]
    inner = "" if kind != "wrapped zip" else "trees"
    folder = make_tree(tmp_path / "photos", classes, prefix=inner)
    path = folder if kind == "folder" else make_zip(folder, tmp_path / "photos.zip")
    source = ImageFolder(path, 8)
    assert source.class_names == ("ash", "elm", "fir", "oak")
    assert len(source) == 12
    assert source.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert source.names[:2] == ("ash/0.png", "ash/1.png")
    np.testing.assert_array_equal(source[1], np.full((8, 8, 3), (40, 10, 77)))
    again = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(again[11], source[11])


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


def _no_class_in_train(folder):
    make_tree(folder, ["train", "test"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "does not exist"),
        (lambda folder: folder.mkdir(), "holds no images"),
        (lambda folder: make_tree(folder, ["ash"]), r"1 class\(es\); at least 2"),
        (_empty_class, "hold no image, the first is 'elm'"),
        (_loose, "image.s. outside any folder"),
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
        ({"name": "cub2000"}, "known are 'birds', 'image_folder', 'cub200'"),
        ({"square": "circle"}, "known are 'centre' and 'squeeze'"),
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
