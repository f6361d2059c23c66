"""Checkpoints of a run, through Orbax, and the workdir that holds them."""

import json
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from abe_jax import parallel
from abe_jax.errors import UserError
from abe_jax.train_step import TrainState
from abe_jax.workdir import config_files

# Fields that may change between two starts of a run: they do not change its result.
_FREE_FIELDS = (
    "data.path",
    "data.in_memory",
    "data.num_threads",
    "data.num_workers",
    "eval.batch_size",
    "eval.recall_at",
    "parallel.mapping",
    "train.chunks",
    "train.log_every",
    "train.eval_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
)


def claim_workdir(workdir: pathlib.Path, config, *, write: bool = True) -> None:
    """Makes the workdir this config's, or checks that it already is.

    Args:
      workdir: of the run; made if missing.
      config: of the run.
      write: False to check only, for all processes but the first.

    Raises:
      UserError: the workdir holds a run of another config; the fields that differ are
        named.
    """
    path = workdir / config_files.CONFIG_FILE
    current = json.loads(config.to_json_best_effort())
    if path.exists():
        _refuse_other_config(config_files.stored(workdir), current, workdir)
    if not write:
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        # Whole or not at all: other processes may be reading it.
        part = path.with_suffix(".part")
        part.write_text(json.dumps(current, indent=2) + "\n")
        part.replace(path)
    except OSError as error:
        raise UserError(f"cannot write to --workdir: {error}.") from error


def require_run(workdir: pathlib.Path, config) -> None:
    """Checks that the workdir holds a run of this config.

    Raises:
      UserError: there is no run, or it is one of another config.
    """
    current = json.loads(config.to_json_best_effort())
    _refuse_other_config(config_files.stored(workdir), current, workdir)


class Checkpoints:
    """The checkpoints of a workdir: state after a step, and the config."""

    def __init__(self, workdir: pathlib.Path, *, keep: int = 2):
        """Opens `workdir/checkpoints`.

        Args:
          workdir: of the run.
          keep: how many of the newest checkpoints stay.
        """
        options = ocp.CheckpointManagerOptions(max_to_keep=keep)
        self._manager = ocp.CheckpointManager(
            (workdir / "checkpoints").absolute(),
            options=options,
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "config": ocp.JsonCheckpointHandler(),
            },
        )

    @property
    def steps(self) -> list[int]:
        """Steps of the checkpoints, in ascending order."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, config) -> None:
        """Writes the state in the background, unless its step is there already."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state._asdict()),
                config=ocp.args.JsonSave(json.loads(config.to_json_best_effort())),
            ),
        )

    def restore(
        self, like: TrainState, mesh: jax.sharding.Mesh, step: int | None = None
    ) -> TrainState:
        """Reads a state back, replicated over the mesh, whatever wrote it.

        Args:
          like: a state of the same structure, shapes and dtypes; arrays or abstract.
          mesh: the devices that get it.
          step: which checkpoint; the newest by default.

        Raises:
          UserError: no such checkpoint, or it does not fit the model.
        """
        steps = self.steps
        if not steps:
            raise UserError(f"no checkpoint in {self._manager.directory}; train first.")
        step = steps[-1] if step is None else step
        if step not in steps:
            raise UserError(
                f"no checkpoint of step {step} in {self._manager.directory}; there "
                f"are {', '.join(map(str, steps))}."
            )
        self._require_fit(step, like)
        target = parallel.abstract_replicated(like._asdict(), mesh)
        restored = self._manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target))
        )
        return TrainState(**restored["state"])

    def _require_fit(self, step: int, like: TrainState) -> None:
        # Before reading: Orbax leaves its unfinished reads behind when a shape differs.
        stored = _shapes(self._manager.item_metadata(step)["state"])
        wanted = _shapes(like._asdict())
        different = sorted(
            name
            for name in stored.keys() | wanted.keys()
            if stored.get(name) != wanted.get(name)
        )
        if different:
            first = different[0]
            raise UserError(
                f"the checkpoint of step {step} does not fit the config's model: "
                f"{len(different)} arrays differ, the first is {first} (there "
                f"{stored.get(first, 'missing')}, now {wanted.get(first, 'missing')})."
            )

    def close(self) -> None:
        """Waits until everything is written."""
        self._manager.wait_until_finished()
        self._manager.close()


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {k: tuple(x.shape) for k, x in ocp.tree.to_flat_dict(tree, sep=".").items()}


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    fields = {}
    for name, value in config.items():
        if isinstance(value, dict):
            fields |= _flat(value, f"{prefix}{name}.")
        else:
            fields[prefix + name] = value
    return fields


def _refuse_other_config(stored: dict, current: dict, workdir: pathlib.Path) -> None:
    old, new = _flat(stored), _flat(current)
    # A field that one of the two lacks came or went between versions of this project.
    changed = [
        f"{name} (there {old[name]!r}, now {new[name]!r})"
        for name in sorted(old.keys() & new.keys())
        if old[name] != new[name] and name not in _FREE_FIELDS
    ]
    if changed:
        raise UserError(
            f"{workdir} holds a run of another config: {', '.join(changed)}. Use "
            "another --workdir, or the run's own settings."
        )
