"""Metrics of a run: JSON lines for programs, TensorBoard and a bar for people."""

import json
import logging
import pathlib
import sys
from collections.abc import Mapping
from typing import TypeAlias

import tensorboardX
import tqdm

METRICS_FILE = "metrics.jsonl"

_log = logging.getLogger(__name__)


class MetricWriter:
    """Appends to `metrics.jsonl` and to TensorBoard's event files.

    Meant for process 0 only.
    """

    def __init__(self, workdir: pathlib.Path, *, resume_step: int):
        """Opens the files, and drops what an interrupted run wrote past the resume.

        Args:
          workdir: of the run.
          resume_step: step of the restored checkpoint; 0 for a new run.
        """
        path = workdir / METRICS_FILE
        kept = read(workdir, resume_step)
        part = path.with_suffix(".part")
        part.write_text("".join(json.dumps(m) + "\n" for m in kept))
        part.replace(path)
        self._file = path.open("a")
        self._board = tensorboardX.SummaryWriter(
            str(workdir), purge_step=resume_step + 1 if kept else None
        )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes one line of metrics of a step."""
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            # TensorBoard allows no "@" in names.
            self._board.add_scalar(name.replace("@", "_at_"), value, step)

    def close(self) -> None:
        """Writes what is buffered."""
        self._file.close()
        self._board.close()


class NoWriter:
    """Stands in for a `MetricWriter` on all processes but the first."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


Writer: TypeAlias = MetricWriter | NoWriter


def read(workdir: pathlib.Path, last_step: int | None = None) -> list[dict]:
    """The lines of `metrics.jsonl`; a last line cut short by a kill is left out.

    Args:
      workdir: of the run.
      last_step: leave out the lines of later steps.
    """
    path = workdir / METRICS_FILE
    lines = path.read_text().splitlines() if path.exists() else []
    metrics = []
    for line in lines:
        try:
            metrics.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return [m for m in metrics if last_step is None or m["step"] <= last_step]


class Progress:
    """A bar on a terminal, plain lines elsewhere, nothing where not wanted."""

    def __init__(self, *, start: int, stop: int, batch_size: int, shown: bool = True):
        """Shows a run from step `start` to step `stop`."""
        self._stop = stop
        self._batch_size = batch_size
        self._shown = shown
        self._bar = None
        if shown and sys.stderr.isatty():
            self._bar = tqdm.tqdm(
                total=stop, initial=start, unit="step", dynamic_ncols=True
            )

    def update(self, step: int, loss: float, images_per_second: float) -> None:
        """Moves the bar, where there is one, to a step that is done."""
        if self._bar is not None:
            self._bar.set_postfix_str(
                f"loss {loss:.3f}, {images_per_second:.0f} images/s", refresh=False
            )
            self._bar.update(step - self._bar.n)

    def log_step(self, step: int, loss: float, images_per_second: float) -> None:
        """Tells of a step in a plain line, where there is no bar."""
        if self._bar is None:
            seconds = (self._stop - step) * self._batch_size / images_per_second
            self.line(
                f"step {step} of {self._stop}: loss {loss:.4f}, "
                f"{images_per_second:.0f} images/s, {seconds / 60:.1f} minutes left"
            )

    def line(self, text: str) -> None:
        """Shows a line of text without breaking the bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        elif self._shown:
            _log.info("%s", text)

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()
