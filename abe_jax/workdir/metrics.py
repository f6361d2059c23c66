"""Metrics of a run: JSON lines for programs, TensorBoard for people."""

import contextlib
import errno
import json
import logging
import math
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from abe_jax.workdir import METRICS_FILE, write_whole, writing


@contextlib.contextmanager
def _as_if_not_installed(package: str) -> Iterator[None]:
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        del sys.modules[package]


# tensorboardX imports PyTorch where it can, for seconds; scalars do not need it.
with _as_if_not_installed("torch"):
    from tensorboardX import event_file_writer, summary
    from tensorboardX.proto import event_pb2

_log = logging.getLogger(__name__)
_messages: Any = event_pb2  # protobuf makes their classes when it is imported


class MetricWriter:
    """Appends to `metrics.jsonl` and to TensorBoard's event files.

    A line is in the file whole or not at all. Meant for process 0 only.
    """

    def __init__(
        self, workdir: pathlib.Path, *, resume_step: int, evaluates: bool = False
    ):
        """Opens the files, and drops what an interrupted run wrote past the resume.

        Args:
          workdir: of the run.
          resume_step: step of the restored checkpoint; 0 for a new run.
          evaluates: whether that step will be evaluated; if so, an old evaluation goes.

        Raises:
          NotWritable: such as on a full disk.
        """
        kept = [
            line
            for line in read(workdir, resume_step)
            if not (evaluates and line["step"] == resume_step and _is_evaluation(line))
        ]
        path = workdir / METRICS_FILE
        purged_from = resume_step + 1 if path.exists() else None
        write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))
        with writing():
            self._file = path.open("ab", buffering=0)
            self._board = _Board(workdir, purged_from)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes one line of metrics of a step; what is not finite is null there.

        Raises:
          NotWritable: such as on a full disk; half a line is never left.
        """
        finite = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        line = json.dumps({"step": step, **finite}) + "\n"
        end = os.fstat(self._file.fileno()).st_size
        with writing():
            if self._file.write(line.encode()) != len(line):
                os.ftruncate(self._file.fileno(), end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._board.write(step, metrics)

    def sync(self) -> None:
        """Returns when all lines would survive a power failure.

        Raises:
          NotWritable: such as on a full disk.
        """
        with writing():
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
        self._board.close()


class NoWriter:
    """Stands in for a `MetricWriter` on all processes but the first."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Does nothing."""

    def sync(self) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


class Writer(Protocol):
    """What the loop needs of a writer: a `MetricWriter` or what stands in for it."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def sync(self) -> None: ...

    def close(self) -> None: ...


class _Board:
    """TensorBoard's event files, written at once: tensorboardX's own writer leaves it
    to a thread, which dies of a full disk, and then waits for it for ever."""

    def __init__(self, workdir: pathlib.Path, purge_step: int | None):
        self._events = event_file_writer.EventsWriter(str(workdir / "events"))
        if purge_step is not None:
            start = _messages.SessionLog(status=_messages.SessionLog.START)
            self._add(purge_step, session_log=start)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            # TensorBoard allows no "@" in names.
            scalar = summary.scalar(name.replace("@", "_at_"), value)
            self._add(step, summary=scalar)
        self._events.flush()

    def _add(self, step: int, **content) -> None:
        event = _messages.Event(wall_time=time.time(), step=step, **content)
        self._events.write_event(event)

    def close(self) -> None:
        try:
            self._events.close()
        except OSError as error:  # the lines are what counts
            _log.warning("TensorBoard's file is cut short: %s", error)


def read(workdir: pathlib.Path, last_step: int | None = None) -> list[dict]:
    """The lines of `metrics.jsonl`; a last line cut short by a kill is left out.

    Args:
      workdir: of the run.
      last_step: leave out the lines of later steps.
    """
    path = workdir / METRICS_FILE
    lines = path.read_bytes().splitlines() if path.exists() else []
    metrics = []
    for line in lines:
        try:
            content = json.loads(line)
        except ValueError:
            content = None
        if not isinstance(content, dict) or not isinstance(content.get("step"), int):
            _log.warning("%s: what follows line %d is damaged.", path, len(metrics))
            break
        metrics.append(content)
    return [m for m in metrics if last_step is None or m["step"] <= last_step]


def evaluation_at(workdir: pathlib.Path, step: int) -> dict[str, float] | None:
    """The metrics of a step's evaluation, for people to compare with."""
    lines = [m for m in read(workdir, step) if m["step"] == step and _is_evaluation(m)]
    return {k: v for k, v in lines[-1].items() if k != "step"} if lines else None


def _is_evaluation(line: Mapping[str, float]) -> bool:
    return any(name.startswith("eval/") for name in line)
