"""Archives and parquet files, unpacked into a folder that the caller throws away."""

import csv
import logging
import pathlib
import re
import shutil
import stat
import tarfile
from collections.abc import Iterator

from abe_jax.data.datasets.listing import PARQUET_LABELS
from abe_jax.data.datasets.tree import Zip
from abe_jax.data.decoding import reason
from abe_jax.errors import UserError

ARCHIVE_SUFFIXES = (".zip", ".tgz", ".tar.gz", ".tar")

_log = logging.getLogger(__name__)

# Images are compressed already: an archive is hardly smaller than what is in it.
_MAX_RATIO = 100
_MAX_ANYWAY = 2**30  # bytes
_MAX_MEMBERS = 5_000_000

_HALF = re.compile(r"(train|test)[-.]")


def is_archive(name: str) -> bool:
    """Whether the file of a name is a zip, tgz or tar file."""
    return name.lower().endswith(ARCHIVE_SUFFIXES)


def is_parquet(name: str) -> bool:
    """Whether the file of a name is a parquet file."""
    return name.lower().endswith(".parquet")


def unpack(path: pathlib.Path, folder: pathlib.Path, *, skip_encrypted: bool) -> None:
    """Unpacks a zip, tar or tgz file.

    Members whose path leads out of the folder, links and devices are refused, and so is
    what unpacks to so much more than it holds that it cannot be images.

    Args:
      path: the archive.
      folder: where to; made if missing.
      skip_encrypted: whether an archive that needs a password is left out, with a
        warning, instead of refused.

    Raises:
      UserError: it is damaged, unsafe, needs a password, or does not fit on the disk.
      OSError: the folder cannot be written to.
    """
    _log.info("unpacking %s", path)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if path.name.lower().endswith(".zip"):
            _unpack_zip(path, folder, skip_encrypted)
        else:
            _unpack_tar(path, folder)
    except UserError:
        raise
    except Exception as error:  # damage shows in many ways
        if isinstance(error, OSError) and error.errno is not None:
            raise  # it is the disk's
        raise UserError(
            f"cannot unpack {path.name}: {reason(error)}; the archive is damaged or "
            "cut short, copy it again."
        ) from error


def _unpack_zip(path: pathlib.Path, folder: pathlib.Path, skip_encrypted: bool) -> None:
    with Zip(path) as archive:
        members = archive.infolist()
        if any(m.flag_bits & 1 for m in members):
            text = (
                f"{path.name} needs a password; unpack it yourself and give the "
                "folder (of In-Shop, img.zip needs none)."
            )
            if not skip_encrypted:
                raise UserError(text)
            _log.warning("%s", text)
            return
        total = 0
        for number, member in enumerate(members, 1):
            kind = stat.S_IFMT(member.external_attr >> 16)
            plain = kind in (0, stat.S_IFREG, stat.S_IFDIR)
            _refuse_unsafe(path, member.filename, plain)
            total += member.file_size
            _refuse_bomb(path, total, number)
        _require_room(total, folder, path)
        archive.extractall(folder, members)  # not by name: some are put right


def _unpack_tar(path: pathlib.Path, folder: pathlib.Path) -> None:
    with tarfile.open(path) as archive:
        total = 0
        for number, member in enumerate(archive, 1):
            _refuse_unsafe(path, member.name, member.isreg() or member.isdir())
            total += member.size
            _refuse_bomb(path, total, number)  # before what it holds is looked at
        _require_room(total, folder, path)
        archive.extractall(folder, filter="data")


def _refuse_unsafe(path: pathlib.Path, name: str, plain: bool) -> None:
    if name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name):
        raise UserError(
            f"{path.name} holds {name!r}, which leads out of the folder that it is "
            "unpacked to: it is no data set, but a trap."
        )
    if not plain:
        raise UserError(
            f"{path.name} holds {name!r}, which is neither a file nor a folder; unpack "
            "it yourself and give the folder, if you trust it."
        )


def _refuse_bomb(path: pathlib.Path, total: int, number: int) -> None:
    bound = max(_MAX_RATIO * path.stat().st_size, _MAX_ANYWAY)
    if total > bound or number > _MAX_MEMBERS:
        raise UserError(
            f"{path.name} unpacks to more than {min(total, bound) / 2**30:,.1f} GiB in "
            f"{number:,} files, which no images of {path.stat().st_size / 2**20:,.1f} "
            "MiB do; unpack it yourself and give the folder, if you trust it."
        )


def _require_room(needed: int, folder: pathlib.Path, path: pathlib.Path) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{path.name} unpacks to {needed / 2**30:.1f} GiB, but {folder} has "
            f"{free / 2**30:.1f} GiB left; make room or choose another --data_dir."
        )


def unpack_parquet(paths: list[pathlib.Path], folder: pathlib.Path) -> None:
    """Writes the images of parquet files, and their labels as `PARQUET_LABELS`.

    The files are those of a mirror: names begin with "train" or "test", rows have an
    "image" (bytes, or a struct that has them) and a "label". Images become
    `train/<number>.jpg` and `test/<number>.jpg`.

    Raises:
      UserError: a file is none of a mirror, or has other columns.
    """
    folder.mkdir(parents=True, exist_ok=True)
    numbers = {"train": 0, "test": 0}
    with open(folder / PARQUET_LABELS, "w", newline="") as file:
        writer = csv.writer(file)
        for path in sorted(paths):
            _log.info("unpacking %s", path)
            match = _HALF.match(path.name)
            if match is None:
                raise UserError(
                    f"{path.name} is neither a train-*.parquet nor a test-*.parquet; "
                    "keep the names of the mirror."
                )
            half = match[1]
            (folder / half).mkdir(exist_ok=True)
            for data, label in _parquet_rows(path):
                name = f"{half}/{numbers[half]:06}.jpg"
                numbers[half] += 1
                (folder / name).write_bytes(data)
                writer.writerow((name, label))


def _parquet_rows(path: pathlib.Path) -> Iterator[tuple[bytes, int]]:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        for batch in file.iter_batches(batch_size=64, columns=["image", "label"]):
            for row in batch.to_pylist():
                image = row["image"]
                data = image["bytes"] if isinstance(image, dict) else image
                if not isinstance(data, bytes):
                    raise UserError(
                        f"{path.name} holds links to images, not the images; take a "
                        "mirror that holds them."
                    )
                yield data, int(row["label"])
    except UserError:
        raise
    except (
        LookupError,
        TypeError,
        ValueError,
        OSError,
        pyarrow.ArrowException,
    ) as error:
        raise UserError(
            f"cannot read images and labels from {path.name}: {error}."
        ) from error


def unpacked_already(path: str, folders: set[str]) -> bool:
    """Whether a folder of the archive's name lies beside it.

    Args:
      path: relative path of the archive.
      folders: relative paths of all folders.
    """
    stem = re.sub(r"\.(zip|tgz|tar\.gz|tar)$", "", path, flags=re.IGNORECASE)
    return stem in folders
