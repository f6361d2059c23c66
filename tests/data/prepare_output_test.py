"""Where `prepare` writes: nothing of a user's is deleted, nothing stale believed."""

import os
import shutil

import fake_datasets as fake
import pytest
import tensorflow_datasets as tfds
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from abe_jax import data
from abe_jax.data import prepared
from abe_jax.data.prepare import builders, output
from abe_jax.errors import UserError
from abe_jax.prepare import prepare
from configs import default

NAMES = st.sampled_from(
    [
        *("incomplete_ferns", "incomplete.AB12CD_1.0.0", "unpacked.incomplete"),
        *("image_folder", "1.0.0", "downloads", "unfinished.abe_jax", "ash", "10"),
        *("train", "a b", "neu\nzeile", "\udcff", "*", "[a]", "..ferns", "lock"),
    ]
)
# Where the images are, and where they are to go, below one folder: mostly apart.
SOURCES = st.sampled_from(["d", "d/image_folder", "d/image_folder/1.0.0", "e/d", "."])
DATA_DIRS = st.sampled_from(["f", "f/d", "e", "e/f", "d", "d/image_folder"])


def test_nothing_of_a_users_is_ever_deleted(tmp_path_factory, monkeypatch):
    fake.store_nothing(monkeypatch)
    ended = {"prepared": 0, "refused": 0}

    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(
        names=st.lists(NAMES, min_size=2, max_size=5, unique=True),
        source=SOURCES,
        data_dir=DATA_DIRS,
        others=st.dictionaries(
            st.sampled_from(
                [
                    *(".lock", "incomplete/x", "unfinished.abe_jax/x", "1.0.0/x", "x"),
                    *("unpacked.incomplete/x", "downloads/x", "incomplete.1_1.0.0/x"),
                ]
            ),
            st.binary(max_size=3),
            max_size=2,
        ),
        again=st.booleans(),
    )
    def prepared_or_refused(names, source, data_dir, others, again):
        root = tmp_path_factory.mktemp("disk")
        folder = root / data_dir / "image_folder"
        for number, name in enumerate(names):
            fake.write(root / source, f"{name}/{number}.jpg", b"image")
        for name, content in others.items():
            fake.write(folder, name, content)
        before = fake.contents(root)
        for _ in range(1 + again):
            try:
                prepare("image_folder", root / source, root / data_dir)
                ended["prepared"] += 1
            except UserError:
                ended["refused"] += 1
            now = fake.contents(root)
            if not (folder / "1.0.0" / "index.npz").exists():
                new = {p.name for p in now.keys() - before.keys()}
                assert new <= {".lock"}  # beside what was there
            assert {path: now.get(path, "gone") for path in before} == before

    prepared_or_refused()
    assert ended["prepared"] > ended["refused"] > 0, ended


@pytest.mark.parametrize(
    ("source", "data_dir", "message"),
    [
        ("d/image_folder", "d", "--source .* lies inside .*d/image_folder', where the"),
        ("d/image_folder/photos", "d", "--source .* lies inside"),
        ("d", "d", "image_folder', where .* would be written, lies inside --source"),
        ("d", "d/prepared", "would be written, lies inside --source .*outside of it"),
        ("link", "d", "lies inside"),
    ],
)
def test_source_and_output_inside_each_other_are_refused(
    source, data_dir, message, tmp_path
):
    (tmp_path / "d").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "d")
    fake.class_folders(tmp_path / source, ["incomplete_ferns", "ash", "elm"])
    before = fake.contents(tmp_path)
    with pytest.raises(UserError, match=message):
        prepare("image_folder", tmp_path / source, tmp_path / data_dir)
    assert fake.contents(tmp_path) == before


@pytest.mark.parametrize("deep", ["data", "a/b/data"])
def test_a_refusal_leaves_no_folder_behind(deep, tmp_path):
    fake.class_folders(tmp_path / "photos", ["ash"])
    with pytest.raises(UserError, match="at least 2"):
        prepare("image_folder", tmp_path / "photos", tmp_path / deep)
    assert [p.name for p in tmp_path.iterdir()] == ["photos"]
    fake.class_folders(tmp_path / "photos", ["elm"])
    prepare("image_folder", tmp_path / "photos", tmp_path / deep)


def test_a_folder_like_ours_that_is_not_ours_is_refused(tmp_path):
    fake.class_folders(tmp_path / "photos")
    other = tmp_path / "data" / "image_folder" / output.UNFINISHED
    other.mkdir(parents=True)
    (other / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="was not made by this program; move it"):
        prepare("image_folder", tmp_path / "photos", tmp_path / "data")
    assert (other / "thesis.tex").read_text() == "years of work"


def test_an_interrupted_cleaning_is_gone_on_with(tmp_path, monkeypatch):
    work = tmp_path / output.UNFINISHED
    rmdir, left = os.rmdir, [None] * 19

    def interrupted(*args, **kwargs):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        rmdir(*args, **kwargs)

    for number in range(20):  # whatever their order on the disk is
        (work / str(number)).mkdir(parents=True)
        if number == 10:
            (work / output._MARK).touch()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "rmdir", interrupted)
        with output.unfinished(tmp_path):
            pass
    assert len(list(work.glob("*/"))) == 1
    with output.unfinished(tmp_path):
        assert os.listdir(work) == [output._MARK]
    assert os.listdir(tmp_path) == []


def test_names_with_line_breaks_and_of_no_utf_8(tmp_path):
    names = ["a\nb", "c", "d\udcff", "e"]
    fake.class_folders(tmp_path / "photos", names)
    (tmp_path / "photos" / "c" / "bad\udcfe\n.jpg").write_bytes(b"no image")
    text = prepare(
        "image_folder", tmp_path / "photos", tmp_path / "data", skip_bad=True
    )
    shown = r"c/bad\xfe\x0a.jpg"
    assert (
        f"left out: {shown} (not an image of a known format)"
        in text.encode("utf-8").decode().splitlines()
    )
    folder = prepared.find(tmp_path / "data", "image_folder")
    listed = (folder / "bad_files.txt").read_text("utf-8").splitlines()
    assert listed == [f"{shown}\tnot an image of a known format"]
    config = default.get_config().data
    config.update(path=str(tmp_path / "data"), load_size=16, image_size=16)
    made = data.create(config)
    config.path = str(tmp_path / "photos")
    (tmp_path / "photos" / "c" / "bad\udcfe\n.jpg").unlink()
    unmade = data.create(config)
    assert made.train.source.class_names == tuple(names)
    assert made.description()["classes"] == unmade.description()["classes"]
    assert made.description()["fingerprint"] == unmade.description()["fingerprint"]


def test_a_data_dir_that_is_no_utf_8_is_refused(tmp_path):
    fake.class_folders(tmp_path / "photos")
    with pytest.raises(UserError, match="--data_dir '.*xff' is no UTF-8; choose"):
        prepare("image_folder", tmp_path / "photos", tmp_path / "d\udcff")
    assert [p.name for p in tmp_path.iterdir()] == ["photos"]


def test_records_that_changed_on_their_way_to_the_disk_are_noticed(
    tmp_path, monkeypatch
):
    fake.class_folders(tmp_path / "photos")
    add = tfds.core.SequentialWriter.add_examples
    other = (tmp_path / "photos" / "ash" / "1.jpg").read_bytes()

    def exchange(self, examples):
        for chunk in examples.values():
            chunk[:1] = [{**example, "image": other} for example in chunk[:1]]
        add(self, examples)

    monkeypatch.setattr(tfds.core.SequentialWriter, "add_examples", exchange)
    with pytest.raises(UserError, match="is not what was written there; is the disk"):
        prepare("image_folder", tmp_path / "photos", tmp_path / "data")
    assert [p.name for p in tmp_path.iterdir()] == ["photos"]


def test_a_file_of_records_that_was_damaged_at_once_is_noticed(tmp_path, monkeypatch):
    fake.class_folders(tmp_path / "photos", images=9)
    read_back = builders._read_back

    def damage(path):
        content = bytearray(path.read_bytes())
        used = [i for i, byte in enumerate(content) if byte]  # most is filled up
        for i in used[len(used) // 2 :][:99]:
            content[i] ^= 255
        path.write_bytes(content)
        return read_back(path)

    monkeypatch.setattr(builders, "_read_back", damage)
    with pytest.raises(UserError, match="cannot read back|not what was written"):
        prepare("image_folder", tmp_path / "photos", tmp_path / "data")
    assert [p.name for p in tmp_path.iterdir()] == ["photos"]


def test_a_set_whose_origin_is_not_noted_is_refused(tmp_path):
    fake.class_folders(tmp_path / "photos")
    prepare("image_folder", tmp_path / "photos", tmp_path / "data")
    (prepared.find(tmp_path / "data", "image_folder") / "origin.json").unlink()
    with pytest.raises(UserError, match=r"origin\.json.*delete .* prepare it again"):
        prepare("image_folder", tmp_path / "photos", tmp_path / "data")


@pytest.mark.parametrize("flag", ["--source", "--data_dir"])
def test_remote_paths_are_refused_and_home_is_found(flag, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    fake.class_folders(tmp_path / "photos")
    paths = {"--source": "~/photos", "--data_dir": "~/data"}
    remote = paths | {flag: "gs://bucket/photos"}
    with pytest.raises(UserError, match=f"{flag}=gs://bucket/photos is a remote path"):
        prepare("image_folder", *remote.values())
    assert os.listdir(tmp_path) == ["photos"]
    prepare("image_folder", *paths.values())
    assert sorted(os.listdir(tmp_path)) == ["data", "photos"]
    config = default.get_config().data
    config.update(path="~/data", load_size=16, image_size=16)
    assert len(data.create(config).train) == 4
    config.path = "~/photos"
    assert len(data.create(config).train) == 4


def test_images_of_every_suffix_are_stored_and_the_rest_is_told(tmp_path, caplog):
    source = fake.class_folders(tmp_path / "photos")
    for suffix, form in {"jfif": "JPEG", "bmp": "BMP", "tif": "TIFF"}.items():
        Image.new("RGB", (20, 16), (9, len(suffix), 3)).save(
            source / "ash" / f"9.{suffix}", form
        )
    (source / "ash" / "9.heic").write_bytes(b"x")
    prepare("image_folder", source, tmp_path / "out")
    stored = prepared.PreparedRecords(
        prepared.find(tmp_path / "out", "image_folder"), 16
    )
    assert len(stored) == 8 + 3
    assert "left out: 1 .heic" in caplog.text


def test_a_link_to_an_image_that_is_gone_may_be_left_out(tmp_path):
    photos = fake.class_folders(tmp_path / "photos", ["ash", "oak"])
    (photos / "ash" / "9.jpg").symlink_to(tmp_path / "gone.jpg")
    arguments = ("image_folder", photos, tmp_path / "data")
    with pytest.raises(UserError, match="ash/9.jpg"):
        prepare(*arguments)
    assert "left out: ash/9.jpg" in prepare(*arguments, skip_bad=True)
    assert "already prepared" in prepare(*arguments, skip_bad=True)
    shutil.copy(photos / "ash" / "0.jpg", tmp_path / "gone.jpg")
    with pytest.raises(UserError, match="1 changed, 'ash/9.jpg'"):
        prepare(*arguments, skip_bad=True)


@pytest.mark.parametrize("part", ["all", "train"])
def test_where_nothing_is_left_nothing_is_prepared(part, tmp_path):
    photos = fake.class_folders(tmp_path / "photos")
    bad = list(photos.rglob("*.jpg") if part == "all" else photos.rglob("[ae]*/*.jpg"))
    for path in bad:
        path.write_text("<html>")
    with pytest.raises(UserError, match="no image of the 'train' part can be used; th"):
        prepare("image_folder", photos, tmp_path / "data", skip_bad=True)
    assert not list((tmp_path / "data").rglob("index.npz"))
