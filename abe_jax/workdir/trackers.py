"""Metrics sent to an experiment tracker as well: Weights & Biases or MLflow.

Named by `train.trackers` of the config; each reads its own environment variables, such
as WANDB_PROJECT, WANDB_MODE or MLFLOW_TRACKING_URI. A run is one run there, however
often it was interrupted. One that does not start ends the run; later trouble with a
tracker is logged, and costs nothing else.
"""

import contextlib
import importlib.util
import json
import logging
import pathlib
import uuid
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from abe_jax.errors import UserError, require_known
from abe_jax.workdir import config_files, fields, metrics, write_whole

_RUNS_FILE = "trackers.json"

_log = logging.getLogger(__name__)


class Tracker(Protocol):
    """What a tracker needs; `run` names its run for the next start."""

    run: str

    def write(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class _WeightsAndBiases:
    def __init__(self, module: Any, name: str, config: Any, run: str | None):
        self.run = run or uuid.uuid4().hex
        self._run = module.init(
            name=name, id=self.run, resume="allow", config=config.to_dict()
        )
        # Its own count of steps never falls: what a resume writes again would be lost.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({"step": step, **metrics})

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    def __init__(self, module: Any, name: str, config: Any, run: str | None):
        self._module = module
        self.run = module.start_run(run_id=run, run_name=name).info.run_id
        if run is None:
            module.log_params(fields.flat(config))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        # MLflow allows no "@" in names.
        named = {name.replace("@", "_at_"): value for name, value in metrics.items()}
        self._module.log_metrics(named, step=step)

    def close(self) -> None:
        self._module.end_run()


# By the name of their package.
TRACKERS: dict[str, Callable[[Any, str, Any, str | None], Tracker]] = {
    "wandb": _WeightsAndBiases,
    "mlflow": _MLflow,
}


class TrackedWriter:
    """A `MetricWriter` whose lines go to trackers too."""

    def __init__(self, writer: metrics.Writer, trackers: list[Tracker]):
        self._writer = writer
        self._trackers = trackers

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes to the workdir first."""
        self._writer.write(step, metrics)
        for tracker in self._trackers:
            _log_trouble(tracker.write, step, metrics)

    def sync(self) -> None:
        """As of the `MetricWriter`; trackers keep their own time."""
        self._writer.sync()

    def close(self) -> None:
        """Closes all."""
        for tracker in self._trackers:  # first: on a full disk the other one raises
            _log_trouble(tracker.close)
        self._writer.close()


def _log_trouble(call: Callable[..., None], *arguments: Any) -> None:
    try:
        call(*arguments)
    except Exception as error:  # of any kind: the network, the service, its package
        _log.warning("the experiment tracker failed: %s", error)


def require_installed(names: tuple[str, ...]) -> None:
    """Checks `train.trackers` before anything is written.

    Raises:
      UserError: a name is unknown, or its package is not installed.
    """
    for name in names:
        require_known("train.trackers", name, TRACKERS)
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"train.trackers names {name!r}, which is not installed: "
                f"pip install {name}."
            )


def attach(
    writer: metrics.Writer, names: tuple[str, ...], workdir: pathlib.Path, config: Any
) -> metrics.Writer:
    """The writer, with the trackers that the config names behind it.

    Raises:
      NotWritable: such as on a full disk.
    """
    if not names:
        return writer
    path = workdir / _RUNS_FILE
    trackers: list[Tracker] = []
    tracked = TrackedWriter(writer, trackers)
    with contextlib.ExitStack() as opened:
        opened.callback(tracked.close)
        runs = config_files.read_object(path) if path.exists() else {}
        for name in names:
            try:
                module = importlib.import_module(name)
                tracker = TRACKERS[name](module, workdir.name, config, runs.get(name))
            except Exception as error:  # such as no login; its classes are its own
                raise UserError(f"{name} does not start: {error}.") from error
            runs[name] = tracker.run
            trackers.append(tracker)
        write_whole(path, json.dumps(runs) + "\n")
        opened.pop_all()  # nothing failed: they stay open
    return tracked
