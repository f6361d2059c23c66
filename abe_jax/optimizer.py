"""Optimisers and learning-rate schedules, composed from optax."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from abe_jax import models
from abe_jax.errors import require_known


def create(config) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Makes the optimiser that `config.train` describes, and its learning rate.

    SGD with momentum is the paper's. Weight decay acts on kernels only: decoupled with
    AdamW, part of the gradient with SGD.

    Args:
      config: the `train` section of a config (see `configs/default.py`).

    Returns:
      the transformation of `{"model": parameters, "loss": parameters}`, each a nested
      dict, and the rate at a step.

    Raises:
      UserError: an optimiser or schedule of another name.
    """
    require_known("train.optimizer", config.optimizer, ("sgd", "adamw"))
    schedule = _schedule(config)
    clip = (
        optax.clip_by_global_norm(config.clip_norm)
        if config.clip_norm
        else optax.identity()
    )
    decay = optax.add_decayed_weights(config.weight_decay, mask=_is_kernel)
    # Moments are those of all parameters as one vector: a few operations in place of
    # some for each of hundreds of small arrays, which take long to compile.
    if config.optimizer == "sgd":
        direction = optax.chain(decay, optax.flatten(optax.trace(config.momentum)))
    else:
        direction = optax.chain(optax.flatten(optax.scale_by_adam()), decay)
    for factor, chosen in (
        (config.new_layer_factor, _is_new),
        (config.loss_factor, _is_of_loss),
    ):
        if factor != 1.0:
            faster = optax.masked(optax.scale(factor), chosen)
            direction = optax.chain(direction, faster)
    chain = optax.chain(clip, direction, optax.scale_by_learning_rate(schedule))

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        # Adam raises floats to integer powers, which strict dtype promotion forbids.
        with jax.numpy_dtype_promotion("standard"):
            return chain.update(updates, state, params)

    return optax.GradientTransformation(chain.init, update), schedule


def _schedule(config) -> optax.Schedule:
    require_known("train.schedule", config.schedule, ("cosine", "step", "constant"))
    rate, warmup = config.learning_rate, config.warmup_steps
    if config.schedule == "cosine":
        # A trial run may be shorter than its warm-up.
        after = optax.cosine_decay_schedule(rate, max(config.steps - warmup, 1))
    elif config.schedule == "step":

        def stairs(count: Any) -> jax.Array:
            # Half a step is added: XLA multiplies by the inverse, which may round to
            # just below a whole number.
            fallen = jnp.floor((count + 0.5) / config.decay_every)
            return rate * jnp.power(config.decay_rate, fallen)

        after = stairs
    else:
        after = optax.constant_schedule(rate)
    # The first step already moves: it is taken at 1 / warmup of the rate.
    before = optax.linear_schedule(rate / max(warmup, 1), rate, max(warmup - 1, 1))
    joined = optax.join_schedules([before, after], [warmup])

    def rate_at(count: Any) -> jax.Array:
        # optax mixes integers and floats, which strict dtype promotion forbids.
        now = joined(jnp.asarray(count, jnp.float32))
        # Computed once: XLA would fuse the cosine into the update of each parameter.
        return jax.lax.optimization_barrier(jnp.asarray(now))

    return rate_at


def _is_kernel(params: Any) -> Any:
    return _where(params, lambda path: path[-1] == "kernel")


def _is_new(params: Any) -> Any:
    return _where(
        params, lambda path: path[0] == "model" and models.is_new_layer(path[1:])
    )


def _is_of_loss(params: Any) -> Any:
    return _where(params, lambda path: path[0] == "loss")


def _where(params: Any, holds: Callable[[tuple[str, ...]], bool]) -> Any:
    """A tree of bools: what holds for the keys on the way to each parameter."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: holds(tuple(str(part.key) for part in path)), params
    )
