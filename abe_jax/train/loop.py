"""The training loop: knows all parts, and the order in which they act."""

import contextlib
import json
import logging
import math
import pathlib
import signal
import time
from collections.abc import Callable, Sequence

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
from abe_jax.workdir import (
    EVALUATION_FILE,
    REPORT_FILE,
    NotWritable,
    checkpoints,
    claim,
    fields,
    locate,
    lock,
    metrics,
    trace,
    trackers,
    weights,
    writing,
)

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
      UserError: something in the config, the data or the workdir that the user can
        mend.
      Interrupted: SIGINT or SIGTERM; the state is saved.
    """
    # Whatever can be refused is refused before the workdir is written to.
    fields.require_in_range(config)
    folder = locate(workdir)
    claim.require_outside_data(folder, config.data.path)
    trackers.require_installed(config.train.trackers)
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
    resumes = bool(checkpoints.steps_in(folder))
    section = weights.model_section(config, restored=resumes)
    model = models.create(section, rngs=nnx.Rngs(config.seed))
    take_step = parallel.map_over_devices(
        train_step.make_train_step(model, optimiser, learning_rate, config),
        mesh,
        mapping=config.parallel.mapping,
        donate_state=True,
    )
    evaluator = evaluate.Evaluator(config, model, splits, mesh)

    with contextlib.ExitStack() as stack:
        _lock_together(folder, stack)
        steered = claim.require_own(folder, config, splits.description())
        saved = checkpoints.Checkpoints(folder, keep=config.train.keep_checkpoints)
        stack.callback(saved.close)
        state = train_step.initial_state(model, optimiser)
        if resumes:
            state = saved.restore(state, mesh)
            saved.set_damaged_aside(newest=int(state.step))
            _log.info("going on from the checkpoint of step %d", state.step)
        else:
            if (other := weights.run_of(config)) is not None:
                state = weights.start_from(state, other)
            state = parallel.replicate(state, mesh)
        start = step = int(state.step)
        if start > config.train.steps:
            raise UserError(
                f"train.steps = {config.train.steps}, but {folder} is at step {start} "
                "already; give as many or more."
            )
        known = _evaluation_of(folder, start, config.eval.recall_at)
        processes.wait_for_all("workdir read")
        writer: metrics.Writer = metrics.NoWriter()
        if processes.is_first():
            claim.claim(
                folder, config, splits.description(), steered=steered, step=start
            )
            _drop_later_evaluation(folder, start)
            writer = metrics.MetricWriter(
                folder, resume_step=start, evaluates=_is_evaluated(config.train, start)
            )
            writer = trackers.attach(writer, config.train.trackers, folder, config)
        stack.callback(writer.close)
        traced = config.train.profile_steps if processes.is_first() else 0
        profile = trace.Trace(folder, start=start, steps=traced)
        stack.callback(profile.close)
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

        def save() -> None:
            # What is logged up to a step is on the disk before its checkpoint is.
            reporter.flush()
            writer.sync()
            saved.save(state, config)
            reporter.restart_clock()

        scalars: dict[str, float] = {}
        try:
            while True:
                if _is_evaluated(config.train, step):
                    reporter.flush()
                    evaluation = None
                    if known is None or step > start:
                        evaluation = evaluator.run(state, stop.check)
                        known = evaluation.content
                    scalars = evaluate.scalars(known)
                    writer.write(step, scalars)
                    if evaluation is not None and processes.is_first():
                        with writing():
                            report.write(folder, evaluation)
                            # Last, as it says that the step is evaluated.
                            evaluate.write(folder, evaluation.content)
                    reporter.log_evaluation(step, known)
                if step == config.train.steps:
                    break
                stop.check()
                batch = parallel.split_rows(next(batches), mesh)
                profile.before_step(step, state)
                state, step_metrics = take_step(state, batch)
                step += 1
                reporter.add(step, step_metrics)
                if step % config.train.checkpoint_every == 0 or (
                    step == config.train.steps
                ):
                    save()
        except (checkpoints.NotFinite, NotWritable):
            raise
        except UserError:
            # Such as a broken image. Several processes can only save together.
            if jax.process_count() == 1:
                save()
            raise
        except _StopRequested:
            save()
            raise Interrupted(step, stop.signal_number) from None
    if processes.is_first():
        _show_result(folder, step, scalars, model.num_learners)
    return scalars


def _lock_together(folder: pathlib.Path, stack: contextlib.ExitStack) -> None:
    """Has process 0 hold the workdir; where it cannot, no process goes on."""
    refusal = None
    if processes.is_first():
        try:
            stack.enter_context(lock.hold(folder))
        except UserError as error:
            refusal = error
    if not processes.all_agree(refusal is None):
        raise refusal or UserError("process 0 cannot have the workdir, and says why.")


def _is_evaluated(config, step: int) -> bool:
    return step == config.steps or step % config.eval_every == 0


def _evaluation_of(
    folder: pathlib.Path, step: int, recall_at: Sequence[int]
) -> dict | None:
    """An earlier start's evaluation of a step, if it is complete and has these K."""
    found = None
    if (folder / REPORT_FILE).exists():
        # Whatever cannot be read is measured again.
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            content = json.loads((folder / EVALUATION_FILE).read_text())
            evaluate.scalars(content)
            ranks = tuple(int(k) for k in content["recall"])
            own = "other_data" not in content["protocol"]
            if own and content["step"] == step and ranks == tuple(recall_at):
                found = content
    return found if processes.all_agree(found is not None) else None


def _drop_later_evaluation(folder: pathlib.Path, step: int) -> None:
    """Removes what speaks of a step that this run will reach again."""
    path = folder / EVALUATION_FILE
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        if json.loads(path.read_text())["step"] > step:
            path.unlink()


def _show_result(
    folder: pathlib.Path, step: int, trained: dict[str, float], learners: int
) -> None:
    columns = {f"step {step}": trained}
    untrained = metrics.evaluation_at(folder, 0)
    # It may have been measured for other K.
    if untrained is not None and trained.keys() <= untrained.keys():
        columns = {"untrained": untrained, **columns}
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

    def __enter__(self) -> "_Reporter":
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
