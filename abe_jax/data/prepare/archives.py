"""Archives and parquet files, unpacked into a folder that the caller throws away."""

import csv
import logging
import pathlib
import re
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Iterator

from abe_jax.data.datasets.listing import PARQUET_LABELS
from abe_jax.errors import UserError

ARCHIVE_SUFFIXES = (".zip", ".tgz", ".tar.gz", ".tar")

_log = logging.getLogger(__name__)

_HALF = re.compile(r"(train|test)[-.]")


def is_packed(name: str) -> bool:
    """Whether the file of a name is an archive or a parquet file."""
    return name.lower().endswith((*ARCHIVE_SUFFIXES, ".parquet"))


def unpack(path: pathlib.Path, folder: pathlib.Path, *, skip_encrypted: bool) -> None:
    """Unpacks a zip, tar or tgz file.

    Members whose path leads out of the folder, links and devices are refused.

    Args:
      path: the archive.
      folder: where to; made if missing.
      skip_encrypted: whether an archive that needs a password is left out, with a
        warning, instead of refused.

    Raises:
      UserError: it is damaged, needs a password, or does not fit on the disk.
    """
    _log.info("unpacking %s", path)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if path.name.lower().endswith(".zip"):
            _unpack_zip(path, folder, skip_encrypted)
        else:
            with tarfile.open(path) as archive:
                _require_room(sum(m.size for m in archive), folder, path)
                archive.extractall(folder, filter="data")
    except (
        EOFError,
        tarfile.TarError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise UserError(
            f"cannot unpack {path.name}: {error}; the archive is damaged or cut short, "
            "copy it again."
        ) from error


def _unpack_zip(path: pathlib.Path, folder: pathlib.Path, skip_encrypted: bool) -> None:
    with zipfile.ZipFile(path) as archive:
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
        _require_room(sum(m.file_size for m in members), folder, path)
        archive.extractall(folder)


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
      UserError: pyarrow is missing, or a file has other columns.
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
                if data is None:
                    raise UserError(
                        f"{path.name} holds links to images, not the images; take a "
                        "mirror that holds them."
                    )
                yield data, int(row["label"])
    except (KeyError, TypeError, OSError, pyarrow.ArrowException) as error:
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
