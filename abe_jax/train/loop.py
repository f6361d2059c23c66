"""The training loop: knows all parts, and the order in which they act."""

import contextlib
import json
import logging
import pathlib
import secrets
from collections.abc import Sequence

import jax
import numpy as np

from abe_jax import data, evaluate, parallel, processes, report
from abe_jax.errors import UserError
from abe_jax.interrupts import Interrupted
from abe_jax.train import features, setup
from abe_jax.train.progress import Reporter
from abe_jax.train.stop import StopRequest, StopRequested
from abe_jax.train_step import TrainState
from abe_jax.workdir import (
    EVALUATION_FILE,
    REPORT_FILE,
    NotWritable,
    checkpoints,
    claim,
    locate,
    lock,
    metrics,
    trace,
    trackers,
    weights,
    writing,
)

_log = logging.getLogger(__name__)


def train_and_evaluate(config, workdir: str) -> dict[str, float]:
    """Trains, or goes on where the workdir's newest checkpoint ends.

    Args:
      config: as a file in `configs/` makes it.
      workdir: folder of the run; made if missing.

    Returns:
      the metrics of the last evaluation, as returned by `evaluate.scalars`.

    Raises:
      UserError: something in the config, the data or the workdir that the user can
        mend.
      Interrupted: SIGINT, SIGTERM or SIGHUP; the state is saved.
    """
    # Whatever can be refused is refused before the workdir is written to.
    folder = locate(workdir)
    setup.check(config, folder)
    resumes = bool(checkpoints.steps_in(folder))
    if resumes:
        config = claim.with_own_weights(folder, config)
    run = setup.create(config, restored=resumes)
    mesh, splits = run.mesh, run.splits
    evaluator = evaluate.Evaluator(config, run.model, splits, mesh)

    with contextlib.ExitStack() as stack:
        _lock_together(folder, stack)
        if bool(checkpoints.steps_in(folder)) != resumes:
            raise UserError(
                f"another run in {folder} ended just now; run the same command again."
            )
        known_data = splits.description()
        claim.require_one_for_all(config, known_data)
        steered = claim.require_own(folder, config, known_data)
        # It also listens while `close` waits for a checkpoint to be written.
        stop = stack.enter_context(StopRequest(processes.Vote(mesh)))
        saved = checkpoints.Checkpoints(folder, keep=config.train.keep_checkpoints)
        stack.callback(saved.close)
        state = _restored(run, saved) if resumes else _fresh(run, config)
        start = step = int(state.step)
        if start > config.train.steps:
            raise UserError(
                f"train.steps = {config.train.steps}, but {folder} is at step {start} "
                "already; give as many or more."
            )
        known = None
        if resumes:  # without a checkpoint, an evaluation may be of other weights
            known = _evaluation_of(folder, start, config.eval.recall_at)
        processes.wait_for_all("workdir read")
        writer: metrics.Writer = metrics.NoWriter()
        if processes.is_first():
            claim.claim(folder, config, known_data, steered=steered, step=start)
            writer = _writer(folder, config, start)
        stack.callback(writer.close)
        traced = config.train.profile_steps if processes.is_first() else 0
        profile = trace.Trace(folder, start=start, steps=traced)
        stack.callback(profile.close)
        reporter = stack.enter_context(Reporter(writer, config.train, start))

        def save() -> None:
            # What is logged up to a step is on the disk before its checkpoint is.
            reporter.flush()
            writer.sync()
            saved.save(state, config)
            reporter.restart_clock()

        scalars: dict[str, float] = {}
        try:
            trained_on = splits.train
            if config.data.feature_cache and start < config.train.steps:
                trained_on = features.cached(
                    trained_on, config, run.model, state, mesh, stop.check
                )
            batches = data.train_batches(
                trained_on,
                run.sampler,
                start=start,
                stop=config.train.steps,
                reading=data.Reading.of_process(config.data, *processes.place()),
            )
            stack.callback(batches.close)
            while True:
                if is_evaluated(config.train, step):
                    reporter.flush()
                    evaluation = None
                    if known is None or step > start:
                        evaluation = evaluator.run(state, stop.check)
                        known = evaluation.content
                    scalars = evaluate.scalars(known)
                    writer.write(step, scalars)
                    if evaluation is not None and processes.is_first():
                        report.write(folder, evaluation)
                        # Last, as it says that the step is evaluated.
                        evaluate.write(folder, evaluation.content)
                    reporter.log_evaluation(step, known)
                if step == config.train.steps:
                    break
                stop.check()
                batch = parallel.split_rows(next(batches), mesh)
                profile.before_step(step, state)
                state, step_metrics = run.take_step(state, batch)
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
        except StopRequested:
            save()
            raise Interrupted(step, stop.signal_number) from None
    if processes.is_first():
        _show_result(folder, step, scalars, run.model.num_learners)
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
        raise refusal or UserError(
            "process 0 could not lock the workdir; its message says why."
        )
    if jax.process_count() > 1:
        _require_one_folder(folder)


def _require_one_folder(folder: pathlib.Path) -> None:
    """Refuses a workdir that some process does not see: checkpoints would wait for it.

    Raises:
      UserError: on every process.
    """
    # A new name, which no file system can have found missing before.
    number = processes.gather(np.array([secrets.randbits(31)], np.int32))[0, 0]
    mark = folder / f".seen-by-all-{number}"
    if processes.is_first():
        with writing():
            mark.touch()
    processes.wait_for_all("workdir marked")
    shared = processes.all_agree(mark.exists())
    if processes.is_first():
        mark.unlink()
    if not shared:
        raise UserError(
            f"--workdir={folder} is not one folder for all processes; give one that "
            "every host sees, as on a network drive."
        )


def _fresh(run: setup.Setup, config) -> TrainState:
    """The state before the first step, on every device."""
    state = run.initial_state()
    if (other := weights.run_of(config)) is not None:
        state = weights.start_from(state, other)
    return parallel.replicate(state, run.mesh)


def _restored(run: setup.Setup, saved: checkpoints.Checkpoints) -> TrainState:
    """The state of the newest checkpoint, on every device."""
    state = saved.restore(jax.eval_shape(run.initial_state), run.mesh)
    saved.set_damaged_aside(newest=int(state.step))
    _log.info("resuming from the checkpoint of step %d", state.step)
    return state


def _writer(folder: pathlib.Path, config, start: int) -> metrics.Writer:
    """What metrics are written to; what speaks of later steps is dropped."""
    _drop_later_evaluation(folder, start)
    writer = metrics.MetricWriter(
        folder, resume_step=start, evaluates=is_evaluated(config.train, start)
    )
    return trackers.attach(writer, config.train.trackers, folder, config)


def is_evaluated(config, step: int) -> bool:
    """Whether training evaluates after a step, by the `train` section of a config."""
    return step == config.steps or step % config.eval_every == 0


def count_evaluations(config) -> int:
    """How often `is_evaluated` is true from step 0 to the last."""
    return (
        config.steps // config.eval_every + 1 + (config.steps % config.eval_every > 0)
    )


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
