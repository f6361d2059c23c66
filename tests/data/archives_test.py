"""Archives that are damaged, or traps: each is refused, and nothing is unpacked."""

import gzip
import io
import shutil
import stat
import tarfile
import zipfile

import fake_datasets as fake
import pytest

from abe_jax.data.datasets import DATASETS
from abe_jax.data.prepare import archives, layouts
from abe_jax.errors import UserError


def read(dataset, root, scratch):
    return layouts.read(DATASETS[dataset], root, scratch, fake.SMALL[dataset])


def write_zip(path, name, content=b"x", mode=None):
    with zipfile.ZipFile(path, "w") as archive:
        info = zipfile.ZipInfo(name)
        info.compress_type = zipfile.ZIP_DEFLATED
        info.external_attr = (mode or 0) << 16
        archive.writestr(info, content)


def write_tar(path, name, kind=tarfile.REGTYPE, link="", size=0):
    with tarfile.open(path, "w") as archive:
        member = tarfile.TarInfo(name)
        member.type, member.linkname, member.size = kind, link, size
        archive.addfile(member, io.BytesIO(bytes(size)))


@pytest.mark.parametrize("suffix", ["zip", "tar"])
@pytest.mark.parametrize(
    "name", ["../outside.jpg", "/tmp/outside.jpg", "a/../../outside.jpg", "..\\x.jpg"]
)
def test_what_leads_out_of_the_folder_is_refused(suffix, name, tmp_path):
    path = tmp_path / f"a.{suffix}"
    (write_zip if suffix == "zip" else write_tar)(path, name)
    with pytest.raises(UserError, match="which leads out of the folder .* a trap"):
        archives.unpack(path, tmp_path / "deep" / "scratch", skip_encrypted=False)
    assert not list((tmp_path / "deep").rglob("*.jpg"))


@pytest.mark.parametrize(
    ("kind", "link"),
    [
        (tarfile.SYMTYPE, "/etc/passwd"),
        (tarfile.SYMTYPE, "b.jpg"),
        (tarfile.LNKTYPE, "b.jpg"),
        (tarfile.CHRTYPE, ""),
        (tarfile.FIFOTYPE, ""),
    ],
)
def test_links_and_devices_in_a_tar_file_are_refused(kind, link, tmp_path):
    write_tar(tmp_path / "a.tar", "ash/a.jpg", kind, link)
    with pytest.raises(UserError, match="ash/a.jpg', which is neither a file nor a fo"):
        archives.unpack(tmp_path / "a.tar", tmp_path / "scratch", skip_encrypted=False)
    assert not list((tmp_path / "scratch").iterdir())


def test_links_in_a_zip_file_are_refused(tmp_path):
    mode = stat.S_IFLNK | 0o777
    write_zip(tmp_path / "a.zip", "ash/a.jpg", b"/etc/passwd", mode)
    with pytest.raises(UserError, match="ash/a.jpg', which is neither a file nor a fo"):
        archives.unpack(tmp_path / "a.zip", tmp_path / "scratch", skip_encrypted=False)
    assert not list((tmp_path / "scratch").iterdir())


@pytest.mark.parametrize("suffix", ["zip", "tar", "tgz"])
def test_bombs_are_refused(suffix, tmp_path, monkeypatch):
    """Without being unpacked, or looked at to their end."""
    path = tmp_path / f"a.{suffix}"
    monkeypatch.setattr(archives, "_MAX_ANYWAY", 2**20)
    if suffix == "zip":
        write_zip(path, "a.jpg", bytes(2**22))
    elif suffix == "tgz":
        write_tar(tmp_path / "a.tar", "a.jpg", size=2**22)
        path.write_bytes(gzip.compress((tmp_path / "a.tar").read_bytes()))
    else:  # a header that says a terabyte, and a file that ends there
        write_tar(path, "a.jpg")
        member = tarfile.TarInfo("a.jpg")
        member.size = 2**40
        path.write_bytes(member.tobuf(tarfile.GNU_FORMAT))
    with pytest.raises(UserError, match="unpacks to more than .* no images of 0.0 MiB"):
        archives.unpack(path, tmp_path / "scratch", skip_encrypted=False)
    assert not list((tmp_path / "scratch").iterdir())


def test_what_is_unpacked_is_told(tmp_path, caplog):
    caplog.set_level("INFO", logger="abe_jax")  # absl's is silenced by the program
    write_zip(tmp_path / "a.zip", "ash/a.jpg")
    archives.unpack(tmp_path / "a.zip", tmp_path / "scratch", skip_encrypted=False)
    assert f"unpacking {tmp_path / 'a.zip'}" in caplog.text


def test_too_many_files_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "_MAX_MEMBERS", 3)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for number in range(4):
            archive.writestr(f"{number}.jpg", b"")
    with pytest.raises(UserError, match="in 4 files"):
        archives.unpack(tmp_path / "a.zip", tmp_path / "scratch", skip_encrypted=False)


def test_a_disk_that_cannot_be_written_to_is_not_a_damaged_archive(
    tmp_path, monkeypatch
):
    write_zip(tmp_path / "a.zip", "a.jpg")

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied", "a.jpg")

    monkeypatch.setattr(zipfile.ZipFile, "extractall", refuse)
    with pytest.raises(PermissionError):
        archives.unpack(tmp_path / "a.zip", tmp_path / "scratch", skip_encrypted=False)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.zip", b"PK not really", "cannot unpack a.zip"),
        ("a.tgz", b"\x1f\x8b broken", "cannot unpack a.tgz"),
        ("a.rar", b"Rar!", "neither a folder nor a zip"),
    ],
)
def test_bad_archives(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read("cub200", tmp_path / name, tmp_path / "scratch")


def test_locked_archive(tmp_path):
    fake.write_locked_zip(tmp_path / "img_highres.zip")
    with pytest.raises(UserError, match="needs a password"):
        read("inshop", tmp_path / "img_highres.zip", tmp_path / "scratch")


def test_archive_that_leads_out_of_the_folder(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(__file__, "../../outside.py")
    with pytest.raises(UserError, match="which leads out of the folder"):
        read("cub200", tmp_path / "a.tar", tmp_path / "x" / "y" / "scratch")
    assert not list(tmp_path.rglob("outside.py"))


def test_archive_larger_than_the_disk(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("1.jpg", b"0" * 1000)
    usage = type("Usage", (), {"free": 999})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="make room"):
        read("cub200", tmp_path / "a.zip", tmp_path / "scratch")
