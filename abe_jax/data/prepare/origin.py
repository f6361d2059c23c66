"""What a data set was prepared from and how, so that a change of it is noticed."""

import dataclasses
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Iterable, Mapping

from abe_jax.data.datasets.tree import Tree
from abe_jax.data.decoding import SUFFIXES
from abe_jax.data.prepare.encoding import Storing
from abe_jax.errors import UserError

ORIGIN_FILE = "origin.json"
_UNREADABLE = -1  # in place of a size
_QUICK = 64 * 2**20  # bytes; no annotations are larger, but films among photos are


@dataclasses.dataclass(frozen=True)
class Seen:
    """What a source held before anything was made of it.

    Attributes:
      time: when that was, nanoseconds since the epoch.
      files: relative path of each file, "" of an archive -> its path and its size.
    """

    time: int
    files: dict[str, tuple[str, int]]


def look(source: pathlib.Path) -> Seen:
    """Lists a source, before it is read, so that files added later count as new."""
    now = time.time_ns()
    files = _files(source)
    return Seen(now, {name: (path, _size(path)) for name, path in files.items()})


def write(
    folder: pathlib.Path,
    seen: Seen,
    storing: Storing,
    digests: Mapping[str, bytes | None],
) -> None:
    """Notes the size and, where it is known or quickly made, the digest of each file.

    Args:
      folder: of the prepared data set.
      seen: what the source held that it was made from.
      storing: how images were stored.
      digests: path of an image file -> its `digest`; None where it was not stored.
    """
    files = {}
    for name, (path, size) in seen.files.items():
        known = digests.get(path)
        if known is None and (path in digests or _is_digested(name, size)):
            try:
                known = digest(path)
            except OSError:  # a link to nothing, say: nothing was made of it
                size = _UNREADABLE
        files[name] = size, known.hex() if known else None
    noted = {"storing": dataclasses.asdict(storing), "time": seen.time, "files": files}
    (folder / ORIGIN_FILE).write_text(json.dumps(noted))


def refuse_other(folder: pathlib.Path, source: pathlib.Path, storing: Storing) -> None:
    """Refuses what a prepared data set was not made from, or not in this way.

    Raises:
      UserError: files or the way of storing differ; the difference is shown.
    """
    path = folder / ORIGIN_FILE
    try:
        noted = json.loads(path.read_text())
        there, files = Storing(**noted["storing"]), noted["files"]
        looked = noted["time"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"cannot read {path}: {error}; delete {folder} and prepare it again."
        ) from error
    if _applied(there) != _applied(storing):
        raise UserError(
            f"{folder} is prepared with {_words(there)}, not with {_words(storing)}; "
            "delete it or choose another --data_dir."
        )
    found = _differences(files, _files(source), looked)
    if found:
        raise UserError(
            f"{folder} was not prepared from what {source} holds now: "
            f"{'; '.join(found)}. Delete it or choose another --data_dir."
        )


def digest(path: str) -> bytes:
    """Of the content of a file, 16 bytes; that of `encoding.Encoded.digest`."""
    made = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(2**20):
            made.update(block)
    return made.digest()


def _size(path: str) -> int:
    try:
        return os.path.getsize(path)
    except OSError:
        return _UNREADABLE


def _is_digested(name: str, size: int) -> bool:
    """True of annotations (small files, no images) and of an archive as the source."""
    return not name or size <= _QUICK and not name.lower().endswith(SUFFIXES)


def _applied(storing: Storing) -> Storing:
    """The settings that have an effect: `size` has none where images keep theirs."""
    return dataclasses.replace(storing, size=0) if storing.keep_original else storing


def _differences(
    noted: Mapping[str, tuple[int, str | None]], now: Mapping[str, str], time: int
) -> list[str]:
    def changed(name: str) -> bool:
        size, known = noted[name]
        if size == _UNREADABLE:
            return os.access(now[name], os.R_OK)
        try:
            status = os.stat(now[name])
            if status.st_size != size:
                return True
            # Being newer is not enough: files that were only copied are newer, too.
            newer = max(status.st_mtime_ns, status.st_ctime_ns) >= time
            return newer and known is not None and digest(now[name]).hex() != known
        except OSError:  # it could be read when it was prepared
            return True

    both = sorted(noted.keys() & now.keys())
    found = [
        ("new", sorted(now.keys() - noted.keys())),
        ("gone", sorted(noted.keys() - now.keys())),
        ("changed", list(filter(changed, both))),
    ]
    return [f"{len(names):,} {how}, {_few(names)}" for how, names in found if names]


def _few(names: Iterable[str]) -> str:
    first, *others = names
    return repr(first) + (" ..." if others else "")


def _files(source: pathlib.Path) -> dict[str, str]:
    """Files of a folder by relative path; an archive, whatever its name, by ""."""
    return Tree.of(source).files if source.is_dir() else {"": str(source)}


def _words(storing: Storing) -> str:
    short = f"a short side of {storing.size}"
    size = "original sizes" if storing.keep_original else short
    return f"{size} and quality {storing.quality}"
