"""What a run knows of its data: enough to notice that it is another one."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from abe_jax import data
from abe_jax.errors import UserError
from configs import default


def make(root, classes, images=3):
    for name in classes:
        (root / name).mkdir(parents=True)
        for number in range(images):
            Image.new("RGB", (8, 8), (9, number, 9)).save(root / name / f"{number}.png")
    return root


def splits_of(path, **fields):
    config = default.get_config().data
    config.update(path=str(path), load_size=8, image_size=8, **fields)
    return data.create(config)


@pytest.fixture
def photos_of_four(tmp_path):
    return make(tmp_path / "photos", ["ash", "elm", "fir", "oak"])


def test_a_description_names_classes_and_counts(photos_of_four):
    description = splits_of(photos_of_four).description()
    assert description["classes"] == {
        "train": {"ash": 3, "elm": 3},
        "test": {"fir": 3, "oak": 3},
    }
    assert json.loads(json.dumps(description)) == description


def test_the_path_does_not_matter(photos_of_four, tmp_path):
    moved = tmp_path / "elsewhere" / "pictures"
    shutil.copytree(photos_of_four, moved)
    archive = shutil.make_archive(str(tmp_path / "packed"), "zip", photos_of_four)
    descriptions = [
        splits_of(path, **fields).description()
        for path in (photos_of_four, moved, archive)
        for fields in ({}, {"in_memory": True})
    ]
    assert all(d == descriptions[0] for d in descriptions)


def test_a_prepared_folder_differs_in_its_pixels_only(data_dir, photos):
    made, unmade = (splits_of(p).description() for p in (data_dir, photos))
    assert made["fingerprint"] == unmade["fingerprint"]
    assert data.differences(unmade, made) == [
        "pixels: image files as they are there, JPEG, short side 256, quality 95 now"
    ]


@pytest.mark.parametrize("name", ["birds", "cub200", "inshop"])
def test_every_source_has_one(name, data_dir):
    config = default.get_config().data
    path = "" if name == "birds" else str(data_dir)
    config.update(name=name, path=path, load_size=36, image_size=32)
    splits = data.create(config)
    description = splits.description()
    for part, subset in splits.parts.items():
        counts = description["classes"][part]
        assert sum(counts.values()) == len(subset)
        assert len(counts) == len(np.unique(subset.labels))
    assert ("gallery" in description["classes"]) == (name == "inshop")


def test_new_classes_in_front_are_seen(photos_of_four):
    before = splits_of(photos_of_four).description()
    make(photos_of_four, ["aaa", "aab"])
    splits = splits_of(photos_of_four)
    now = splits.description()
    assert before["fingerprint"] != now["fingerprint"]
    assert data.differences(before, now) == [
        "train: 1 class(es) no longer, 'elm'",
        "train: 2 class(es) new, 'aaa', 'aab'",
        "test: 1 class(es) new, 'elm'",
    ]
    # Of those that are evaluated now, one was trained on.
    assert splits.seen(before["classes"]["train"]) == ["elm"]
    assert splits.seen(now["classes"]["train"]) == []


def _one_more(root):
    shutil.copy(root / "elm" / "0.png", root / "elm" / "9.png")


def _another_name(root):
    (root / "oak" / "0.png").rename(root / "oak" / "00.png")


def _another_class(root):
    (root / "oak").rename(root / "pine")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_one_more, "train: 1 class(es) of another number of images, 'elm' had 3 and"),
        (_another_name, "files of other names, or in another order"),
        (_another_class, "test: 1 class(es) no longer, 'oak'"),
    ],
)
def test_any_change_of_the_list_is_told(change, told, photos_of_four):
    before = splits_of(photos_of_four).description()
    assert data.differences(before, before) == []
    change(photos_of_four)
    now = splits_of(photos_of_four).description()
    assert before["fingerprint"] != now["fingerprint"]
    assert data.differences(before, now)[0].startswith(told)


def test_classes_of_one_image_each_are_not_evaluated(tmp_path):
    make(tmp_path / "photos" / "train", ["ash", "elm"])
    make(tmp_path / "photos" / "test", ["fir", "oak"], images=1)
    with pytest.raises(UserError, match="no class of the test part has two images, or"):
        splits_of(tmp_path / "photos")


@pytest.mark.parametrize(("empty", "full"), [("test", "train"), ("train", "test")])
def test_a_part_without_images_is_refused(empty, full, tmp_path):
    make(tmp_path / "photos" / full, ["ash", "elm"])
    (tmp_path / "photos" / empty).mkdir()
    (tmp_path / "photos" / empty / "notes.txt").write_text("nothing yet")
    with pytest.raises(UserError, match=f"holds no images in its {empty} part; put"):
        splits_of(tmp_path / "photos")
