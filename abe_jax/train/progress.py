"""What is shown and logged of the steps, without making the device wait."""

import math
import time

import jax

from abe_jax import processes
from abe_jax.workdir import checkpoints, metrics


class Reporter:
    """Fetches a step's metrics once the next step is under way, and logs them.

    So the device never waits for the host, and the host is at most a step ahead.
    """

    def __init__(self, writer: metrics.Writer, config, start: int):
        self._writer = writer
        self._config = config
        self._first = start + 1
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        self._progress = metrics.Progress(
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
