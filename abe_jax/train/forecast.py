"""What training would take, said before it begins."""

import resource
import time

import jax
import numpy as np

from abe_jax import data, evaluate, parallel, processes
from abe_jax.train import features, loop, setup
from abe_jax.workdir import checkpoints, locate

# Steps that are timed, after the first, and batches that are embedded: the same number
# on all processes, which wait for each other in each.
_STEPS = 5
_BATCHES = 4


def show_forecast(config, workdir: str) -> None:
    """Takes a few steps, writes nothing, and prints what the whole run would take.

    Args:
      config: of the run.
      workdir: where it would be, or is; left alone.

    Raises:
      UserError: training would refuse the config, the data or the folder too; whether
        the folder's run has this config is not checked.
    """
    folder = locate(workdir)
    setup.check(config, folder)
    resumes = bool(checkpoints.steps_in(folder))
    run = setup.create(config, restored=resumes)
    mesh, splits = run.mesh, run.splits
    state = parallel.replicate(run.initial_state(), mesh)
    arrays = jax.tree.leaves(state.params)
    parameters = sum(array.size for array in arrays)
    megabytes = sum(array.nbytes for array in arrays) / 1e6
    trained_on = splits.train
    if config.data.feature_cache:
        trained_on = features.blank(trained_on, config, run.model)
    batches = data.train_batches(
        trained_on,
        run.sampler,
        start=0,
        stop=min(config.train.steps, 1 + _STEPS),
        reading=data.Reading.of_process(config.data, *processes.place()),
    )
    seconds: list[float] = []
    start = time.perf_counter()
    for batch in batches:
        state, metrics = run.take_step(state, parallel.split_rows(batch, mesh))
        jax.block_until_ready(metrics)
        now = time.perf_counter()
        seconds.append(now - start)
        start = now
    step_seconds = float(np.median(seconds[1:] or seconds))
    evaluator = evaluate.Evaluator(config, run.model, splits, mesh)
    few = splits.evaluation.spread(
        min(len(splits.evaluation), _BATCHES * config.eval.batch_size * mesh.size)
    )
    evaluator.embed(state, few.spread(1))  # compiles
    times: list[float] = []  # from the first batch, for which workers start
    evaluator.embed(state, few, lambda: times.append(time.perf_counter()))
    embed_seconds = time.perf_counter() - times[0]
    images = {part: len(subset) for part, subset in splits.parts.items()}
    evaluated = sum(images.values()) - images["train"]
    evaluation_seconds = embed_seconds * evaluated / len(few)
    # A frozen S runs over train once; the heads, timed here as well, add little.
    features_seconds = 0.0
    if config.data.feature_cache:
        features_seconds = evaluation_seconds * images["train"] / evaluated
    evaluations = loop.count_evaluations(config.train)
    total = (
        features_seconds
        + seconds[0]
        + step_seconds * config.train.steps
        + evaluation_seconds * evaluations
    )
    if not processes.is_first():
        return
    size, steps = config.train.batch_size, config.train.steps
    name, trunk = config.model.name, config.model.trunk
    turns = steps * size / images["train"]
    rows = {
        "model": f"{name}, {trunk}: {parameters:,} parameters, {megabytes:,.1f} MB",
        "images": ", ".join(f"{count:,} {part}" for part, count in images.items()),
        "batches": f"{size} images on {mesh.size} device{'s' * (mesh.size > 1)}; "
        f"{steps:,} steps from the first, {turns:,.1f} times all of train",
        "memory": _memory(),
        "first step": f"{seconds[0]:.0f} s, compilation included",
        "a step": f"{step_seconds:.3f} s, {size / step_seconds:,.0f} images/s",
        "evaluation": f"{evaluation_seconds:.0f} s to embed, {evaluations} of them",
    }
    if features_seconds:
        rows["features"] = f"{features_seconds:.0f} s at most, where none are kept yet"
    rows["in all"] = f"about {total / 60:,.1f} minutes"
    print("\n".join(f"{name:<12}{text}" for name, text in rows.items()))


def _memory() -> str:
    statistics = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in statistics:
        return f"{statistics['peak_bytes_in_use'] / 1e6:,.0f} MB of a device at most"
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f"{resident / 1e3:,.0f} MB of this process at most"
