"""Prepared records: the same images for every host, worker and restart; their split."""

import io
import logging
import pickle
import shutil
from concurrent import futures

import fake_datasets as fake
import numpy as np
import pytest
from PIL import Image

from abe_jax import data
from abe_jax.data import prepared, samplers
from abe_jax.data.decoding import PADDING, decode, decode_stored
from abe_jax.data.prepared import PreparedRecords
from abe_jax.errors import UserError
from abe_jax.evaluate import run
from abe_jax.prepare import prepare
from configs import default


def config_of(data_dir, name, **fields):
    config = default.get_config().data
    config.update(name=name, path=str(data_dir), load_size=36, image_size=32, **fields)
    return config


@pytest.mark.parametrize("kind", ["outside", "turned"])
def test_a_box_of_no_use_costs_no_image(kind, tmp_path):
    base = fake.cub200(tmp_path / "source", fake.SMALL["cub200"])
    name = "images/003.Bird_3/Bird_0001.jpg"
    if kind == "turned":
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.new("RGB", (20, 16)).save(base / name, exif=exif)
    else:
        lines = (base / "bounding_boxes.txt").read_text().splitlines()
        lines[10] = "11 20 2 10 10"
        fake.write_lines(base, "bounding_boxes.txt", lines)
    text = prepare("cub200", base, tmp_path, expected=fake.SMALL["cub200"])
    assert f"1 bounding boxes cannot be used, the first is that of {name};" in text
    splits = data.create(config_of(tmp_path, "cub200"))
    assert name in splits.train.names
    with pytest.raises(UserError, match=f"box_crop: 1 images of .* is '{name}'; corre"):
        data.create(config_of(tmp_path, "cub200", box_crop=True))


def test_records_are_decoded_squares(data_dir):
    source = PreparedRecords(prepared.find(data_dir, "cub200"), 36)
    assert len(source) == 67 and source.labels.dtype == np.int32
    for index in (0, 40, 66):
        assert source[index].shape == (36, 36, 3) and source[index].dtype == np.uint8
        np.testing.assert_array_equal(
            source[index], decode(source.jpeg(index), 36, "it")
        )
    with pytest.raises((IndexError, ValueError)):
        source[67]


def test_records_allow_every_square(data_dir):
    """Of 60 x 40 pixels: the short side is stored, so the long one is long enough."""
    folder = prepared.find(data_dir, "cub200")
    for square in ("centre", "squeeze", "pad"):
        source = PreparedRecords(folder, 40, square=square)
        expected = decode(source.jpeg(5), 40, "it", square=square)
        np.testing.assert_array_equal(source[5], expected)
    rows = (source[5] == PADDING).all(axis=(1, 2))
    assert rows.tolist() == [True] * 6 + [False] * 27 + [True] * 7


@pytest.mark.parametrize("shape", [(40, 60), (61, 40), (40, 40), (20, 30), (40, 200)])
@pytest.mark.parametrize("square", ["centre", "squeeze", "pad"])
def test_stored_files_are_decoded_as_any_other(square, shape):
    """By libjpeg-turbo itself; smaller ones, which need resizing, too."""
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    file = buffer.getvalue()
    got = decode_stored(file, 40, "it", square=square)
    np.testing.assert_array_equal(got, decode(file, 40, "it", square=square))
    for damaged in (file[: len(file) // 2], file[:10], b""):
        with pytest.raises(UserError, match="cannot read it as an image"):
            decode_stored(damaged, 40, "it", square=square)


def test_is_pickled_and_read_from_threads(data_dir):
    source = PreparedRecords(prepared.find(data_dir, "cub200"), 36)
    expected = [source[i] for i in range(67)]
    assert len(pickle.dumps(source)) < 10_000
    again = pickle.loads(pickle.dumps(source))
    with futures.ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            found = list(pool.map(again.__getitem__, range(67)))
            np.testing.assert_array_equal(found, expected)


def test_boxes_are_cropped_when_read(data_dir):
    folder = prepared.find(data_dir, "cub200")
    source = PreparedRecords(folder, 10, box_crop=True)
    # Of 60 x 40 pixels; the box is left 3, top 2, right 13, bottom 12: 10 x 10.
    whole = PreparedRecords(folder, 40)
    with_sides = decode(whole.jpeg(5), 40, "it", box=(0.0, 0.0, 1.0, 40 / 60))
    np.testing.assert_array_equal(source[5], with_sides[2:12, 3:13])


def test_a_data_set_without_boxes_has_none_to_crop(data_dir):
    with pytest.raises(UserError, match="prepared without bounding boxes"):
        data.create(config_of(data_dir, "sop", box_crop=True))


@pytest.mark.parametrize("name", ["cub200", "cars196", "sop"])
def test_splits_are_official(name, data_dir):
    splits = data.create(config_of(data_dir, name))
    expected = fake.SMALL[name]
    for part, role in [(splits.train, "train"), (splits.evaluation, "test")]:
        found = (len(np.unique(part.labels)), len(part))
        assert found == expected[role]
    assert splits.zero_shot and splits.gallery is None
    assert splits.evaluation_name == "test"


def test_in_shop_has_queries_and_a_gallery(data_dir):
    splits = data.create(config_of(data_dir, "inshop"))
    assert splits.gallery is not None
    sizes = (len(splits.train), len(splits.evaluation), len(splits.gallery))
    assert sizes == (33, 18, 17)
    assert set(splits.evaluation.labels) == set(splits.gallery.labels)
    assert not set(splits.train.labels) & set(splits.gallery.labels)
    assert splits.zero_shot


@pytest.mark.parametrize("name", ["cub200", "inshop"])
def test_validation_classes_are_of_the_training_part(name, data_dir):
    splits = data.create(config_of(data_dir, name, validation_fraction=0.25))
    assert splits.evaluation_name == "validation" and splits.gallery is None
    assert len(np.unique(splits.train.labels)) == 6
    assert len(np.unique(splits.evaluation.labels)) == 2
    assert len(splits.train) + len(splits.evaluation) == 33


def test_a_prepared_folder_has_the_split_of_the_unprepared_one(data_dir, photos):
    made = data.create(config_of(data_dir, "image_folder"))
    unmade = data.create(config_of(photos, "image_folder"))
    for one, other in [
        (made.train, unmade.train),
        (made.evaluation, unmade.evaluation),
    ]:
        np.testing.assert_array_equal(one.labels, other.labels)
        gap = np.abs(one[7].astype(int) - other[7].astype(int))
        assert gap.mean() < 12  # they are noise, stored as JPEG
    assert made.train.source.class_names == unmade.train.source.class_names


def test_in_memory_gives_the_same(data_dir):
    kept = data.create(config_of(data_dir, "inshop", in_memory=True))
    read = data.create(config_of(data_dir, "inshop"))
    assert kept.gallery is not None and read.gallery is not None
    np.testing.assert_array_equal(kept.gallery[3], read.gallery[3])


def read_batches(data_dir, start=0, stop=50, name="cars196", **reading):
    subset = data.create(config_of(data_dir, name)).train
    sampler = samplers.PairSampler(subset.labels, 16, seed=3)
    batches = data.train_batches(
        subset, sampler, start=start, stop=stop, reading=data.Reading(**reading)
    )
    return [(batch["image"], batch["label"]) for batch in batches]


@pytest.fixture(scope="module")
def expected_batches(data_dir):
    batches = read_batches(data_dir, num_threads=1)
    assert len(batches) == 50
    assert len({images.tobytes() for images, _ in batches}) == 50
    return batches


def assert_same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one[0], other[0])
        np.testing.assert_array_equal(one[1], other[1])


# Every worker process takes seconds to start.
@pytest.mark.parametrize(
    ("hosts", "workers"),
    [
        *((1, 0), (2, 0), (4, 0), (1, 2)),
        *(
            pytest.param(hosts, workers, marks=pytest.mark.slow)
            for hosts, workers in [(2, 2)]
        ),
        *(
            pytest.param(hosts, workers, marks=pytest.mark.campaign)
            for hosts, workers in [(1, 4), (2, 4), (4, 2), (4, 4)]
        ),
    ],
)
def test_hosts_workers_and_restarts_change_nothing(
    hosts, workers, data_dir, expected_batches
):
    def whole(start, stop):
        parts = [
            read_batches(
                data_dir,
                start,
                stop,
                num_workers=workers,
                process_index=index,
                process_count=hosts,
            )
            for index in range(hosts)
        ]
        return [
            tuple(np.concatenate(pieces) for pieces in zip(*step, strict=True))
            for step in zip(*parts, strict=True)
        ]

    assert_same(whole(0, 23) + whole(23, 50), expected_batches)


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_evaluation_reads_each_image_once(hosts, data_dir):
    subset = data.create(config_of(data_dir, "sop")).evaluation
    seen = []
    for index in range(hosts):
        reading = data.Reading(process_index=index, process_count=hosts)
        own = 8 // hosts
        for step, batch in enumerate(data.evaluation_batches(subset, 8, reading)):
            for position, image in enumerate(batch["image"], 8 * step + own * index):
                if position < 30:
                    np.testing.assert_array_equal(image, subset[position])
                    seen.append(position)
    assert sorted(seen) == list(range(30))


@pytest.mark.parametrize(("square", "are"), [("centre", "are"), ("pad", "may be")])
def test_images_stored_smaller_than_wanted_are_told(square, are, data_dir, caplog):
    with caplog.at_level(logging.WARNING):
        data.create(config_of(data_dir, "cub200", square=square))
    assert not caplog.text
    config = config_of(data_dir, "cub200", square=square)
    config.load_size = 300
    with caplog.at_level(logging.WARNING):
        data.create(config)
    line = f"images of it {are} enlarged to data.load_size = 300; prepare it with a lar"
    assert line in caplog.text
    caplog.clear()
    config.load_size = 256
    with caplog.at_level(logging.WARNING):
        data.create(config)
    assert not caplog.text
    config.box_crop = True
    with caplog.at_level(logging.WARNING):
        data.create(config)
    assert f"boxes of it {are} enlarged to data.load_size = 256; prepare" in caplog.text


def test_left_out_images_are_told(tmp_path, caplog):
    base = fake.cub200(tmp_path / "source", fake.SMALL["cub200"])
    (base / "images" / "002.Bird_2" / "Bird_0001.jpg").write_bytes(b"")
    expected = fake.SMALL["cub200"]
    prepare("cub200", base, tmp_path / "data", expected=expected, skip_bad=True)
    config = default.get_config()
    config.data = config_of(tmp_path / "data", "cub200", in_memory=True)
    with caplog.at_level(logging.WARNING):
        splits = data.create(config.data)
    assert "without 1 bad files: its Recall@K is not comparable" in caplog.text
    assert len(splits.train) == 32
    protocol = run._protocol(config, splits, 1)
    assert protocol["storage"] == "JPEG, short side 256, quality 95"
    assert (protocol["num_skipped"], protocol["load_size"]) == (1, 36)


def _no_index(folder):
    (folder / "index.npz").write_bytes(b"PK")


def _missing_shard(folder):
    next(folder.glob("*array_record*")).unlink()


def _truncated_shard(folder):
    path = next(folder.glob("*array_record*"))
    path.write_bytes(path.read_bytes()[:100])


def _one_bit(folder):
    path = next(folder.glob("*train.array_record*"))
    content = bytearray(path.read_bytes())
    used = [i for i, byte in enumerate(content) if byte]  # most is filled up
    content[used[len(used) // 2]] ^= 1
    path.write_bytes(content)


def _damaged_index(folder):
    path = folder / "index.npz"
    content = bytearray(path.read_bytes())
    start = content.index(b"label.npy") + len("label.npy") + 20  # its deflated bytes
    content[start : start + 9] = b"\xff" * 9
    path.write_bytes(content)


def _exchanged_shard(folder):
    shutil.copy(
        folder / "cub200-test.array_record-00000",
        folder / "cub200-train.array_record-00000",
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_no_index, "cannot read .*index.npz.*delete the folder and prepare it again"),
        (_damaged_index, "cannot read .*index.npz.*prepare it again with python -m"),
        (_one_bit, "cannot read record .*damaged: delete the folder and prepare it"),
        (_missing_shard, "lacks 'cub200-.*delete the folder and prepare it again"),
        (_truncated_shard, "delete the folder and prepare it again"),
        (_exchanged_shard, "holds 68 records, its index 67"),
    ],
)
def test_damaged_files_are_refused(change, message, data_dir, tmp_path):
    shutil.copytree(data_dir / "cub200", tmp_path / "cub200")
    change(tmp_path / "cub200" / "1.0.0")
    with pytest.raises(UserError, match=message):
        splits = data.create(config_of(tmp_path, "cub200"))
        for position in range(len(splits.train)):
            splits.train[position]
