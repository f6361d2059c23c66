"""Damaged files of every kind: each is read as it was meant, or refused in one line.

What was found so is a case of its own in the other tests.
"""

import functools
import io
import re
import shutil
import tarfile
import zipfile

import fake_datasets as fake
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from abe_jax.data import prepared
from abe_jax.data.datasets.image_folder import ImageFolder
from abe_jax.data.decoding import decode, decode_stored
from abe_jax.data.prepare.encoding import BadImage, Storing, encode
from abe_jax.errors import UserError
from abe_jax.prepare import prepare

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # Pillow's, of what it found
]


def campaign(examples):
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )


# Places are shares of the length, so that they fit whatever is damaged.
PLACE = st.floats(0, 1, exclude_max=True)
CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("set"), PLACE, st.binary(min_size=1, max_size=4)),
        st.tuples(st.just("insert"), PLACE, st.binary(min_size=1, max_size=40)),
        st.tuples(st.just("delete"), PLACE, st.integers(1, 60)),
        st.tuples(st.just("repeat"), PLACE, st.integers(1, 60)),
        st.tuples(st.just("cut"), PLACE, st.none()),
    ),
    min_size=1,
    max_size=6,
)


def changed(content, changes):
    content = bytearray(content)
    for kind, place, what in changes:
        start = int(place * len(content))
        if kind == "set":
            content[start : start + len(what)] = what
        elif kind == "insert":
            content[start:start] = what
        elif kind == "delete":
            del content[start : start + what]
        elif kind == "word":
            word = re.compile(rb"(?<=[\s,])[^\s,]+")
            content[start:] = word.sub(what, content[start:], count=1)
        elif kind == "repeat":
            content[start:start] = content[start : start + what]
        else:
            del content[start:]
    return bytes(content)


@functools.cache
def image(format, exif):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (12, 16, 3), np.uint8)
    buffer = io.BytesIO()
    options = {}
    if exif:
        tags = Image.Exif()
        tags[0x0112], tags[0x010F], tags[0x011A] = 6, "maker", 72.0
        tags.get_ifd(0x8769)[0x9003] = "2020:01:01 00:00:00"
        options = {"exif": tags}
    mode = "RGBA" if format == "PNG" and exif else "RGB"
    Image.fromarray(pixels).convert(mode).save(buffer, format, **options)
    return buffer.getvalue()


def one_line(error):
    assert str(error).strip() and "object at 0x" not in str(error)
    assert "\n" not in str(error)


# In the header, mostly, where a change is worth most.
HEAD = st.lists(
    st.tuples(st.just("set"), st.floats(0, 0.3), st.binary(min_size=1, max_size=4)),
    max_size=4,
)


@campaign(900)
@given(
    format=st.sampled_from(
        [*("JPEG", "PNG", "WEBP") * 2, "GIF", "BMP", "TIFF", "PPM", "TGA", "AVIF"]
    ),
    exif=st.booleans(),
    head=HEAD,
    changes=CHANGES,
    square=st.sampled_from(["centre", "squeeze", "pad"]),
)
def test_images(format, exif, head, changes, square):
    exif = exif and format in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF")
    content = changed(image(format, exif), head or changes)
    try:
        pixels = decode(content, 12, "it", square=square)
        assert pixels.shape == (12, 12, 3) and pixels.dtype == np.uint8
    except UserError as error:
        one_line(error)
    try:
        stored = encode(content, Storing(size=12))
    except BadImage as error:
        one_line(error)
        return
    # What is stored is read, by both.
    np.testing.assert_array_equal(
        decode_stored(stored.jpeg, 12, "it"), decode(stored.jpeg, 12, "it")
    )


@pytest.fixture
def listed_only(monkeypatch):
    fake.store_nothing(monkeypatch)


def prepared_or_refused(dataset, source, data_dir, expected):
    """Whether it was taken; nothing is left but what is whole."""
    try:
        prepare(dataset, source, data_dir, expected=expected)
    except UserError as error:
        assert str(error).strip() and "object at 0x" not in str(error)
        assert not data_dir.exists()
        return False
    shutil.rmtree(data_dir)
    return True


ANNOTATIONS = {
    "cub200": ("images.txt", "image_class_labels.txt", "bounding_boxes.txt"),
    "cars196 form A": ("cars_annos.mat", "cars_meta.mat"),
    "cars196 form B": ("cars_train_annos.mat", "cars_test_annos_withlabels.mat"),
    "cars196 by class": ("anno_train.csv", "anno_test.csv", "names.csv"),
    "sop": ("Ebay_train.txt", "Ebay_test.txt"),
    "inshop": ("list_eval_partition.txt", "list_bbox_inshop.txt"),
}
TEXT = st.lists(
    st.tuples(
        st.sampled_from(["set", "word"]),
        PLACE,
        st.sampled_from(
            [
                *(
                    b"-1",
                    b"0",
                    b"9" * 30,
                    b"1.5",
                    b"nan",
                    b"inf",
                    b"\xff",
                    b"\0",
                    b"\n",
                ),
                *(
                    b" ",
                    b"\r",
                    b'"',
                    b",",
                    "\u00b2".encode(),
                    "\u0663".encode(),
                    b"/..",
                ),
            ]
        ),
    ),
    min_size=1,
    max_size=3,
)


@pytest.mark.parametrize("layout", ANNOTATIONS)
def test_annotations(layout, tmp_path, listed_only):
    dataset, write, _ = fake.LAYOUTS[layout]
    expected = fake.SMALL[dataset]
    write(tmp_path / "source", expected, fake.no_image)
    files = [next((tmp_path / "source").rglob(n)) for n in ANNOTATIONS[layout]]
    whole = {path: path.read_bytes() for path in files}
    assert prepared_or_refused(
        dataset, tmp_path / "source", tmp_path / "data", expected
    )

    # Every MATLAB file is read by a process of its own, which takes a while.
    @campaign(20 if files[0].suffix == ".mat" else 120)
    @given(path=st.sampled_from(files), changes=st.one_of(CHANGES, TEXT))
    def refused_or_taken(path, changes):
        path.write_bytes(changed(whole[path], changes))
        try:
            prepared_or_refused(
                dataset, tmp_path / "source", tmp_path / "data", expected
            )
        finally:
            path.write_bytes(whole[path])

    refused_or_taken()


@functools.cache
def archive(kind):
    """A small folder of classes, packed."""
    buffer = io.BytesIO()
    names = [f"photos/{c}/{i}.png" for c in ("ash", "elm") for i in range(3)]
    if kind.startswith("zip"):
        method = zipfile.ZIP_STORED if "stored" in kind else zipfile.ZIP_DEFLATED
        with zipfile.ZipFile(buffer, "w", method) as packed:
            for name in names:
                packed.writestr(name, image("PNG", False))
    else:
        with tarfile.open(fileobj=buffer, mode="w:gz" if kind == "tgz" else "w") as tar:
            for name in names:
                member = tarfile.TarInfo(name)
                member.size = len(image("PNG", False))
                tar.addfile(member, io.BytesIO(image("PNG", False)))
    return buffer.getvalue()


@campaign(250)
@given(kind=st.sampled_from(["zip", "zip stored"]), changes=CHANGES, head=HEAD)
def test_zip_files_read_directly(tmp_path_factory, kind, changes, head):
    path = tmp_path_factory.mktemp("zip") / "photos.zip"
    path.write_bytes(changed(archive(kind), head + changes))
    try:
        source = ImageFolder(path, 8)
    except UserError as error:
        one_line(error)
        return
    for index in range(len(source)):
        try:
            assert source[index].shape == (8, 8, 3)
        except UserError as error:
            one_line(error)


@campaign(250)
@given(kind=st.sampled_from(["zip", "zip stored", "tar", "tgz"]), changes=CHANGES)
def test_archives_to_prepare(tmp_path_factory, listed_only, kind, changes):
    folder = tmp_path_factory.mktemp("packed")
    path = folder / f"photos.{kind[:3]}"
    path.write_bytes(changed(archive(kind), changes))
    prepared_or_refused("image_folder", path, folder / "data", {})
    assert sorted(p.name for p in folder.iterdir()) == [path.name]


def test_prepared_data_sets(tmp_path):
    """Damage is noticed, wherever it is: no image is another than was stored."""
    for name in ("ash", "elm"):
        for number in range(3):
            fake.write(tmp_path / "photos", f"{name}/{number}.png", image("PNG", False))
    prepare("image_folder", tmp_path / "photos", tmp_path / "data")
    folder = prepared.find(tmp_path / "data", "image_folder")
    whole = prepared.PreparedRecords(folder, 12)
    expected = [whole[index] for index in range(6)]
    index_file = folder / prepared.INDEX_FILE
    shards = sorted(folder.glob("*.array_record*"))

    @campaign(300)
    @given(path=st.sampled_from([index_file, *shards]), changes=CHANGES)
    def damaged(path, changes):
        content = path.read_bytes()
        # Most of a file of records is filled up.
        used = len(content.rstrip(b"\0")) if path != index_file else len(content)
        path.write_bytes(changed(content[:used], changes) + content[used:])
        try:
            records = prepared.PreparedRecords(folder, 12)
            for number, pixels in enumerate(expected):
                np.testing.assert_array_equal(records[number], pixels)
        except UserError as error:
            one_line(error)
        finally:
            path.write_bytes(content)

    damaged()
