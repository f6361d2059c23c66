"""A data set that is there already is what its source would make, or is refused."""

import json
import os
import pathlib
import shutil
import zipfile

import fake_datasets as fake
import pytest
from PIL import Image

from abe_jax.data import prepared
from abe_jax.data.prepare import builders
from abe_jax.data.prepare.encoding import Storing
from abe_jax.errors import UserError
from abe_jax.prepare import prepare


def prepared_twice(tmp_path, change, **options):
    fake.class_folders(tmp_path / "photos")
    source = tmp_path / "photos"
    prepare("image_folder", source, tmp_path / "data")
    before = fake.contents(tmp_path / "data")
    source = change(source) or source
    try:
        return prepare("image_folder", source, tmp_path / "data", **options)
    finally:
        assert fake.contents(tmp_path / "data") == before


def _another(source):
    return fake.class_folders(source.with_name("others"), ["ash", "elm", "fir", "yew"])


def _new_image(source):
    shutil.copy(source / "ash" / "0.jpg", source / "ash" / "2.jpg")


def _gone_image(source):
    (source / "ash" / "0.jpg").unlink()


def _larger_image(source):
    Image.new("RGB", (30, 16)).save(source / "elm" / "1.jpg", quality=30)


def _image_of_the_same_size(source):
    path = source / "elm" / "1.jpg"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def _link_to_nothing(source):
    path = source / "elm" / "1.jpg"
    path.unlink()
    path.symlink_to("gone.jpg")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_another, "others holds now: 2 new, 'yew/0.jpg' ...; 2 gone, 'oak/0.jpg' ..."),
        (_new_image, "photos holds now: 1 new, 'ash/2.jpg'. Delete it or choose"),
        (_gone_image, "holds now: 1 gone, 'ash/0.jpg'"),
        (_larger_image, "holds now: 1 changed, 'elm/1.jpg'"),
        (_image_of_the_same_size, "holds now: 1 changed, 'elm/1.jpg'"),
        (_link_to_nothing, "holds now: 1 changed, 'elm/1.jpg'"),
    ],
)
def test_another_source_is_not_taken_for_prepared(change, message, tmp_path):
    with pytest.raises(UserError) as caught:
        prepared_twice(tmp_path, change)
    assert message in str(caught.value)


@pytest.mark.parametrize("change", [_new_image, _image_of_the_same_size])
def test_what_changes_while_images_are_encoded_is_not_taken_for_prepared(
    change, tmp_path, monkeypatch
):
    photos = fake.class_folders(tmp_path / "photos")
    encode_files = builders.encode_files

    def encode_and_change(*args):
        encoded = list(encode_files(*args))
        change(photos)
        yield from encoded

    monkeypatch.setattr(builders, "encode_files", encode_and_change)
    prepare("image_folder", photos, tmp_path / "data")
    with pytest.raises(UserError, match="holds now: 1 (new, 'ash/2|changed, 'elm/1)"):
        prepare("image_folder", photos, tmp_path / "data")


def test_a_bad_file_that_was_left_out_and_is_mended_is_not_taken_for_prepared(tmp_path):
    photos = fake.class_folders(tmp_path / "photos")
    path = photos / "ash" / "0.jpg"
    whole = path.read_bytes()
    path.write_bytes(bytes(len(whole)))  # as a download leaves it that was cut short
    arguments = ("image_folder", photos, tmp_path / "data")
    for beginning in ("layout: ", "already prepared"):
        assert prepare(*arguments, skip_bad=True).startswith(beginning)
    path.write_bytes(whole)
    with pytest.raises(UserError, match="holds now: 1 changed, 'ash/0.jpg'"):
        prepare(*arguments, skip_bad=True)


def test_another_quality_is_not_taken_for_prepared(tmp_path):
    with pytest.raises(UserError, match="256 and quality 95, not with .* quality 50"):
        prepared_twice(tmp_path, lambda source: None, storing=Storing(quality=50))


def test_a_size_that_is_not_applied_is_not_compared(tmp_path):
    photos = fake.class_folders(tmp_path / "photos")
    for size, beginning in ((256, "layout: "), (64, "already prepared")):
        storing = Storing(size, keep_original=True)
        text = prepare("image_folder", photos, tmp_path / "data", storing=storing)
        assert text.startswith(beginning)


def test_a_copy_of_the_source_is_the_same(tmp_path):
    def copy(source):
        return shutil.copytree(source, source.with_name("copy"), copy_function=_copy)

    def _copy(source, target):
        shutil.copyfile(source, target)  # with the times of now

    assert prepared_twice(tmp_path, copy).startswith("already prepared")


def test_an_archive_is_known_again_by_its_content(tmp_path):
    photos = fake.class_folders(tmp_path / "photos")
    path = shutil.make_archive(str(tmp_path / "photos"), "zip", photos)
    prepare("image_folder", path, tmp_path / "data")
    renamed = pathlib.Path(path).rename(tmp_path / "pictures.zip")
    text = prepare("image_folder", renamed, tmp_path / "data")
    assert text.startswith("already prepared")
    with zipfile.ZipFile(renamed, "a") as archive:
        archive.writestr("ash/7.jpg", (photos / "ash" / "0.jpg").read_bytes())
    with pytest.raises(UserError, match="1 changed"):
        prepare("image_folder", renamed, tmp_path / "data")


def test_films_among_the_photos_are_known_again_by_their_size(tmp_path):
    """To read 200 GB of them would take hours."""
    photos = fake.class_folders(tmp_path / "photos")
    (photos / "notes.txt").write_text("in May")
    (photos / "film.mp4").touch()
    os.truncate(photos / "film.mp4", 2**26 + 1)
    prepare("image_folder", photos, tmp_path / "data")
    folder = prepared.find(tmp_path / "data", "image_folder")
    noted = json.loads((folder / "origin.json").read_text())["files"]
    assert noted["film.mp4"] == [2**26 + 1, None] and noted["notes.txt"][1]
    os.truncate(photos / "film.mp4", 2**26)
    with pytest.raises(UserError, match="1 changed, 'film.mp4'"):
        prepare("image_folder", photos, tmp_path / "data")
