"""What a config describes, put together: data, model, optimiser, step."""

import dataclasses
import logging
import pathlib
from collections.abc import Callable
from functools import partial

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from abe_jax import data, losses, models, optimizer, parallel, train_step
from abe_jax.data import samplers
from abe_jax.train import features
from abe_jax.workdir import claim, fields, trackers, weights

# Sets the loss's random numbers apart from the model's.
_LOSS_STREAM = 1

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Setup:
    """All that takes steps.

    Attributes:
      mesh: all devices.
      splits: the data.
      sampler: which images make up a batch.
      model: structure, preprocessing, and the weights to start from.
      initial_state: makes the state before the first step.
      take_step: maps a state and a batch to the next state and the step's metrics; the
        state that it is given is donated.
    """

    mesh: Mesh
    splits: data.Splits
    sampler: samplers.Sampler
    model: models.Embedder
    initial_state: Callable[[], train_step.TrainState]
    take_step: Callable[..., tuple[train_step.TrainState, dict[str, jax.Array]]]


def check(config, workdir: pathlib.Path) -> None:
    """Refuses what can be refused without a look at the data; writes nothing.

    Raises:
      UserError: a field is out of range, the workdir cannot be a run's, or a package is
        missing.
    """
    fields.require_in_range(config)
    claim.require_outside_data(workdir, config.data)
    claim.refuse_foreign_files(workdir)
    trackers.require_installed(config.train.trackers)


def create(config, *, restored: bool) -> Setup:
    """Puts a run together; writes nothing.

    Args:
      config: the whole config, as `check` passes it.
      restored: a checkpoint will be restored, so that no file of pretrained weights
        needs to be there.

    Raises:
      UserError: the parts do not fit the data, the devices or each other.
    """
    features.check(config)
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
    section = weights.model_section(config, restored=restored)
    model = models.create(section, rngs=nnx.Rngs(config.seed))
    if not restored and config.model.pretrained is None:
        total = sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param)))
        _log.info("all %d parameters of the model are new", total)
    loss_params = losses.initial_parameters(
        config.loss,
        jax.random.fold_in(nnx.Rngs(config.seed).params(), _LOSS_STREAM),
        num_classes=len(np.unique(splits.train.labels)),
        num_learners=model.num_learners,
        dim=config.model.embedding_dim // model.num_learners,
    )
    take_step = parallel.map_over_devices(
        train_step.make_train_step(model, optimiser, learning_rate, config),
        mesh,
        mapping=config.parallel.mapping,
        donate_state=True,
    )
    initial_state = partial(
        train_step.initial_state, model, optimiser, loss_params, config.model.train
    )
    return Setup(mesh, splits, sampler, model, initial_state, take_step)
