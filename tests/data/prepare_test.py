"""`python -m abe_jax.prepare`: whole data sets or none, and one line for a mistake."""

import errno
import fcntl
import io
import json
import multiprocessing
import pathlib
import shutil
import signal
import time
from functools import partial

import command_line
import fake_datasets as fake
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from abe_jax.data import prepared
from abe_jax.data.datasets import DATASETS
from abe_jax.data.prepare import builders, layouts
from abe_jax.data.prepare.encoding import Storing
from abe_jax.errors import UserError
from abe_jax.prepare import prepare


def prepare_small(dataset, source, data_dir, **options):
    return prepare(dataset, source, data_dir, expected=fake.SMALL[dataset], **options)


@pytest.mark.parametrize("layout", fake.LAYOUTS)
def test_every_layout_is_stored_whole(layout, tmp_path):
    dataset, write, words = fake.LAYOUTS[layout]
    write(tmp_path / "source", fake.SMALL[dataset])
    text = prepare_small(dataset, tmp_path / "source", tmp_path / "data")
    assert words in text
    listing = layouts.read(
        DATASETS[dataset],
        tmp_path / "source",
        tmp_path / "scratch",
        fake.SMALL[dataset],
    )
    folder = prepared.find(tmp_path / "data", dataset)
    records = prepared.PreparedRecords(folder, 16)
    assert len(records) == len(listing.records)
    assert records.class_names == tuple(listing.class_names.values())
    classes = list(listing.class_names)
    for number, record in enumerate(listing.records):
        assert records.names[number] == record.name
        assert records.roles[number] == record.role
        assert classes[records.labels[number]] == record.class_id
        assert records.jpeg(number) == pathlib.Path(record.path).read_bytes()


# One layout a reader and what is read otherwise; `datasets_test` lists all in full.
FULL = ("cub200", "cars196 form A", "cars196 parquet", "sop", "inshop")


@pytest.mark.parametrize(
    "layout",
    [
        # 11,788 images; the others have 213,000.
        pytest.param(
            x, marks=pytest.mark.slow if x == "cub200" else pytest.mark.campaign
        )
        for x in FULL
    ],
)
def test_official_numbers_are_stored_whole(layout, tmp_path):
    dataset, write, _ = fake.LAYOUTS[layout]
    expected = DATASETS[dataset].expected
    write(tmp_path / "source", expected)
    prepare(dataset, tmp_path / "source", tmp_path / "data", num_processes=2)
    records = prepared.PreparedRecords(prepared.find(tmp_path / "data", dataset), 16)
    for role, (classes, images) in expected.items():
        labels = records.labels[records.roles == role]
        assert (len(np.unique(labels)), len(labels)) == (classes, images)
    assert records[len(records) - 1].shape == (16, 16, 3)


def test_tfds_reads_it(tmp_path):
    fake.inshop(tmp_path / "source", fake.SMALL["inshop"])
    prepare_small("inshop", tmp_path / "source", tmp_path / "data")
    builder = tfds.builder_from_directory(tmp_path / "data" / "inshop" / "1.0.0")
    splits = {name: split.num_examples for name, split in builder.info.splits.items()}
    assert splits == {"train": 33, "query": 18, "gallery": 17}
    assert builder.info.metadata["quality"] == 95
    decoders = {"image": tfds.decode.SkipDecoding()}
    example = builder.as_data_source("query", decoders=decoders)[4]
    assert set(example) == {
        *("image", "label", "original_id", "box", "role", "source_path"),
    }
    assert example["role"] == b"query"
    name = example["source_path"].decode()
    assert example["original_id"].decode() in name
    source = tmp_path / "source" / "Img" / name
    assert example["image"] == source.read_bytes()
    # The fake images are 20 x 16; the box is left 3, top 2, right 13, bottom 12.
    np.testing.assert_allclose(example["box"], [2 / 16, 3 / 20, 12 / 16, 13 / 20])


def test_images_are_reduced_and_the_table_says_what_is_there(tmp_path):
    content = fake.jpeg
    fake.cub200(
        tmp_path / "source",
        fake.SMALL["cub200"],
        lambda name: content(name, (80, 64)),
    )
    text = prepare_small(
        "cub200", tmp_path / "source", tmp_path / "data", storing=Storing(size=32)
    )
    folder = prepared.find(tmp_path / "data", "cub200")
    records = prepared.PreparedRecords(folder, 32)
    assert records.stored_size == 32
    with Image.open(io.BytesIO(records.jpeg(0))) as image:
        assert image.size == (40, 32)
    rows = [line.split() for line in text.splitlines()]
    assert ["part", "classes", "images", "MiB"] in rows
    assert ["train", "8", "33"] in [row[:3] for row in rows]
    assert ["test", "8", "34"] in [row[:3] for row in rows]
    metadata = json.loads((folder / "metadata.json").read_text())
    assert metadata["size"] == 32 and metadata["keep_original"] is False


def break_two(base):
    (base / "images" / "002.Bird_2" / "Bird_0001.jpg").write_bytes(b"")
    whole = (base / "images" / "009.Bird_9" / "Bird_0002.jpg").read_bytes()
    (base / "images" / "009.Bird_9" / "Bird_0002.jpg").write_bytes(whole[:200])


def test_all_bad_files_are_named_and_nothing_is_kept(tmp_path):
    break_two(fake.cub200(tmp_path / "source", fake.SMALL["cub200"]))
    with pytest.raises(UserError) as caught:
        prepare_small("cub200", tmp_path / "source", tmp_path / "data")
    text = str(caught.value)
    assert text.startswith("2 of 67 images cannot be used: ")
    assert "images/002.Bird_2/Bird_0001.jpg (the file is empty)" in text
    assert "images/009.Bird_9/Bird_0002.jpg (" in text and "--skip_bad" in text
    assert left_behind(tmp_path / "data") == []


def test_bad_files_can_be_left_out(tmp_path, caplog):
    break_two(fake.cub200(tmp_path / "source", fake.SMALL["cub200"]))
    text = prepare_small(
        "cub200", tmp_path / "source", tmp_path / "data", skip_bad=True
    )
    assert "left out: images/002.Bird_2/Bird_0001.jpg (the file is empty)" in text
    folder = prepared.find(tmp_path / "data", "cub200")
    listed = (folder / "bad_files.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in listed] == [
        "images/002.Bird_2/Bird_0001.jpg",
        "images/009.Bird_9/Bird_0002.jpg",
    ]
    records = prepared.PreparedRecords(folder, 16)
    assert len(records) == 65 and records.num_skipped == 2
    assert "images/002.Bird_2/Bird_0001.jpg" not in records.names
    for number, name in enumerate(records.names):
        source = tmp_path / "source" / "CUB_200_2011" / name
        assert records.jpeg(number) == source.read_bytes()


def left_behind(data_dir):
    """What is there besides folders of data sets and their locks."""
    return [p for p in data_dir.glob("*/*") if p.name != ".lock"]


def test_copies_of_training_images_that_test_are_refused(tmp_path):
    base = fake.sop(tmp_path / "source", fake.SMALL["sop"])
    train, test = (
        [line.split()[3] for line in (base / name).read_text().splitlines()[1:]]
        for name in ("Ebay_train.txt", "Ebay_test.txt")
    )
    for source, copy in zip(train[:20], test[:20], strict=True):
        (base / copy).write_bytes((base / source).read_bytes())
    with pytest.raises(UserError, match="20 of the 30 images that test are copies"):
        prepare_small("sop", tmp_path / "source", tmp_path / "data")
    assert left_behind(tmp_path / "data") == []
    for source, copy in zip(train[2:], test[2:20], strict=False):
        (base / copy).write_bytes((base / source).read_bytes() + copy.encode())
    text = prepare_small("sop", tmp_path / "source", tmp_path / "data")
    assert "2 images outside of the training part are copies" in text


def test_what_is_there_is_left_as_it_is(tmp_path):
    fake.cub200(tmp_path / "source", fake.SMALL["cub200"])
    prepare_small("cub200", tmp_path / "source", tmp_path / "data")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "data").rglob("1.0.0/*")}
    text = prepare_small("cub200", tmp_path / "source", tmp_path / "data")
    assert text.startswith("already prepared")
    assert before == {
        p: p.stat().st_mtime_ns for p in (tmp_path / "data").rglob("1.0.0/*")
    }
    with pytest.raises(UserError, match="short side of 256 .* not with .* 64 .*delete"):
        prepare_small(
            "cub200", tmp_path / "source", tmp_path / "data", storing=Storing(64)
        )
    with pytest.raises(UserError, match="not with original sizes and quality 95"):
        prepare_small(
            *("cub200", tmp_path / "source", tmp_path / "data"),
            storing=Storing(keep_original=True),
        )


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("write() failed: No space left on device; writing x; at byte 7"),
    ],
    ids=["python", "array_record"],
)
@pytest.mark.parametrize("method", ["add_examples", "close_splits"])
def test_full_disk(error, method, tmp_path, monkeypatch):
    fake.cub200(tmp_path / "source", fake.SMALL["cub200"])

    def fail(*args):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(tfds.core.SequentialWriter, method, fail)
        message = "the disk is full: nothing was kept, .* now .* MiB left in"
        with pytest.raises(UserError, match=message):
            prepare_small("cub200", tmp_path / "source", tmp_path / "data")
    assert left_behind(tmp_path / "data") == []
    prepare_small("cub200", tmp_path / "source", tmp_path / "data")


def test_records_that_did_not_reach_the_disk_are_noticed(tmp_path, monkeypatch):
    fake.cub200(tmp_path / "source", fake.SMALL["cub200"])
    add = tfds.core.SequentialWriter.add_examples

    def lose_one(self, examples):
        add(self, {split: chunk[:-1] for split, chunk in examples.items()})

    monkeypatch.setattr(tfds.core.SequentialWriter, "add_examples", lose_one)
    with pytest.raises(UserError, match="67 records were written, but 65 are on"):
        prepare_small("cub200", tmp_path / "source", tmp_path / "data")
    assert left_behind(tmp_path / "data") == []


def test_two_runs_at_once_are_refused(tmp_path):
    fake.cub200(tmp_path / "source", fake.SMALL["cub200"])
    (tmp_path / "data" / "cub200").mkdir(parents=True)
    with open(tmp_path / "data" / "cub200" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is preparing"):
            prepare_small("cub200", tmp_path / "source", tmp_path / "data")
    prepare_small("cub200", tmp_path / "source", tmp_path / "data")


def test_where_there_are_no_locks_it_works_with_a_warning(
    tmp_path, monkeypatch, caplog
):
    def flock(file, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    fake.cub200(tmp_path / "source", fake.SMALL["cub200"])
    prepare_small("cub200", tmp_path / "source", tmp_path / "data")
    assert "cannot be locked ([Errno 38] Function not implemented)" in caplog.text


def test_a_folder_of_another_program_is_not_touched(tmp_path):
    fake.cub200(tmp_path / "source", fake.SMALL["cub200"])
    other = tmp_path / "data" / "cub200" / "1.0.0"
    other.mkdir(parents=True)
    (other / "dataset_info.json").write_text("{}")
    with pytest.raises(UserError, match="exists but is no data set that was prepared"):
        prepare_small("cub200", tmp_path / "source", tmp_path / "data")
    assert (other / "dataset_info.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"dataset": "cub"},
            "--dataset is 'cub'; known are 'cub200', 'cars196', 'sop'",
        ),
        ({"source": "nowhere"}, "--source 'nowhere' does not exist"),
        ({"storing": Storing(size=8)}, "--size is 8 and --quality 95"),
        ({"storing": Storing(quality=0)}, "--size is 256 and --quality 0"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path):
    good = {"dataset": "cub200", "source": tmp_path, "data_dir": tmp_path / "data"}
    with pytest.raises(UserError, match=message):
        prepare(**(good | arguments))
    assert not (tmp_path / "data").exists() or left_behind(tmp_path / "data") == []


start = partial(command_line.start, module="abe_jax.prepare")
run = partial(command_line.run, module="abe_jax.prepare")


def test_what_is_unpacked_is_shown(tmp_path):
    for name in ("ash", "elm"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.new("RGB", (20, 16)).save(tmp_path / "photos" / name / "0.jpg")
    path = shutil.make_archive(str(tmp_path / "photos"), "zip", tmp_path / "photos")
    status, _, errors = run(
        *("--dataset=image_folder", f"--source={path}", "--num_processes=1"),
        f"--data_dir={tmp_path / 'data'}",
    )
    assert status == 0, errors
    assert f"unpacking {path}" in errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "abe_jax: --dataset is required; see --help."),
        (["--dataset=cub200"], "abe_jax: --source is required; see --help."),
        (["data"], "abe_jax: unknown argument 'data'; flags start with --."),
        (["--sizes=3"], "abe_jax: Unknown command line flag 'sizes'. Did you mean:"),
    ],
)
def test_mistakes_end_in_one_line(arguments, message):
    status, output, errors = run(*arguments)
    assert (status, output) == (1, "")
    assert errors.splitlines()[-1].startswith(message)
    assert "Traceback" not in errors


@pytest.fixture(scope="module")
def large_photos(tmp_path_factory):
    """Images that take a while: 4 classes of 60 images of 900 x 900 pixels."""
    folder = tmp_path_factory.mktemp("large") / "photos"
    rng = np.random.default_rng(0)
    for label in range(4):
        (folder / f"class{label}").mkdir(parents=True)
        for number in range(60):
            noise = rng.integers(0, 256, (90, 90, 3), np.uint8)
            image = Image.fromarray(noise).resize((900, 900))
            image.save(folder / f"class{label}" / f"{number}.jpg")
    return folder


@pytest.mark.slow
def test_killed_and_run_again(large_photos, tmp_path):
    arguments = ["--dataset=image_folder", f"--source={large_photos}"]
    arguments += [f"--data_dir={tmp_path}"]
    killed = start(*arguments)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("image_folder/unfinished.abe_jax/**/*array_record*")):
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert prepared.find(tmp_path, "image_folder") is None
    assert left_behind(tmp_path)
    status, output, errors = run(*arguments)
    assert status == 0, errors
    assert "class folders" in output and "240/240" in errors
    assert [p.name for p in left_behind(tmp_path)] == ["1.0.0"]
    assert not list(tmp_path.glob("image_folder/downloads"))
    records = prepared.PreparedRecords(prepared.find(tmp_path, "image_folder"), 256)
    assert len(records) == 240 and records[239].shape == (256, 256, 3)


def test_interrupted(large_photos, tmp_path):
    process = start(
        "--dataset=image_folder", f"--source={large_photos}", f"--data_dir={tmp_path}"
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("image_folder/unfinished.abe_jax/**/*array_record*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    message = "abe_jax: interrupted; nothing was kept. Run the same command again."
    assert message in errors.splitlines()
    assert left_behind(tmp_path) == []


def test_interrupted_between_two_images_ends_the_processes(large_photos, tmp_path):
    def interrupt(count):
        raise KeyboardInterrupt

    builder = builders.RetrievalBuilder(
        DATASETS["image_folder"],
        listing=layouts.read(
            DATASETS["image_folder"], large_photos, tmp_path / "scratch"
        ),
        storing=Storing(),
        data_dir=str(tmp_path / "data"),
        num_processes=2,
        progress=interrupt,
    )
    before = set(multiprocessing.active_children())
    with pytest.raises(KeyboardInterrupt) as interrupted:
        builder.download_and_prepare(download_dir=str(tmp_path / "downloads"))
    # Not only once the frames are let go that the error's traceback holds.
    assert interrupted.tb is not None
    assert set(multiprocessing.active_children()) == before
