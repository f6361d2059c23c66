"""The folder of a run: names of what is where, and how it is written.

config.json        the run's config                              config_files, claim
data.json          what data it began with                       claim
changes.jsonl      fields that were changed on the way           claim
lock               held by the process that trains               lock
checkpoints/STEP/  state after a step, and the config            checkpoints
damaged_checkpoints/STEP/  set aside                             checkpoints
metrics.jsonl      a line for each logged step                   metrics
events*            the same for TensorBoard                      metrics
trackers.json      runs at experiment trackers                   trackers
evaluation.json    the newest evaluation                         abe_jax.evaluate
report.html        its page                                      abe_jax.report
index/             embeddings of searched folders                abe_jax.apply.index
plugins/profile/   a trace of some steps                         trace
search.html        the page of the newest search                 abe_jax.apply.search
"""

import contextlib
import errno
import os
import pathlib
from collections.abc import Iterator

from abe_jax.errors import UserError

CONFIG_FILE = "config.json"
DATA_FILE = "data.json"
CHANGES_FILE = "changes.jsonl"
LOCK_FILE = "lock"
CHECKPOINTS_FOLDER = "checkpoints"
METRICS_FILE = "metrics.jsonl"
EVALUATION_FILE = "evaluation.json"
REPORT_FILE = "report.html"


class NotWritable(UserError):
    """The disk is full, or the workdir may not be written to."""


def locate(workdir: str | os.PathLike[str]) -> pathlib.Path:
    """The folder that `--workdir` means; `~` is the home folder.

    Raises:
      UserError: it is empty, or a remote path such as gs://bucket/run.
    """
    text = os.fspath(workdir)
    if "://" in text:
        raise UserError(
            f"--workdir={text} is a remote path; give a local folder (a bucket can be "
            "mounted as one, or the finished run copied to it)."
        )
    if not text.strip():
        raise UserError("--workdir is empty; give the folder of the run.")
    try:
        return pathlib.Path(text).expanduser()
    except RuntimeError as error:  # no home folder to be found
        raise UserError(f"--workdir={text}: {error}") from error


def write_whole(path: pathlib.Path, text: str) -> None:
    """Writes a file whole or not at all, even if the power fails.

    Raises:
      NotWritable: such as on a full disk; what was there before still is.
    """
    with writing():
        with whole(path) as part:
            with part.open("w", encoding="utf-8", errors="surrogateescape") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        sync_folder(path.parent)


@contextlib.contextmanager
def whole(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives a path to write to: this process's own, moved to the file's at the end.

    What raises inside leaves the file as it was, and nothing beside it.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield part
        part.replace(path)
    finally:
        with contextlib.suppress(OSError):  # what went wrong before counts
            part.unlink()


@contextlib.contextmanager
def writing() -> Iterator[None]:
    """Turns the errors of a full disk and its kin into what the user can mend."""
    try:
        yield
    except OSError as error:
        advice = "give a --workdir that can be written to."
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            advice = "make room there, and run the same command again to go on."
        raise NotWritable(f"cannot write to --workdir: {error}; {advice}") from error


def sync_folder(folder: pathlib.Path) -> None:
    """Makes new names in a folder survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
