"""Layouts of the benchmarks: each is detected, complete, and refused if it is not."""

import importlib
import logging
import os
import pathlib
import shutil
import tarfile
import zipfile

import fake_datasets as fake
import numpy as np
import pytest

from abe_jax.data.datasets import DATASETS, mat_file
from abe_jax.data.prepare import layouts


def read(dataset, root, scratch, expected=None):
    expected = fake.SMALL[dataset] if expected is None else expected
    return layouts.read(DATASETS[dataset], root, scratch, expected)


def assert_is_as_expected(listing, expected):
    for role, (classes, images) in expected.items():
        part = [r for r in listing.records if r.role == role]
        assert len(part) == images
        assert len({r.class_id for r in part}) == classes
    trained = {r.class_id for r in listing.records if r.role == "train"}
    assert not trained & {r.class_id for r in listing.records if r.role != "train"}
    assert {r.class_id for r in listing.records} == set(listing.class_names)
    assert len({r.path for r in listing.records}) == len(listing.records)
    assert all(os.path.isfile(r.path) for r in listing.records)


@pytest.mark.parametrize("layout", fake.LAYOUTS)
def test_layouts_are_told_apart(layout, tmp_path, caplog):
    dataset, write, words = fake.LAYOUTS[layout]
    write(tmp_path / "source", fake.SMALL[dataset])
    with caplog.at_level(logging.INFO):
        listing = read(dataset, tmp_path / "source", tmp_path / "scratch")
    assert words in listing.layout
    assert f"{dataset}: found the layout '{listing.layout}'" in caplog.text
    assert_is_as_expected(listing, fake.SMALL[dataset])


# One a reader; other layouts differ in paths, which the test above has in small.
READERS = ("cars196 form A", "cars196 by class", "cars196 parquet", "sop", "inshop")


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(
            x, marks=pytest.mark.slow if x in READERS else pytest.mark.campaign
        )
        for x in fake.LAYOUTS
    ],
)
def test_official_numbers(layout, tmp_path):
    dataset, write, _ = fake.LAYOUTS[layout]
    expected = DATASETS[dataset].expected
    write(tmp_path / "source", expected, fake.no_image)
    listing = read(dataset, tmp_path / "source", tmp_path / "scratch", expected)
    assert_is_as_expected(listing, expected)


def test_official_numbers_are_those_of_the_protocol():
    assert {d.name: d.expected for d in DATASETS.values() if d.read} == {
        "cub200": {"train": (100, 5864), "test": (100, 5924)},
        "cars196": {"train": (98, 8054), "test": (98, 8131)},
        "sop": {"train": (11318, 59551), "test": (11316, 60502)},
        "inshop": {
            "train": (3997, 25882),
            "query": (3985, 14218),
            "gallery": (3985, 12612),
        },
        "image_folder": {},
    }


@pytest.mark.parametrize(
    ("dataset", "recall_at"),
    [
        ("cub200", (1, 2, 4, 8)),
        ("cars196", (1, 2, 4, 8)),
        ("sop", (1, 10, 100, 1000)),
        ("inshop", (1, 10, 20, 30, 40, 50)),
    ],
)
def test_configs_report_the_values_of_k_of_published_figures(dataset, recall_at):
    config = importlib.import_module(f"configs.{dataset}").get_config()
    assert config.eval.recall_at == recall_at
    assert DATASETS[dataset].citation


@pytest.mark.parametrize("dataset", ["cub200", "cars196", "sop"])
def test_split_is_by_official_ids(dataset, tmp_path):
    fake.LAYOUTS[{"cars196": "cars196 form B"}.get(dataset, dataset)][1](
        tmp_path, fake.SMALL[dataset], fake.no_image
    )
    listing = read(dataset, tmp_path, tmp_path / "scratch")
    last = fake.SMALL[dataset]["train"][0]
    for record in listing.records:
        assert record.role == ("train" if int(record.class_id) <= last else "test")
    assert list(listing.class_names) == [
        str(i) for i in range(1, len(listing.class_names) + 1)
    ]


@pytest.mark.parametrize(
    "layout",
    [
        *("cub200", "cars196 form A", "cars196 form B", "cars196 by class"),
        *("inshop", "inshop flat"),
    ],
)
def test_boxes_are_read(layout, tmp_path):
    dataset, write, _ = fake.LAYOUTS[layout]
    source = tmp_path / "img_highres_too"  # of which a folder's own name says nothing
    write(source, fake.SMALL[dataset], fake.no_image)
    listing = read(dataset, tmp_path, tmp_path / "scratch")
    assert {record.box for record in listing.records} == {fake.BOX}


@pytest.mark.parametrize("layout", ["cars196 form A", "cars196 by class"])
def test_names_of_cars(layout, tmp_path):
    dataset, write, _ = fake.LAYOUTS[layout]
    write(tmp_path, fake.SMALL[dataset], fake.no_image)
    names = read(dataset, tmp_path, tmp_path / "scratch").class_names
    assert names["3"] == fake.car_name(3)


def test_parquet_keeps_bytes_and_labels(tmp_path):
    fake.cars196_parquet(tmp_path / "source", fake.SMALL["cars196"])
    fake.cars196_form_b(tmp_path / "form_b", fake.SMALL["cars196"])
    mirror = read("cars196", tmp_path / "source", tmp_path / "scratch")
    form_b = read("cars196", tmp_path / "form_b", tmp_path / "other")
    assert [r.class_id for r in mirror.records] == [r.class_id for r in form_b.records]
    written = {pathlib.Path(r.path).read_bytes() for r in mirror.records}
    halves = fake._halves(fake.SMALL["cars196"])
    assert written == {fake.jpeg(h + n) for h, part in halves.items() for _, n in part}


def test_hidden_files_and_those_of_macos_are_ignored(tmp_path):
    base = fake.cub200(tmp_path, fake.SMALL["cub200"], fake.no_image)
    (base / "images" / "001.Bird_1" / "._Bird_0000.jpg").write_bytes(b"fork")
    (base / "images" / ".DS_Store").write_bytes(b"")
    fake.write(tmp_path, "__MACOSX/CUB_200_2011/images.txt", b"fork")
    assert len(read("cub200", tmp_path, tmp_path / "scratch").records) == 67


@pytest.mark.parametrize("kind", ["zip", "tgz", "folder with tgz", "folder with zip"])
def test_archives(kind, tmp_path):
    fake.cub200(tmp_path / "made", fake.SMALL["cub200"], fake.no_image)
    (tmp_path / "given").mkdir()
    suffix = kind[-3:]
    path = tmp_path / "given" / f"birds.{suffix}"
    if suffix == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for file in (tmp_path / "made").rglob("*"):
                archive.write(file, file.relative_to(tmp_path / "made"))
    else:
        with tarfile.open(path, "w:gz") as archive:
            archive.add(tmp_path / "made" / "CUB_200_2011", "CUB_200_2011")
    source = path.parent if kind.startswith("folder") else path
    listing = read("cub200", source, tmp_path / "scratch")
    assert_is_as_expected(listing, fake.SMALL["cub200"])
    assert not any(p.name == "CUB_200_2011" for p in path.parent.iterdir())


def pack_img(root):
    with zipfile.ZipFile(root / "Img" / "img.zip", "w") as archive:
        for file in (root / "Img" / "img").rglob("*"):
            archive.write(file, file.relative_to(root / "Img"))
    shutil.rmtree(root / "Img" / "img")


def test_archive_beside_the_annotations(tmp_path):
    """As In-Shop comes: Eval/ as text, Img/img.zip packed, and one with a password."""
    fake.inshop(tmp_path, fake.SMALL["inshop"], fake.no_image)
    pack_img(tmp_path)
    fake.write_locked_zip(tmp_path / "Img" / "img_highres.zip")
    listing = read("inshop", tmp_path, tmp_path.parent / "scratch")
    assert_is_as_expected(listing, fake.SMALL["inshop"])


@pytest.mark.parametrize("kind", ["file", "folder", "file in file", "file in folder"])
def test_archives_in_an_archive(kind, tmp_path):
    """As drives and mirrors give away what was packed before."""
    fake.inshop(tmp_path / "inshop", fake.SMALL["inshop"], fake.no_image)
    pack_img(tmp_path / "inshop")
    path = shutil.make_archive(str(tmp_path / "a" / "drive"), "zip", tmp_path, "inshop")
    if " in " in kind:
        path = shutil.make_archive(
            str(tmp_path / "b" / "drive"), "gztar", *os.path.split(path)
        )
    source = pathlib.Path(path)
    source = source.parent if kind.endswith("folder") else source
    listing = read("inshop", source, tmp_path / "scratch")
    assert_is_as_expected(listing, fake.SMALL["inshop"])


def test_image_folder_has_the_split_of_the_unprepared_one(tmp_path, photos):
    listing = read("image_folder", photos, tmp_path, {})
    roles = {r.class_id: r.role for r in listing.records}
    assert [roles[name] for name in sorted(roles)] == ["train"] * 16 + ["test"] * 16
    names = np.array([r.name for r in listing.records])
    assert len(np.unique(names)) == 32 * 8


def test_matlab_files_are_read_by_whichever_scipy_python_finds(tmp_path, monkeypatch):
    """Of a user's own site or of PYTHONPATH, as on clusters; not what lies beside."""
    (tmp_path / "scipy").mkdir()
    (tmp_path / "scipy" / "__init__.py").touch()
    (tmp_path / "scipy" / "io.py").write_text(
        "import numpy as np\n"
        "def loadmat(path, squeeze_me): return {'v': np.array([1, 2])}\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert mat_file.load("any.mat", "v") == [1, 2]
