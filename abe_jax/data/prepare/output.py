"""Where a data set is written: by one process at a time, whole or not at all.

Nothing is ever deleted but the one folder of unfinished work that this module makes
and marks as its own.
"""

import contextlib
import errno
import fcntl
import logging
import os
import pathlib
import shutil
from collections.abc import Iterator

from abe_jax.errors import UserError

_log = logging.getLogger(__name__)

UNFINISHED = "unfinished.abe_jax"
_MARK = "made_by_abe_jax_prepare"
_LOCK = ".lock"


def refuse_nested(source: pathlib.Path, folder: pathlib.Path) -> None:
    """Refuses a source inside its own output, and an output inside the source.

    Raises:
      UserError: one of the two lies in the other.
    """
    inner, outer = pathlib.Path(os.path.realpath(source)), os.path.realpath(folder)
    if inner.is_relative_to(outer):
        raise UserError(
            f"--source {str(source)!r} lies inside {str(folder)!r}, where the prepared "
            "data set would be written; choose another --data_dir."
        )
    if pathlib.Path(outer).is_relative_to(inner):
        raise UserError(
            f"{str(folder)!r}, where the prepared data set would be written, lies "
            f"inside --source {str(source)!r}; choose a --data_dir outside of it."
        )


@contextlib.contextmanager
def only_one(folder: pathlib.Path) -> Iterator[None]:
    """Makes a folder, and refuses a second process in it while the first one lives.

    After an error what was made is removed again, unless there is something in it.

    Raises:
      UserError: another process is there.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _LOCK
    with open(path, "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(lock.fileno()).st_ino != os.stat(path).st_ino:
                raise BlockingIOError  # another one came, failed and removed it
        except OSError as error:
            if error.errno not in (None, errno.EACCES, errno.EAGAIN, errno.ENOENT):
                # Some network drives know no locks.
                _log.warning("%s cannot be locked (%s): start one only.", folder, error)
            else:
                raise UserError(
                    f"another process is preparing {folder}; wait for it or end it."
                ) from error
        try:
            yield
        except BaseException:
            if made and set(os.listdir(folder)) == {_LOCK}:
                path.unlink()
                with contextlib.suppress(OSError):  # somebody else uses it by now
                    for empty in made:
                        empty.rmdir()
            raise


@contextlib.contextmanager
def unfinished(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder for unfinished work, removed at the end; a killed run's is removed too.

    Raises:
      UserError: there is a folder of that name that this program did not make.
    """
    path = folder / UNFINISHED
    if path.exists() and not (path / _MARK).exists() and os.listdir(path):
        raise UserError(
            f"{str(path)!r} was not made by this program; move it elsewhere, or choose "
            "another --data_dir."
        )
    _remove(path)
    path.mkdir()
    (path / _MARK).touch()
    try:
        yield path
    finally:
        _remove(path)


def _remove(path: pathlib.Path) -> None:
    """Removes the mark last: what an interruption leaves is still known as ours."""
    for child in path.glob("*/"):
        shutil.rmtree(child, ignore_errors=True)
    shutil.rmtree(path, ignore_errors=True)


def move(made: pathlib.Path, final: pathlib.Path) -> None:
    """Moves what is whole to where it belongs.

    Raises:
      UserError: something is there.
    """
    refuse_existing(final)
    made.rename(final)


def refuse_existing(final: pathlib.Path) -> None:
    """Refuses to write where something is that is no prepared data set.

    Raises:
      UserError: it is not free.
    """
    if os.path.lexists(final):
        raise UserError(
            f"{str(final)!r} exists but is no data set that was prepared whole; move "
            "it elsewhere, or choose another --data_dir."
        )


def disk_text(error: OSError, folder: pathlib.Path) -> str:
    """What to say of an error of the file system."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        there = next(p for p in (folder, *folder.parents) if p.exists())
        free = shutil.disk_usage(there).free / 2**20
        return (
            "the disk is full: nothing was kept, so that there are now "
            f"{free:,.0f} MiB left in {folder}. Make room or choose another "
            "--data_dir, and run again."
        )
    where = error.filename or folder
    return f"cannot read or write {str(where)!r}: {error.strerror or error}."
