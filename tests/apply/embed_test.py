"""Embeddings of a folder as a file."""

import logging
import os
import pathlib
import shutil
import tracemalloc
import zipfile

import numpy as np
import pytest
from apply.conftest import NAMES
from command_line import run
from pyarrow import parquet

from abe_jax import command_line
from abe_jax.apply import embed, images, progress
from abe_jax.apply.embed import _WRITERS, embed_images, write_embeddings
from abe_jax.data.datasets.tree import printable
from abe_jax.errors import UserError
from abe_jax.workdir import config_files, whole


def test_npz_holds_all_images_in_order(model, pictures, tmp_path):
    assert write_embeddings(model, pictures, tmp_path / "e.npz") == []
    with np.load(tmp_path / "e.npz") as content:
        assert content["paths"].tolist() == NAMES
        rows = content["embeddings"].reshape(len(NAMES), content["num_learners"], -1)
    np.testing.assert_array_equal(rows, model.embed(pictures))
    for name in NAMES:
        if ".zip" not in name:
            assert (pictures / name).exists()  # also what is no UTF-8


def test_parquet_holds_the_same(model, pictures, tmp_path):
    write_embeddings(model, pictures, tmp_path / "e.parquet")
    table = parquet.read_table(tmp_path / "e.parquet")
    assert [os.fsdecode(name) for name in table["path_bytes"].to_pylist()] == NAMES
    assert r"caf\xe9 latin-1.png" in table["path"].to_pylist()
    rows = np.array(table["embedding"].to_pylist(), np.float32)
    np.testing.assert_array_equal(rows.reshape(-1, 2, 4), model.embed(pictures))


def test_a_parquet_path_is_that_of_the_file(model, pictures, tmp_path):
    """Whatever characters it has, such as the narrow space of a screenshot's name."""
    (tmp_path / "in").mkdir()
    for name in ("9.41\u202fAM.png", "写真\u30001.png", "line\nbreak.png"):
        shutil.copy(pictures / "a" / "1.png", tmp_path / "in" / name)
    write_embeddings(model, tmp_path / "in", tmp_path / "e.parquet")
    paths = parquet.read_table(tmp_path / "e.parquet")["path"].to_pylist()
    assert {tmp_path / "in" / path for path in paths} == {*(tmp_path / "in").iterdir()}
    assert list(map(printable, paths)) == [
        *("9.41\u202fAM.png", r"line\x0abreak.png", "写真\u30001.png")
    ]


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_a_name_that_is_no_utf_8_can_be_written_to(
    suffix, model, pictures, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(embed, "Trained", lambda *_, **__: model)
    path = os.path.join(os.fsencode(tmp_path), b"caf\xe9" + suffix.encode())
    asked = {"images": str(pictures), "output": os.fsdecode(path)}
    embed_images(model.config, str(model.workdir), **asked, strict=False, step=None)
    # As a terminal takes it, which refuses such bytes.
    assert capsys.readouterr().out == rf"{tmp_path}/caf\xe9{suffix}" + "\n"
    with open(path, "rb") as file:
        if suffix == ".npz":
            assert len(np.load(file)["paths"]) == len(NAMES)
        else:
            assert parquet.read_table(file).num_rows == len(NAMES)


def test_rows_are_compressed_together(model, tmp_path):
    rows = np.random.default_rng(0).normal(size=(100, 8)).astype(np.float32)
    with _WRITERS[".parquet"](tmp_path / "e.parquet", model) as writer:
        for number, row in enumerate(rows):
            writer.add([str(number)], row[None])
    assert parquet.ParquetFile(tmp_path / "e.parquet").num_row_groups == 1
    table = parquet.read_table(tmp_path / "e.parquet")
    np.testing.assert_array_equal(np.array(table["embedding"].to_pylist()), rows)


def test_quiet_shows_no_progress(pictures, monkeypatch):
    files = images.find(pictures)
    assert not progress.bar(files).disable
    logger = logging.getLogger("abe_jax")
    monkeypatch.setattr(logger, "level", logger.level)  # to be put back
    command_line.be_quiet()
    assert progress.bar(files).disable


def break_some(pictures):
    (pictures / "a" / "broken.jpg").write_bytes(b"nothing")
    (pictures / "cut.zip").write_bytes(b"PK\x03\x04")
    (pictures / "gone.png").symlink_to("nowhere")
    with zipfile.ZipFile(pictures / "bad member.zip", "w") as archive:
        archive.writestr("1.png", b"no picture")
    return {"a/broken.jpg", "cut.zip", "gone.png", "bad member.zip/1.png"}


def test_unreadable_files_are_listed_and_left_out(model, pictures, tmp_path):
    broken = break_some(pictures)
    refused = write_embeddings(model, pictures, tmp_path / "e.npz")
    assert {file.name for file, _ in refused} == broken
    for file, error in refused:
        assert file.name in str(error)
    with np.load(tmp_path / "e.npz") as content:
        assert content["paths"].tolist() == NAMES
        assert content["embeddings"].shape == (len(NAMES), 8)


def test_what_cannot_be_read_is_not_held(model, pictures):
    content = (pictures / "a" / "1.png").read_bytes()[:-20] + bytes(2**20)
    folder = pictures / "broken"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.png").write_bytes(content)
        (folder / f"{number}.jpg").write_bytes(bytes(2**20))
    with zipfile.ZipFile(folder / "damaged.zip", "w") as archive:
        archive.writestr("1.png", bytes(2**20))
    whole = bytearray((folder / "damaged.zip").read_bytes())
    whole[2**19] = 1
    (folder / "damaged.zip").write_bytes(whole)
    files = images.find(folder)
    tracemalloc.start()
    try:
        refused = list(images.decoded(files, model.decode))
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(refused) == 9 and held < 2**22
    assert all(isinstance(error, UserError) for _, error in refused)


def test_strict_writes_nothing(model, pictures, tmp_path):
    break_some(pictures)
    with pytest.raises(UserError, match="cannot read a/broken.jpg"):
        write_embeddings(model, pictures, tmp_path / "e.npz", strict=True)
    assert {path.name for path in tmp_path.glob("e.npz*")} == set()


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("e.csv", "must end in .npz or .parquet"),
        ("no/e.npz", "there is no folder"),
        ("folder.npz", "folder.npz is a folder; give a file's name"),
    ],
)
def test_output_that_cannot_be(model, pictures, tmp_path, output, message):
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(UserError, match=message):
        write_embeddings(model, pictures, tmp_path / output)


def test_memory_does_not_grow_with_the_number_of_images(
    model, pictures, tmp_path, monkeypatch
):
    """Never more pixels in flight than threads and two batches take."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    (file,) = [f for f in pictures.glob("a/1.png")]
    many = tmp_path / "many"
    many.mkdir()
    for i in range(300):
        os.link(file, many / f"{i:03}.png")
    started, ended, most = 0, 0, 0
    decode = model.decode

    def counted(content, name):
        nonlocal started, most
        started += 1
        most = max(most, started - ended)
        return decode(content, name)

    model.decode = counted
    try:
        for done, _ in model.embed_files(images.find(many), pytest.fail):
            ended += len(done)
    finally:
        del model.decode
    assert ended == 300
    assert most <= 16 * 2 + 1 + 3 * 16


def test_settings_are_those_of_the_run(workdir, pictures, tmp_path):
    config = config_files.of_workdir(workdir)
    config.data.image_size = 24
    output = tmp_path / "e.npz"
    with pytest.raises(UserError, match=r"data.image_size \(there 32, now 24\)"):
        embed_images(
            config,
            workdir,
            **{"images": str(pictures), "output": str(output)},
            **{"strict": False, "step": None},
        )
    assert not output.exists()


@pytest.mark.slow
def test_the_mode(workdir, pictures, tmp_path):
    output = tmp_path / "e.npz"
    break_some(pictures)
    arguments = (f"--workdir={workdir}", "--mode=embed", f"--images={pictures}")
    status, printed, errors = run(*arguments, f"--output={output}")
    assert status == 0, errors
    assert printed.splitlines() == [str(output)]
    assert "4 file(s) could not be read" in errors
    assert len(np.load(output)["paths"]) == len(NAMES)
    status, _, errors = run(*arguments, f"--output={output}", "--strict")
    assert status == 1
    assert "a/broken.jpg" in errors.splitlines()[-1]
    status, _, errors = run(*arguments)
    assert status == 1
    assert "--output is required; see --help" in errors.splitlines()[-1]


def test_folders_are_walked_as_for_training(pictures, tmp_path, caplog):
    shutil.copytree(pictures / "a" / "b", pictures / "@eaDir" / "1.png")
    run_of_another = pictures / "runs" / "first"
    (run_of_another / "checkpoints").mkdir(parents=True)
    (run_of_another / "config.json").write_text("{}")
    shutil.copy(pictures / "a" / "1.png", run_of_another)
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(pictures / "a" / "1.png", tmp_path / "elsewhere" / "5.png")
    (pictures / "linked").symlink_to(tmp_path / "elsewhere")
    found = [image.name for image in images.find(pictures)]
    assert found == sorted([*NAMES, "linked/5.png"])
    assert "left out 1 system folders: '@eaDir'" in caplog.text
    assert "left out 1 workdirs of runs: 'runs/first'" in caplog.text


def test_an_unreadable_folder_is_told(pictures, unreadable):
    unreadable("b")
    with pytest.raises(UserError, match="cannot read the folder '.*b'"):
        images.find(pictures)


def test_the_home_folder_may_be_meant(model, pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(images.find("~/my pictures")) == len(NAMES)
    home = {"images": "~/my pictures", "output": "~/e.npz", "strict": False}
    embed_images(model.config, str(model.workdir), **home, step=None)
    assert (tmp_path / "e.npz").exists()
    assert model.index("~/my pictures").folder == pictures
    with pytest.raises(UserError, match="images=gs://photos is a remote path"):
        images.find("gs://photos")
    with pytest.raises(UserError, match="output=gs://e.npz is a remote path"):
        write_embeddings(model, pictures, "gs://e.npz")


def test_an_empty_path_is_not_the_current_folder(model, pictures, monkeypatch):
    """As a shell gives it for a variable that is not set."""
    monkeypatch.chdir(pictures)
    for given in ("", " "):
        with pytest.raises(UserError, match="^images is empty; give the path of a"):
            images.find(given)
        with pytest.raises(UserError, match="^output is empty"):
            write_embeddings(model, pictures, given)
        with pytest.raises(UserError, match="^file is empty"):
            model.index(pictures, given)


def test_a_file_is_written_whole_by_each_process_for_itself(tmp_path, monkeypatch):
    path, users = tmp_path / "e.npz", tmp_path / "e.npz.part"
    users.write_text("the user's")
    with whole(path) as mine:
        monkeypatch.setattr(os, "getpid", lambda: 1)
        with whole(path) as others:
            others.write_text("of another process")
        mine.write_text("mine")
        assert path.read_text() == "of another process"
    with pytest.raises(KeyboardInterrupt), whole(path) as part:
        part.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "mine" and users.read_text() == "the user's"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_zip_files_names_may_begin_with_a_dot_and_a_slash(pictures, tmp_path):
    """As some packers write them."""
    content = (pictures / "a" / "1.png").read_bytes()
    with zipfile.ZipFile(tmp_path / "dotted.zip", "w") as archive:
        archive.writestr("./", b"")
        archive.writestr("./in/1.png", content)
        archive.writestr("./.hidden/2.png", content)
    (image,) = images.find(tmp_path / "dotted.zip")
    assert image.name == "in/1.png"
    with images.Reader() as reader:
        assert reader.read(image) == content


def test_a_zip_files_folders_may_be_parted_by_backslashes(tmp_path):
    """As for training; what is hidden is left out."""
    with zipfile.ZipFile(tmp_path / "back.zip", "w") as archive:
        for name in (r"in\1.png", r"in\.2.png", r"__MACOSX\in\3.png"):
            archive.writestr(name, b"content")
    (image,) = images.find(tmp_path / "back.zip")
    assert image.name == "in/1.png"
    with images.Reader() as reader:
        assert reader.read(image) == b"content"


def test_what_is_too_large_is_not_read(model, tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_BYTES", 99)
    (tmp_path / "large.png").write_bytes(b"x" * 100)
    (tmp_path / "part of a.zip").write_bytes(b"x" * 100)
    with zipfile.ZipFile(tmp_path / "whole.zip", "w") as archive:
        archive.writestr("large.png", b"x" * 100)
    monkeypatch.setattr(pathlib.Path, "read_bytes", lambda _: pytest.fail("was read"))
    refused = []
    files = images.find(tmp_path)
    assert not list(model.embed_files(files, lambda *both: refused.append(both)))
    assert len(files) == 3 and [file for file, _ in refused] == files
    assert all("is larger than 99 bytes" in str(error) for _, error in refused)


def test_few_zip_files_are_open_at_once(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(images, "_OPEN_ZIPS", 3)
    for number in range(12):
        with zipfile.ZipFile(tmp_path / f"{number:02}.zip", "w") as archive:
            archive.write(pictures / "a" / "1.png", "1.png")
    before, most = len(os.listdir("/proc/self/fd")), 0
    with images.Reader() as reader:
        for image in images.find(tmp_path):
            assert reader.read(image)
            most = max(most, len(os.listdir("/proc/self/fd")) - before)
    assert 0 < most <= 3


def test_damaged_zip_files_are_told_as_other_broken_images(model, pictures, tmp_path):
    def packed(name, method):
        with zipfile.ZipFile(pictures / name, "w", method) as archive:
            archive.write(pictures / "a" / "1.png", "in.png")
        return bytearray((pictures / name).read_bytes())

    content = packed("name.zip", zipfile.ZIP_STORED)
    entry = content.index(b"PK\x01\x02")
    content[entry + 9] |= 8  # the name is said to be UTF-8
    content[entry + 46] = 0xE9
    (pictures / "name.zip").write_bytes(content)
    content = packed("lzma.zip", zipfile.ZIP_LZMA)
    content[50:60] = b"\xff" * 10
    (pictures / "lzma.zip").write_bytes(content)
    refused = write_embeddings(model, pictures, tmp_path / "e.npz")
    reasons = {file.name: str(error) for file, error in refused}
    assert reasons.keys() == {"name.zip", "lzma.zip/in.png"}
    assert "as an image" not in reasons["name.zip"]
