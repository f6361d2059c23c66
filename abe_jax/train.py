"""The training loop: knows all parts, and the order in which they act."""

import contextlib
import logging
import math
import pathlib
import signal
import time
from collections.abc import Callable

import jax
from flax import nnx

from abe_jax import (
    data,
    evaluate,
    models,
    optimizer,
    parallel,
    processes,
    report,
    train_step,
)
from abe_jax.data import samplers
from abe_jax.errors import UserError
from abe_jax.workdir import EVALUATION_FILE, REPORT_FILE
from abe_jax.workdir import checkpoints as checkpoint
from abe_jax.workdir import metrics as metric_writer

_log = logging.getLogger(__name__)


class Interrupted(Exception):
    """The run was asked to stop, and its state is saved.

    Attributes:
      signal_number: what asked: SIGINT or SIGTERM.
    """

    def __init__(self, step: int, signal_number: int):
        super().__init__(
            f"interrupted; step {step} is saved, run the same command to go on."
        )
        self.signal_number = signal_number


class LossNotFinite(UserError):
    """The loss is NaN or infinite: the state is not worth saving."""


class _StopRequested(Exception):
    """All processes know that one of them was asked to stop."""


def train_and_evaluate(config, workdir: str) -> dict[str, float]:
    """Trains, or goes on where the workdir's newest checkpoint ends.

    Args:
      config: as of a file in `configs/`.
      workdir: folder of the run; made if missing.

    Returns:
      the metrics of the last evaluation, as of `evaluate.scalars`.

    Raises:
      UserError: something in the config or the data that the user can mend.
      Interrupted: SIGINT or SIGTERM; the state is saved.
    """
    folder = pathlib.Path(workdir)
    mesh = parallel.make_mesh()
    parallel.require_divisible(config.train.batch_size, mesh, config.train.chunks)
    splits = data.create(config.data)
    sampler = samplers.create(
        splits.train.labels,
        name=config.data.sampler,
        batch_size=config.train.batch_size,
        images_per_class=config.data.images_per_class,
        seed=config.seed,
    )
    optimiser, learning_rate = optimizer.create(config.train)
    model = models.create(config.model, rngs=nnx.Rngs(config.seed))
    take_step = parallel.map_over_devices(
        train_step.make_train_step(model, optimiser, learning_rate, config),
        mesh,
        mapping=config.parallel.mapping,
        donate_state=True,
    )
    evaluator = evaluate.Evaluator(config, model, splits, mesh)
    checkpoint.claim_workdir(folder, config, write=processes.is_first())
    processes.wait_for_all("workdir")

    with contextlib.ExitStack() as stack:
        checkpoints = checkpoint.Checkpoints(folder, keep=config.train.keep_checkpoints)
        stack.callback(checkpoints.close)
        state = train_step.initial_state(model, optimiser)
        if checkpoints.steps:
            state = checkpoints.restore(state, mesh)
            _log.info("going on from the checkpoint of step %d", state.step)
        else:
            state = parallel.replicate(state, mesh)
        start = step = int(state.step)
        kept = metric_writer.read(folder, start)
        evaluated = {m["step"]: m for m in kept if "eval/map_at_r" in m}
        processes.wait_for_all("metrics read")
        writer = (
            metric_writer.MetricWriter(folder, resume_step=start)
            if processes.is_first()
            else metric_writer.NoWriter()
        )
        stack.callback(writer.close)
        reporter = stack.enter_context(_Reporter(writer, config.train, start))
        batches = data.train_batches(
            splits.train,
            sampler,
            start=start,
            stop=config.train.steps,
            reading=data.Reading.of_process(config.data, *processes.place()),
        )
        stack.callback(batches.close)
        stop = stack.enter_context(_StopRequest(processes.Vote(mesh)))
        try:
            while True:
                last = step == config.train.steps
                due = last or step % config.train.eval_every == 0
                if due and step not in evaluated:
                    reporter.flush()
                    evaluation = evaluator.run(state, stop.check)
                    evaluated[step] = evaluate.scalars(evaluation.content)
                    writer.write(step, evaluated[step])
                    if processes.is_first():
                        evaluate.write(folder, evaluation.content)
                        report.write(folder, evaluation)
                    reporter.tell_evaluation(step, evaluated[step])
                if last:
                    break
                stop.check()
                batch = parallel.split_rows(next(batches), mesh)
                state, metrics = take_step(state, batch)
                step += 1
                reporter.add(step, metrics)
                if step % config.train.checkpoint_every == 0 or (
                    step == config.train.steps
                ):
                    reporter.flush()
                    checkpoints.save(state, config)
                    reporter.restart_clock()
        except LossNotFinite:
            raise
        except UserError:
            # Such as a broken image. Several processes can only save together.
            if jax.process_count() == 1:
                checkpoints.save(state, config)
            raise
        except _StopRequested:
            reporter.flush()
            checkpoints.save(state, config)
            raise Interrupted(step, stop.signal_number) from None
    if processes.is_first():
        _show_result(evaluated[0], step, evaluated[step], model.num_learners, folder)
    return evaluated[step]


def _show_result(
    untrained: dict, step: int, trained: dict, learners: int, folder: pathlib.Path
) -> None:
    columns = {"untrained": untrained, f"step {step}": trained}
    print(evaluate.table(columns, learners))
    print(f"\n{folder / EVALUATION_FILE}\n{folder / REPORT_FILE}")


class _StopRequest:
    """Remembers SIGINT or SIGTERM; the second one acts as if nobody listened."""

    def __init__(self, vote: processes.Vote):
        self._vote = vote
        self._requested = 0
        self._before: dict[int, Callable | int | None] = {}

    def __enter__(self) -> "_StopRequest":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _) -> None:
        self._requested = number
        signal.signal(number, self._before[number])

    @property
    def signal_number(self) -> int:
        """What asked; SIGTERM where it was another process that was asked."""
        return self._requested or signal.SIGTERM

    def check(self) -> None:
        """Raises _StopRequested, on all processes at once, when one was asked."""
        if self._vote(bool(self._requested)):
            raise _StopRequested


class _Reporter:
    """Fetches a step's metrics once the next step is under way, and tells of them.

    So the device never waits for the host, and the host is at most a step ahead.
    """

    def __init__(self, writer: metric_writer.Writer, config, start: int):
        self._writer = writer
        self._config = config
        self._first = start + 1
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        self._progress = metric_writer.Progress(
            start=start,
            stop=config.steps,
            batch_size=config.batch_size,
            shown=processes.is_first(),
        )
        self.restart_clock()

    def __enter__(self) -> "_Reporter":
        return self

    def __exit__(self, *_) -> None:
        self._progress.close()

    def restart_clock(self) -> None:
        """Leaves what came before out of images/s."""
        self._since = time.perf_counter()
        self._images = 0

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes the metrics of a step that was just started."""
        if step == self._first:
            # Until here: compilation, and the first batch.
            seconds = time.perf_counter() - self._since
            self._progress.line(f"the first step was ready after {seconds:.0f} s")
            self._writer.write(step, {"train/seconds_to_first_step": seconds})
            self.restart_clock()
        self.flush()
        self._pending = (step, metrics)

    def flush(self) -> None:
        """Waits for the last step that was added, and tells of it."""
        if self._pending is None:
            return
        step, arrays = self._pending
        self._pending = None
        metrics = {k: float(v) for k, v in jax.device_get(arrays).items()}
        loss = metrics["loss"]
        if not math.isfinite(loss):
            raise LossNotFinite(
                f"the loss is {loss} at step {step}; lower train.learning_rate or set "
                "train.clip_norm, and start again from the last checkpoint."
            )
        self._images += self._config.batch_size
        rate = self._images / (time.perf_counter() - self._since)
        self._progress.update(step, loss, rate)
        is_last = step == self._config.steps
        if step == 1 or step % self._config.log_every == 0 or is_last:
            metrics["images_per_second"] = rate
            self._writer.write(step, {f"train/{k}": v for k, v in metrics.items()})
            self._progress.log_step(step, loss, rate)
            self.restart_clock()

    def tell_evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Tells the main figures of an evaluation, and restarts the clock."""
        self._progress.line(
            f"evaluation at step {step}: Recall@1 "
            f"{metrics['eval/recall@1']:.4f}, mean learner "
            f"{metrics['eval/mean_learner/recall@1']:.4f}"
        )
        self.restart_clock()
