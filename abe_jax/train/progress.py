"""What is shown and logged of the steps, without making the device wait."""

import contextlib
import logging
import math
import sys
import time

import jax
import tqdm

from abe_jax import command_line, processes
from abe_jax.workdir import checkpoints, metrics

_log = logging.getLogger(__name__)


class Reporter:
    """Fetches a step's metrics once the next step is under way, and logs them.

    So the device never waits for the host, and the host is at most a step ahead.
    """

    def __init__(self, writer: metrics.Writer, config, start: int):
        self._writer = writer
        self._config = config
        self._first = start + 1
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        self._progress = _Progress(
            start=start,
            stop=config.steps,
            batch_size=config.batch_size,
            shown=processes.is_first(),
        )
        self.restart_clock()

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, *_) -> None:
        self._progress.close()

    def restart_clock(self) -> None:
        """Leaves what came before out of images/s."""
        self._since = time.perf_counter()
        self._images = 0

    def add(self, step: int, arrays: dict[str, jax.Array]) -> None:
        """Takes the metrics of a step that was just started."""
        if step == self._first:
            # Until here: compilation, and the first batch.
            seconds = time.perf_counter() - self._since
            self._progress.line(f"the first step was ready after {seconds:.0f} s")
            self._writer.write(step, {"train/seconds_to_first_step": seconds})
            self.restart_clock()
        self.flush()
        self._pending = (step, arrays)

    def flush(self) -> None:
        """Waits for the last step that was added, and logs it."""
        if self._pending is None:
            return
        step, arrays = self._pending
        self._pending = None
        values = {k: float(v) for k, v in jax.device_get(arrays).items()}
        loss = values["loss"]
        for name in ("loss", "gradient_norm"):
            if not math.isfinite(values[name]):
                raise checkpoints.NotFinite(
                    f"the {name.replace('_', ' ')} is {values[name]} at step {step}, "
                    "which is not saved; lower train.learning_rate or set "
                    "train.clip_norm, and run the command again to go on from the "
                    "newest checkpoint."
                )
        self._images += self._config.batch_size
        rate = self._images / (time.perf_counter() - self._since)
        self._progress.update(step, loss, rate)
        is_last = step == self._config.steps
        if step == 1 or step % self._config.log_every == 0 or is_last:
            values["images_per_second"] = rate
            self._writer.write(step, {f"train/{k}": v for k, v in values.items()})
            self._progress.log_step(step, loss, rate)
            self.restart_clock()

    def log_evaluation(self, step: int, evaluation: dict) -> None:
        """Shows the main figures of an evaluation, and restarts the clock."""
        k, recall = next(iter(evaluation["recall"].items()))
        mean = evaluation["mean_learner"]["recall"][k]
        self._progress.line(
            f"evaluation at step {step}: Recall@{k} {recall:.4f}, "
            f"mean learner {mean:.4f}"
        )
        self.restart_clock()


class _Progress:
    """A bar on a terminal, plain lines elsewhere, nothing where not wanted."""

    def __init__(self, *, start: int, stop: int, batch_size: int, shown: bool = True):
        """Shows a run from step `start` to step `stop`."""
        self._stop = stop
        self._batch_size = batch_size
        self._shown = shown
        self._bar = None
        if shown and not command_line.is_quiet() and sys.stderr.isatty():
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
            with contextlib.suppress(OSError):  # of a terminal that is gone
                self._bar.write(text, file=sys.stderr)
        elif self._shown:
            _log.info("%s", text)

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()
