"""Checkpoints of a run, through Orbax: written in the background, sealed, checked."""

import logging
import pathlib
import shutil
import threading
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from abe_jax import parallel, processes
from abe_jax.errors import UserError, first_line
from abe_jax.train_step import TrainState, Tree
from abe_jax.workdir import CHECKPOINTS_FOLDER, NotWritable, fields, seals, writing

DAMAGED_FOLDER = "damaged_checkpoints"

_log = logging.getLogger(__name__)


class NotFinite(UserError):
    """A loss, gradient or state is NaN or infinite: the state is not worth saving."""


class _Damaged(Exception):
    """A checkpoint cannot be read, or is not what was written; says why."""


def steps_in(workdir: pathlib.Path) -> list[int]:
    """Steps of a workdir's checkpoints in ascending order; nothing is opened."""
    folder = workdir / CHECKPOINTS_FOLDER
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal())


class Checkpoints:
    """The checkpoints of a workdir: state after a step, and the config."""

    def __init__(
        self, workdir: pathlib.Path, *, keep: int = 2, read_only: bool = False
    ):
        """Opens `workdir/checkpoints`.

        Args:
          workdir: of the run.
          keep: how many of the newest checkpoints stay.
          read_only: nothing in the folder is changed, so that a run may go on in it.

        Raises:
          NotWritable: what a killed run left half-written cannot be cleared away.
        """
        self._workdir = workdir
        self._folder = (workdir / CHECKPOINTS_FOLDER).absolute()
        self._read_only = read_only
        log = logging.getLogger("absl")
        level = log.level
        if read_only:
            # Orbax warns, three times, that nothing can be written.
            log.setLevel(logging.ERROR)
            options = ocp.CheckpointManagerOptions(read_only=True)
        else:
            self._clear_unfinished()
            options = ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
            )
        self._hook = threading.excepthook
        threading.excepthook = self._raised_later
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=options,
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "config": ocp.JsonCheckpointHandler(),
            },
        )
        log.setLevel(level)

    @property
    def steps(self) -> list[int]:
        """Steps of the checkpoints, in ascending order."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, config) -> None:
        """Writes the state in the background, unless its step is there already.

        Raises:
          NotFinite: a value of the state is NaN or infinite; nothing is written.
          NotWritable: this state or the one before could not be written.
          UserError: another process ended meanwhile.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        _require_finite(state, step)
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(_stored_parts(state)),
            config=ocp.args.JsonSave(fields.as_json(config)),
        )
        try:
            self._manager.wait_until_finished()
            self._manager.save(step, args=items)
        except Exception as error:  # each layer below has its own
            raise _not_written(error) from error

    def _raised_later(self, raised: threading.ExceptHookArgs) -> None:
        # What fails in Orbax's threads is raised by the next save or close as well.
        if not type(raised.thread).__module__.startswith("orbax."):
            self._hook(raised)

    def _unfinished(self) -> list[pathlib.Path]:
        """Checkpoints without their final names yet; only process 0 lists any."""
        pattern = "*.orbax-checkpoint-tmp*"
        return list(self._folder.glob(pattern)) if processes.is_first() else []

    def _clear_unfinished(self) -> None:
        # Orbax would in the background, and closes without waiting for it.
        try:
            for folder in self._unfinished():
                shutil.rmtree(folder)
        except OSError as error:
            raise _not_written(error) from error

    def _seal(self) -> None:
        # Called in the background when all is written, before it gets its name.
        for folder in self._unfinished():
            seals.seal(folder)

    def restore(
        self, like: TrainState, mesh: Mesh, step: int | None = None
    ) -> TrainState:
        """Reads a state back, replicated over the mesh, whatever wrote it.

        A damaged newest checkpoint is named, and the one before it is taken;
        `set_damaged_aside` moves it.

        Args:
          like: a state of the same structure, shapes and dtypes; arrays or abstract.
          mesh: the devices that get it.
          step: this checkpoint and no other; the newest by default.

        Raises:
          UserError: there is no such checkpoint, none that can be read, or it does not
            fit the model.
        """

        def read(step: int) -> TrainState:
            wanted = _stored_parts(like)
            _require_fit(step, self._stored(step), wanted)
            target = parallel.abstract_replicated(wanted, mesh)
            return TrainState(**{"loss_params": {}} | self._read(step, target))

        return self._newest_sound(read, step)

    def restore_model(
        self, params: Tree, model_state: Tree, mesh: Mesh, step: int | None = None
    ) -> TrainState:
        """As `restore`, but only what a trained model needs, whatever trained it.

        Args:
          params: a tree of the structure, shapes and dtypes of the model's parameters.
          model_state: the same of its other variables.
          mesh: the devices that get them.
          step: this checkpoint and no other; the newest by default.

        Returns:
          a state without `opt_state` and `loss_params`.

        Raises:
          UserError: see `restore`.
        """
        wanted = {
            "step": jax.ShapeDtypeStruct((), np.int32),
            "params": params,
            "model_state": model_state,
        }

        def read(step: int) -> TrainState:
            stored = self._stored(step)
            _require_fit(step, {name: stored.get(name, {}) for name in wanted}, wanted)
            # Orbax reads all of an item or nothing.
            target = parallel.abstract_replicated(stored | wanted, mesh)
            found = self._read(step, target)
            return TrainState(
                **{name: found[name] for name in wanted}, opt_state=(), loss_params={}
            )

        return self._newest_sound(read, step)

    def restore_as_stored(self, step: int | None = None) -> dict[str, Any]:
        """Reads a state back without knowing its structure.

        Args:
          step: this checkpoint and no other; the newest by default.

        Returns:
          the parts of `TrainState` by name: nested dicts of NumPy arrays.

        Raises:
          UserError: there is no such checkpoint, or none that can be read.
        """
        one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

        def read(step: int) -> dict[str, Any]:
            target = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one),
                self._stored(step),
            )
            return jax.device_get(self._read(step, target))

        return self._newest_sound(read, step)

    def _newest_sound(self, read: Any, chosen: int | None) -> Any:
        """What `read(step)` gives for the newest checkpoint that it can read."""
        steps = self.steps
        if not steps:
            raise UserError(f"no checkpoint in {self._folder}; train first.")
        if chosen is not None and chosen not in steps:
            raise UserError(
                f"no checkpoint of step {chosen} in {self._folder}; there are "
                f"{', '.join(map(str, steps))}."
            )
        reasons = []
        for step in [chosen] if chosen is not None else reversed(steps):
            found, reason = None, self._damage(step)
            if reason is None:
                try:
                    found = read(step)
                except _Damaged as error:
                    self._require_unsound(step, error)
                    reason = str(error)
            if processes.all_agree(reason is None):
                return found
            reason = reason or "another process cannot read it"
            reasons.append(f"that of step {step} is damaged: {reason}")
            if chosen is None:
                _log.warning("The checkpoint of step %d is damaged: %s.", step, reason)
        if chosen is None:
            raise UserError(
                f"no checkpoint in {self._folder} can be read: {'; '.join(reasons)}. "
                "Bring one back from a copy, or start again in another --workdir."
            )
        if not (self._folder / str(chosen)).exists():
            raise UserError(
                f"the checkpoint of step {chosen} was deleted while it was read: "
                f"training in {self._workdir} keeps the newest ones. Run the same "
                "command again."
            )
        raise UserError(
            f"{self._folder}: {reasons[0]}; leave --step out or choose "
            f"another of {', '.join(map(str, steps))}."
        )

    def set_damaged_aside(self, newest: int) -> None:
        """Moves away what lies after the checkpoint that was restored.

        Their steps will be saved again. To be called by all processes.
        """
        if processes.is_first():
            for step in self.steps:
                if step > newest:
                    _move_aside(self._folder / str(step), self._workdir)
        processes.wait_for_all("damaged checkpoints moved")
        self._manager.reload()

    def _require_unsound(self, step: int, error: _Damaged) -> None:
        """Raises the cause of a failed read, if the files are as they were written.

        A lack of memory, or a disk that fails for a moment, damages nothing.
        """
        folder = self._folder / str(step)
        if error.__cause__ is None or not seals.is_sealed(folder):
            return
        if seals.damage(folder) is None:
            raise error.__cause__

    def _damage(self, step: int) -> str | None:
        """Why a checkpoint's files cannot be trusted, as process 0 finds."""
        folder = self._folder / str(step)
        reason = None
        if processes.is_first() and seals.is_sealed(folder):
            reason = seals.damage(folder)
        if processes.all_agree(reason is None):
            return None
        return reason or "process 0 has the reason"

    def _stored(self, step: int) -> Any:
        """Tree of what a checkpoint says that it holds: shapes and dtypes."""
        try:
            metadata = self._manager.item_metadata(step)["state"]
        except Exception as error:  # each kind of damage has its own
            raise _Damaged(first_line(error)) from error
        if metadata is None:
            raise _Damaged("state/_METADATA is missing")
        return metadata.tree

    def _read(self, step: int, target: Any) -> Any:
        try:
            restored = self._manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target))
            )
        except Exception as error:
            raise _Damaged(first_line(error)) from error
        return restored["state"]

    def close(self) -> None:
        """Waits until everything is written.

        Raises:
          NotWritable: the last state could not be written.
          UserError: another process ended meanwhile.
        """
        try:
            try:
                self._manager.wait_until_finished()
            finally:
                self._manager.close()  # which may raise what the wait did not
        except Exception as error:
            raise _not_written(error) from error
        finally:
            threading.excepthook = self._hook


def _stored_parts(state: TrainState) -> dict[str, Any]:
    """A state as a checkpoint has it; most losses have no parameters to be stored."""
    parts = state._asdict()
    if not state.loss_params:
        del parts["loss_params"]
    return parts


def _require_fit(step: int, there: Tree, here: Tree) -> None:
    # Before reading: Orbax leaves its unfinished reads behind when a shape differs.
    stored, wanted = _shapes(there), _shapes(here)
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


def _require_finite(state: TrainState, step: int) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(state._asdict()):
        if not jax.numpy.issubdtype(leaf.dtype, jax.numpy.inexact):
            continue
        if not np.isfinite(np.asarray(jax.device_get(leaf))).all():
            raise NotFinite(
                f"{jax.tree_util.keystr(path, simple=True, separator='.')} is not "
                f"finite after step {step}, which is not saved; lower "
                "train.learning_rate or set train.clip_norm, and run the command again "
                "to go on from the newest checkpoint."
            )


def _not_written(error: Exception) -> UserError:
    """The disk, unless another process died: all write a checkpoint together."""
    return processes.of_another(error) or NotWritable(
        f"cannot write the checkpoint: {first_line(error)}; the earlier ones are "
        "kept. Make room, and run the same command again to go on."
    )


def _move_aside(folder: pathlib.Path, workdir: pathlib.Path) -> None:
    target = workdir / DAMAGED_FOLDER / folder.name
    number = 1
    while target.exists():
        number += 1
        target = target.with_name(f"{folder.name}-{number}")
    with writing():
        target.parent.mkdir(exist_ok=True)
        folder.rename(target)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {k: tuple(x.shape) for k, x in ocp.tree.to_flat_dict(tree, sep=".").items()}
