"""Images below a folder or in zip files, in order, and what is in them.

Folders are walked to any depth, as for training (`abe_jax.data.datasets.tree`): links
to folders are followed; hidden files, system folders and workdirs of runs are left out.
Images may lie loose or in zip files. A name is the path below the folder with forward
slashes, that of an image in a zip file goes on inside it: `trips/oslo.jpg`,
`trips/rome.zip/day 1/forum.png`. Names keep the bytes of the file system
(`surrogateescape`): `os.fsencode(name)` gives them back.
"""

import collections
import dataclasses
import itertools
import os
import pathlib
import threading
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

import numpy as np

from abe_jax.data.datasets.tree import (
    SYSTEM_FOLDERS,
    Tree,
    Zip,
    local,
    member_path,
    printable,
)
from abe_jax.data.decoding import MAX_BYTES, SUFFIXES
from abe_jax.errors import UserError

Path: TypeAlias = str | os.PathLike[str]

_AHEAD = 256  # images that are decoded before they are asked for, at most
_OPEN_ZIPS = 128  # at once: systems bound the number of open files


@dataclasses.dataclass(frozen=True, slots=True)
class ImageFile:
    """An image on disk, read when asked.

    Attributes:
      name: as the module says; unique below one folder.
      path: of the image, or of the zip file that holds it.
      member: its number in the zip file; None for a loose image.
      version: two numbers that change with the content: size and time of change of a
        loose image, size and checksum in a zip file.
    """

    name: str
    path: pathlib.Path
    member: int | None
    version: tuple[int, int]


def find(path: Path, what: str = "images") -> list[ImageFile]:
    """Lists the images of a folder, of a zip file, or the one image, sorted by name.

    Args:
      path: of the folder, zip file or image.
      what: the flag or argument that gave it, for messages.

    Raises:
      UserError: nothing is there, it holds no images, or a folder cannot be read.
    """
    path = local(path, what)
    if path.is_dir():
        found = _in_folder(path)
    elif path.suffix.lower() == ".zip" and path.is_file():
        found = _in_zip(path, "")
    elif path.is_file():
        found = [_loose(path, path.name)]
    else:
        raise UserError(
            f"{printable(path)!r} does not exist; give an image, a folder or a zip "
            "file."
        )
    if not found:
        raise UserError(
            f"{printable(path)!r} holds no images; they end in {', '.join(SUFFIXES)}."
        )
    return sorted(found, key=lambda image: image.name)


class Reader:
    """Reads images of `find`; safe to use from many threads. Close it at the end."""

    def __init__(self):
        self._zips: dict[pathlib.Path, zipfile.ZipFile] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_) -> None:
        for archive in self._zips.values():
            archive.close()

    def read(self, image: ImageFile) -> bytes:
        """The content of an image file.

        Raises:
          UserError: it cannot be read, or its zip file is no longer that of `find`.
        """
        if image.version[0] > MAX_BYTES:
            raise UserError(
                f"{printable(image.name)} is larger than {MAX_BYTES} bytes."
            )
        try:
            if image.member is None:
                if image.name.lower().endswith(".zip"):
                    zipfile.ZipFile(image.path).close()  # says what is wrong with it
                return image.path.read_bytes()
            archive = self._open(image.path)
            found = archive.infolist()[image.member : image.member + 1]
            # Packed anew, a zip file has another image by that number, or none.
            if [_version(member) for member in found] != [image.version]:
                raise UserError(
                    f"cannot read {printable(image.name)}: its zip file has changed "
                    "since it was listed."
                )
            (member,) = found
            return archive.read(member)
        except UserError:
            raise
        except Exception as error:  # a damaged zip file fails in many ways
            raise UserError(f"cannot read {printable(image.name)}: {error}.") from error

    def _open(self, path: pathlib.Path) -> zipfile.ZipFile:
        with self._lock:
            if path not in self._zips:
                # Those that nobody reads any more close themselves.
                while len(self._zips) >= _OPEN_ZIPS:
                    del self._zips[next(iter(self._zips))]
                self._zips[path] = zipfile.ZipFile(path)
            return self._zips[path]


def decoded(
    files: Iterable[ImageFile],
    decode: Callable[[bytes, str], np.ndarray],
) -> Iterator[tuple[ImageFile, np.ndarray | UserError]]:
    """Reads and decodes images by threads, in order, a few ahead of whoever asks.

    Args:
      files: as returned by `find`.
      decode: content and name to pixels; what it raises as UserError is handed on.

    Yields:
      each image with its pixels, or with the reason why there are none.
    """
    threads = len(os.sched_getaffinity(0))
    with Reader() as reader, ThreadPoolExecutor(threads) as pool:

        def one(file: ImageFile) -> tuple[ImageFile, np.ndarray | UserError]:
            try:
                return file, decode(reader.read(file), printable(file.name))
            except UserError as error:
                # Where the error is kept, its frames would keep the content alive too.
                link: BaseException | None = error
                while link is not None:
                    link.__traceback__ = None
                    link = link.__context__
                return file, error

        rest = iter(files)
        ahead = collections.deque(
            pool.submit(one, file)
            for file in itertools.islice(rest, min(16 * threads, _AHEAD))
        )
        try:
            while ahead:
                result = ahead.popleft().result()
                ahead.extend(
                    pool.submit(one, file) for file in itertools.islice(rest, 1)
                )
                yield result
        finally:
            for future in ahead:
                future.cancel()


def _in_folder(path: pathlib.Path) -> list[ImageFile]:
    found = []
    tree = Tree.of(path)
    tree.log_left_out()
    for name, place in tree.files.items():
        file = pathlib.Path(place)
        if name.lower().endswith(SUFFIXES):
            found.append(_loose(file, name))
        elif name.lower().endswith(".zip"):
            try:
                found += _in_zip(file, f"{name}/")
            except UserError:  # reading it will tell, like a broken image's
                found.append(_loose(file, name))
    return found


def _loose(path: pathlib.Path, name: str) -> ImageFile:
    try:
        status = path.stat()
    except OSError:  # a link to nothing, say: reading it will tell
        return ImageFile(name, path, None, (0, 0))
    return ImageFile(name, path, None, (status.st_size, status.st_mtime_ns))


def _in_zip(path: pathlib.Path, prefix: str) -> list[ImageFile]:
    try:
        with Zip(path) as archive:
            members = archive.infolist()
    except Exception as error:  # as above
        raise UserError(f"{printable(path)!r} is no zip file ({error}).") from error
    # Of two members of one name the later one counts, as for every unpacker.
    found = {
        name: ImageFile(prefix + name, path, number, _version(member))
        for number, member in enumerate(members)
        if member.filename.lower().endswith(SUFFIXES)
        and all(map(_is_visible, (name := member_path(member.filename)).split("/")))
    }
    return list(found.values())


def _version(member: zipfile.ZipInfo) -> tuple[int, int]:
    return member.file_size, member.CRC


def _is_visible(name: str) -> bool:
    return not name.startswith(".") and name not in SYSTEM_FOLDERS
