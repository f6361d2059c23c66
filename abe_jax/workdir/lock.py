"""Only one run at a time writes to a workdir."""

import contextlib
import errno
import fcntl
import logging
import os
import pathlib
import socket
from collections.abc import Iterator

from abe_jax.errors import UserError
from abe_jax.workdir import LOCK_FILE, writing

_log = logging.getLogger(__name__)

_HOLDER = "process "


def is_free_or_ours(workdir: pathlib.Path) -> bool:
    """Whether the lock's name is free, or its file is one that `hold` wrote."""
    path = workdir / LOCK_FILE
    try:
        with path.open("rb") as file:
            return file.read(len(_HOLDER)) in (b"", _HOLDER.encode())
    except FileNotFoundError:
        return True
    except OSError:  # `hold` will say why
        return not path.is_dir()


@contextlib.contextmanager
def hold(workdir: pathlib.Path) -> Iterator[None]:
    """Holds the workdir while the context lasts; the kernel lets go when we die.

    A record lock, as NFS has them too; child processes do not inherit it, so a worker
    that outlives its run keeps nobody out.

    Raises:
      UserError: another process holds it.
      NotWritable: the workdir cannot be made or written to.
    """
    with writing():
        workdir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(workdir / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                _log.warning(
                    "%s cannot be locked (%s): start one run only.", workdir, error
                )
            else:
                holder = os.read(descriptor, 200).decode(errors="replace").strip()
                raise UserError(
                    f"another run is training in {workdir} ({holder or 'unknown'}); "
                    "wait for its end, or give another --workdir."
                ) from error
        # For that message only: a full disk must not end a run here.
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, 0)
            text = f"{_HOLDER}{os.getpid()} on {socket.gethostname()}\n"
            os.pwrite(descriptor, text.encode(), 0)
        yield
    finally:
        os.close(descriptor)
