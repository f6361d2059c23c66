"""Weights that a model starts from: a run's own, or another run's."""

import contextlib
import logging
import os
import pathlib
from typing import Any

import jax.numpy as jnp
from flax import traverse_util
from jax.sharding import Mesh
from ml_collections import ConfigDict

from abe_jax import models, train_step
from abe_jax.errors import UserError
from abe_jax.models.shapes import without_values
from abe_jax.train_step import TrainState
from abe_jax.workdir import CONFIG_FILE, checkpoints, locate

_log = logging.getLogger(__name__)


def model_section(config, *, restored: bool) -> ConfigDict:
    """`config.model` for `models.create`, without weights that others replace.

    Args:
      config: the whole config.
      restored: a checkpoint will be restored, so that no file of pretrained weights
        needs to be there.
    """
    section = config.model.copy_and_resolve_references()
    if restored or run_of(config) is not None:
        with section.unlocked():
            section.pretrained = None
    return section


def restore_trained(
    workdir: pathlib.Path, config, mesh: Mesh, step: int | None = None
) -> tuple[models.Embedder, TrainState]:
    """A run's model, and the weights of a checkpoint on every device.

    Args:
      workdir: of the run.
      config: of the run.
      mesh: the devices.
      step: of the checkpoint; the newest by default.

    Returns:
      the model, whose own variables are shapes only, and a state as returned by
      `Checkpoints.restore_model`.

    Raises:
      UserError: see `Checkpoints.restore`.
    """
    section = model_section(config, restored=True)
    model = without_values(lambda rngs: models.create(section, rngs=rngs))
    _, params, others = train_step.split_model(model)
    opened = checkpoints.Checkpoints(workdir, read_only=True)
    with contextlib.closing(opened) as saved:
        return model, saved.restore_model(params, others, mesh, step)


def run_of(config) -> pathlib.Path | None:
    """The workdir that `model.pretrained` names; None where it names a file.

    Raises:
      UserError: it is a folder without a run, or nothing is there.
    """
    path = config.model.get("pretrained")
    if not path or path.startswith("hf://"):
        return None
    place = os.path.expanduser(path)
    if not os.path.exists(place):
        raise UserError(
            f"model.pretrained = {path!r} does not exist; give a file of weights, "
            "hf://OWNER/NAME, or the workdir of a run."
        )
    if not os.path.isdir(place):
        return None
    folder = locate(path)
    if not (folder / CONFIG_FILE).exists():
        raise UserError(
            f"model.pretrained = {path!r} is a folder without a run; give a file of "
            "weights, or the workdir of a run."
        )
    return folder


def start_from(state: TrainState, workdir: pathlib.Path) -> TrainState:
    """A new state with the weights of another run's newest checkpoint.

    The other run may be of another model on the same trunk, if that has a single G: S,
    every G and what the attention branch copies then start from the trunk's layers
    there, as from published weights. Layers that no published network has
    (`models.is_new_layer`) start at random where they are missing there or differ in
    shape, as with another number of learners.

    Args:
      state: as returned by `train_step.initial_state`.
      workdir: of the other run.

    Raises:
      UserError: the run has no checkpoint, or its model is another one.
    """
    opened = checkpoints.Checkpoints(workdir, read_only=True)
    with contextlib.closing(opened) as saved:
        stored = saved.restore_as_stored()
    fresh: list[str] = []

    def taken(own: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
        found: dict[Any, Any] = traverse_util.flatten_dict(other)
        of_trunk = {
            models.layer_of(name): value
            for name, value in found.items()
            if name[0] in ("spatial", "global_features")
        }
        ours: dict[Any, Any] = traverse_util.flatten_dict(own)
        mixed = {}
        for path, value in ours.items():
            name = tuple(map(str, path))
            there = found.get(name, of_trunk.get(models.layer_of(name)))
            if there is not None and value.shape[-there.ndim :] == there.shape:
                # A copy: two parameters in one buffer could not be donated to a step.
                shared = jnp.broadcast_to(jnp.asarray(there, value.dtype), value.shape)
                mixed[path] = jnp.array(shared)
            elif models.is_new_layer(name):
                mixed[path] = value
                fresh.append(".".join(name))
            else:
                shape = "missing" if there is None else there.shape
                raise UserError(
                    f"model.pretrained = {str(workdir)!r} is a run of another model: "
                    f"{'.'.join(name)} is {shape} there, and {value.shape} here."
                )
        return traverse_util.unflatten_dict(mixed)

    started = state._replace(
        params=taken(state.params, stored["params"]),
        model_state=taken(state.model_state, stored["model_state"]),
    )
    new = f"; new are {', '.join(fresh)}" if fresh else ""
    _log.info(
        "the weights are those of %s after step %d%s", workdir, stored["step"], new
    )
    return started
