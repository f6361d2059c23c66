"""The index of a folder: made, refreshed, kept."""

import copy
import io
import os
import signal
import tracemalloc
import zipfile

import numpy as np
import pytest
from apply.conftest import NAMES
from PIL import Image

from abe_jax.apply import embed, images, search
from abe_jax.apply import index as indexing
from abe_jax.errors import UserError


@pytest.fixture
def decoded(model, monkeypatch):
    """Names of the images that are decoded."""
    names, decode = [], model.decode

    def noted(content, name):
        names.append(name)
        return decode(content, name)

    monkeypatch.setattr(model, "decode", noted)
    return names


def test_an_unchanged_folder_decodes_nothing(model, pictures, tmp_path, decoded):
    (pictures / "broken.png").write_bytes(b"nothing")
    first = model.index(pictures, tmp_path / "i.npz")
    assert first.changes.embedded == len(NAMES) and len(decoded) == len(NAMES) + 1
    assert first.paths == NAMES
    decoded.clear()
    before = (tmp_path / "i.npz").read_bytes()
    again = model.index(pictures, tmp_path / "i.npz")
    assert decoded == []
    assert again.changes.kept == len(NAMES)
    assert again.changes.unreadable == ("broken.png",)
    np.testing.assert_array_equal(again.embeddings, first.embeddings)
    assert (tmp_path / "i.npz").read_bytes() == before


def test_a_link_to_nothing_leaves_the_index_as_it_is(model, pictures, tmp_path):
    """It is tried again at each search, of which the index holds nothing new."""
    link, file = pictures / "a" / "link.png", tmp_path / "i.npz"
    link.symlink_to("nowhere")
    first = model.index(pictures, file)
    before = file.stat()
    again = model.index(pictures, file)
    assert again.changes.unreadable == ("a/link.png",)
    assert again.paths == NAMES
    np.testing.assert_array_equal(again.embeddings, first.embeddings)
    # A file that is written takes the place of the old one.
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (
        *(before.st_ino, before.st_mtime_ns),
    )
    link.unlink()
    assert model.index(pictures, file).changes.dropped == 1
    assert file.stat().st_ino != before.st_ino


def test_embeddings_are_held_once(model, pictures, tmp_path, monkeypatch):
    """And those that were stored beside them, while they are moved."""
    wide, number = 1 << 17, 64
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(number):
        os.link(pictures / "a" / "1.png", folder / f"{i:02}.png")
    (folder / "30-broken.png").write_bytes(b"nothing")
    row = 4 * model.num_learners * wide

    def embed_files(files, refused):
        for file in files:
            if "broken" in file.name:
                refused(file, UserError("broken"))
                continue
            shape = 1, model.num_learners, wide
            yield [file], np.full(shape, int(file.name[:2]), np.float32)

    monkeypatch.setattr(model, "dim", model.num_learners * wide)
    monkeypatch.setattr(model, "embed_files", embed_files)

    def most_held() -> float:
        tracemalloc.start()
        try:
            index = model.index(folder, tmp_path / "i.npz")
            numbers = [int(name[:2]) for name in index.paths]
            assert (index.embeddings == np.array(numbers)[:, None, None]).all()
            return tracemalloc.get_traced_memory()[1] / (len(index) * row)
        finally:
            tracemalloc.stop()

    monkeypatch.setattr(indexing, "_MOVED_AT_ONCE", 4)
    assert most_held() < 1.4
    assert most_held() < 1.4  # as it is in the file
    (folder / "00.png").unlink()
    os.link(pictures / "a" / "1.png", folder / "99.png")
    assert most_held() < 2.4


def test_new_changed_and_deleted_files_only(model, pictures, tmp_path, decoded):
    file = tmp_path / "i.npz"
    model.index(pictures, file)
    decoded.clear()
    (pictures / "a" / "1.png").unlink()
    Image.new("RGB", (40, 40), "red").save(pictures / "a" / "b" / "2.PNG")
    Image.new("RGB", (40, 40), "blue").save(pictures / "new.png")
    os.utime(pictures / "a" / "more.zip")  # its members are the same
    index = model.index(pictures, file)
    assert sorted(decoded) == ["a/b/2.PNG", "new.png"]
    changes = index.changes
    assert (changes.embedded, changes.kept, changes.dropped) == (2, len(NAMES) - 2, 1)
    np.testing.assert_allclose(index.embeddings, model.embed(pictures), atol=1e-6)
    decoded.clear()
    assert model.index(pictures, file).changes.embedded == 0 and decoded == []


def test_an_interrupted_index_goes_on(model, pictures, tmp_path, monkeypatch):
    embed_files = model.embed_files

    def interrupted(files, refused):
        yield next(embed_files(list(files)[:3], refused))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(model, "embed_files", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.index(pictures, tmp_path / "i.npz")
    index = model.index(pictures, tmp_path / "i.npz")
    assert (index.changes.kept, index.changes.embedded) == (3, len(NAMES) - 3)
    assert index.paths == NAMES


def test_the_index_is_written_while_it_is_made(model, pictures, tmp_path, monkeypatch):
    """So that little is lost with a process; seldom where writing takes long."""
    embed_files, file, seen = model.embed_files, tmp_path / "i.npz", []
    embeddings = model.embed(pictures)
    (pictures / "a" / "broken.png").write_bytes(b"nothing")

    def one_by_one(files, refused):
        for image in files:
            yield from embed_files([image], refused)
            seen.append(file.read_bytes() if file.exists() else b"")

    def files_seen(after: tuple[float, int]) -> list[bytes]:
        seen.clear()
        with monkeypatch.context() as patched:
            patched.setattr(model, "embed_files", one_by_one)
            patched.setattr(indexing, "_WRITE_AFTER", after)
            assert model.index(pictures, file).paths == NAMES
        file.unlink()
        return list(dict.fromkeys(seen))

    written = files_seen((0.0, 0))
    assert len(written) == len(NAMES)
    file.write_bytes(written[3])
    index = model.index(pictures, file)
    assert (index.changes.kept, index.changes.embedded) == (4, len(NAMES) - 4)
    assert index.paths == NAMES and index.changes.unreadable == ("a/broken.png",)
    np.testing.assert_allclose(index.embeddings, embeddings, atol=1e-6)
    file.unlink()
    assert len(files_seen((0.0, 10**9))) == 1 and files_seen((1e9, 0)) == [b""]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("mode", [search, embed])
def test_a_signal_ends_a_mode_as_ctrl_c_does(
    mode, number, model, pictures, tmp_path, monkeypatch
):
    """As where a scheduler takes a machine back: what is done is kept, or cleared."""
    embed_files, listened = model.embed_files, signal.getsignal(number)

    def terminated(files, refused):
        yield next(embed_files(list(files)[:3], refused))
        signal.raise_signal(number)
        pytest.fail("it went on")

    asked = {"config": model.config, "workdir": model.workdir, "step": None}
    asked |= {"images": str(pictures)}
    with monkeypatch.context() as patched, pytest.raises(SystemExit) as ended:
        patched.setattr(mode, "Trained", lambda *_, **__: model)
        patched.setattr(model, "embed_files", terminated)
        if mode is search:
            options = {"top_k": 1, "learner": None, "approximate": False}
            search.search_images(
                **asked, **options, query=str(pictures / "a" / "1.png")
            )
        else:
            output = str(tmp_path / "e.npz")
            embed.embed_images(**asked, output=output, strict=False)
    assert ended.value.code == 128 + number
    assert signal.getsignal(number) == listened
    assert not list(tmp_path.glob("e.npz*"))
    assert model.index(pictures).changes.kept == (3 if mode is search else 0)


@pytest.mark.parametrize("cause", [OSError(5, "Input/output error"), MemoryError()])
def test_what_the_system_refuses_is_tried_again(
    cause, model, pictures, tmp_path, monkeypatch
):
    read, file = images.Reader.read, tmp_path / "i.npz"

    def refuse(reader, image):
        if image.name == "a/1.png":
            raise UserError(f"cannot read {image.name}: {cause}.") from cause
        return read(reader, image)

    with monkeypatch.context() as patched:
        patched.setattr(images.Reader, "read", refuse)
        assert model.index(pictures, file).changes.unreadable == ("a/1.png",)
    again = model.index(pictures, file)
    assert (again.changes.embedded, again.changes.unreadable) == (1, ())


def pack(path, *members):
    with zipfile.ZipFile(path, "w") as archive:
        for name in members:
            content = io.BytesIO()
            Image.new("RGB", (40, 40), name).save(content, "PNG")
            archive.writestr(f"{name}.png", content.getvalue())


@pytest.mark.parametrize("then", [("blue", "red", "lime"), ("red",)])
def test_a_zip_file_packed_anew_meanwhile_gives_no_other_images(
    then, model, tmp_path, monkeypatch
):
    folder, file = tmp_path / "pictures", tmp_path / "i.npz"
    folder.mkdir()
    Image.new("RGB", (40, 40), "white").save(folder / "loose.png")
    pack(folder / "a.zip", "red", "blue")
    embed_files = model.embed_files

    def packed_anew(files, refused):
        pack(tmp_path / "new.zip", *then)
        os.replace(tmp_path / "new.zip", folder / "a.zip")
        return embed_files(files, refused)

    with monkeypatch.context() as patched:
        patched.setattr(model, "embed_files", packed_anew)
        changes = model.index(folder, file).changes
    moved = ("a.zip/blue.png", "a.zip/red.png")
    assert changes.unreadable == (moved[:1] if then == ("red",) else moved)
    assert "has changed since it was listed" in changes.reasons["a.zip/blue.png"]
    index = model.index(folder, file)
    assert index.paths == [*sorted(f"a.zip/{name}.png" for name in then), "loose.png"]
    np.testing.assert_allclose(index.embeddings, model.embed(folder), atol=1e-6)


@pytest.mark.parametrize("damage", ["in it", "half copied"])
def test_a_zip_file_made_whole_comes_back(damage, model, tmp_path, monkeypatch):
    folder, file = tmp_path / "pictures", tmp_path / "i.npz"
    folder.mkdir()
    Image.new("RGB", (40, 40), "white").save(folder / "loose.png")
    pack(folder / "a.zip", "red", "blue")
    whole, embed_files = (folder / "a.zip").read_bytes(), model.embed_files
    begin = whole.index(b"red.png") + 30
    damaged = whole[:begin] + bytes(20) + whole[begin + 20 :]
    broken = damaged if damage == "in it" else whole[:60]

    def damaged_meanwhile(files, refused):
        (folder / "a.zip").write_bytes(broken)
        return embed_files(files, refused)

    with monkeypatch.context() as patched:
        patched.setattr(model, "embed_files", damaged_meanwhile)
        assert "a.zip/red.png" in model.index(folder, file).changes.unreadable
    (folder / "a.zip").write_bytes(whole)
    index = model.index(folder, file)
    assert index.paths == ["a.zip/blue.png", "a.zip/red.png", "loose.png"]


def test_an_index_of_other_weights_is_made_anew(model, pictures, tmp_path, caplog):
    index = model.index(pictures, tmp_path / "i.npz")
    other = copy.copy(model)
    other.__dict__.pop("identity", None)
    params, others = model.variables
    params = {**params, "head": {k: v + 1 for k, v in params["head"].items()}}
    other.variables = params, others
    with pytest.raises(
        UserError, match="was made by other weights than those of .*, s"
    ):
        other.search(pictures, index)
    assert other.index(pictures, tmp_path / "i.npz").changes.embedded == len(NAMES)
    assert "i.npz is of other weights; it is made anew" in caplog.text
    caplog.clear()
    for kept in (0, len(NAMES)):  # by default each has its own
        for each in (model, other):
            assert each.index(pictures).changes.kept == kept
    assert not caplog.text


def test_an_index_of_another_folder_is_refused(model, pictures, tmp_path):
    (tmp_path / "other").mkdir()
    Image.new("RGB", (40, 40), "red").save(tmp_path / "other" / "red.png")
    model.index(pictures, tmp_path / "i.npz")
    with pytest.raises(UserError, match="i.npz is the index of .*my pictures; give an"):
        model.index(tmp_path / "other", tmp_path / "i.npz")
    other = copy.copy(model)  # of other weights as well
    other.__dict__["identity"] = "other"
    with pytest.raises(UserError, match="i.npz is the index of .*my pictures; give an"):
        other.index(tmp_path / "other", tmp_path / "i.npz")
    moved = pictures.rename(tmp_path / "moved")
    assert model.index(moved, tmp_path / "i.npz").changes.kept == len(NAMES)


def test_a_file_that_is_no_index(model, pictures, tmp_path, monkeypatch):
    (tmp_path / "i.npz").write_bytes(b"nothing")
    np.save(tmp_path / "rows.npy", np.ones((3, 3)))
    model.index(pictures, tmp_path / "few.npz")
    with np.load(tmp_path / "few.npz") as content:
        few = {**content, "embeddings": content["embeddings"][1:]}
    np.savez(tmp_path / "few.npz", **few)
    for name in ("i.npz", "rows.npy", "few.npz"):
        with pytest.raises(UserError, match="is no index .*; give another file"):
            model.index(pictures, tmp_path / name)
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="^cannot read the index .*: Is a directory"):
        model.index(pictures, tmp_path / "folder")
    monkeypatch.setattr(model, "workdir", tmp_path)
    model.index(pictures)
    (by_default,) = (tmp_path / "index").iterdir()
    by_default.write_bytes(b"nothing")
    with pytest.raises(UserError, match="is no index .* delete it"):
        model.index(pictures)


def test_an_index_that_cannot_be_kept_is_refused_before_the_work(
    model, pictures, tmp_path, decoded
):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the index"):
        model.index(pictures, tmp_path / "file" / "i.npz")
    assert not decoded
