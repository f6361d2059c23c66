"""One device's step over the axis `DATA_AXIS`, and one device's embedding of images."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from abe_jax import augment, losses
from abe_jax.parallel import DATA_AXIS

Tree = Any


class TrainState(NamedTuple):
    """What training changes, and a checkpoint holds.

    Attributes:
      step: int32 scalar, number of steps taken.
      params: nested dict of the model's parameters.
      model_state: nested dict of its other variables (batch-norm averages).
      opt_state: state of the optimiser.
    """

    step: jax.Array
    params: Tree
    model_state: Tree
    opt_state: Tree


def initial_state(
    model: nnx.Module, optimizer: optax.GradientTransformation
) -> TrainState:
    """The state before the first step, with the weights of the model."""
    _, params, model_state = split_model(model)
    step = jnp.zeros((), jnp.int32)
    return TrainState(step, params, model_state, optimizer.init(params))


def split_model(model: nnx.Module) -> tuple[Any, Tree, Tree]:
    """Splits a module into its structure, parameters and other variables."""
    graphdef, params, model_state = nnx.split(model, nnx.Param, ...)
    return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(model_state)


def _view(model: nnx.Module, *, use_running_average: bool) -> nnx.Module:
    """The module with batch norm, where there is any, in one of its two modes."""
    return nnx.view(
        model, use_running_average=use_running_average, raise_if_not_found=False
    )


def _merge(graphdef: Any, params: Tree, model_state: Tree) -> Any:
    return nnx.merge(graphdef, nnx.State(params), nnx.State(model_state), copy=True)


def make_train_step(
    model: nnx.Module,
    optimizer: optax.GradientTransformation,
    learning_rate: optax.Schedule,
    config,
) -> Callable[[TrainState, dict], tuple[TrainState, dict]]:
    """Makes one device's training step, to be mapped by `parallel`.

    The step takes the state and this device's rows ("image" uint8 `[B, H, W, 3]`,
    "label" int32 `[B]`), and returns the new state and scalar float32 metrics, both
    equal on every device. The gradient is that of the loss over the global batch.

    Args:
      model: gives structure and preprocessing; its weights are those of the state.
      optimizer: as of `optimizer.create`.
      learning_rate: schedule, for the metrics.
      config: whole config.
    """
    graphdef = split_model(_view(model, use_running_average=False))[0]
    weight = config.loss.divergence_weight

    def step(state: TrainState, batch: dict) -> tuple[TrainState, dict]:
        labels = batch["label"]
        rows = labels.shape[0]
        positions = jax.lax.axis_index(DATA_AXIS) * rows + jnp.arange(rows)
        keys = augment.image_keys(config.seed, state.step, positions)
        views = augment.augment(
            batch["image"], keys, config.data.image_size, config.augment
        )

        def share_of_loss(params: Tree) -> tuple[jax.Array, tuple[dict, Tree]]:
            net = _merge(graphdef, params, state.model_state)
            embeddings = net(net.preprocessing(views))
            contrastive = losses.contrastive_loss(
                embeddings, labels, margin=config.loss.margin, axis_name=DATA_AXIS
            )
            divergence = losses.divergence_loss(
                embeddings,
                margin=config.loss.divergence_margin,
                axis_name=DATA_AXIS,
            )
            loss = contrastive + weight * divergence
            shares = {
                "loss": loss,
                "contrastive": contrastive,
                "divergence": divergence,
            }
            model_state = nnx.to_pure_dict(nnx.state(net, nnx.Not(nnx.Param)))
            return loss, (shares, model_state)

        # Of this device's share: differentiating a psum of it would be wrong.
        gradients, (shares, model_state) = jax.grad(share_of_loss, has_aux=True)(
            state.params
        )
        gradients, metrics = jax.lax.psum((gradients, shares), DATA_AXIS)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        metrics["gradient_norm"] = optax.tree.norm(gradients)
        metrics["learning_rate"] = jnp.asarray(learning_rate(state.step), jnp.float32)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, model_state, opt_state), metrics

    return step


def make_embed_step(
    model: nnx.Module, image_size: int
) -> Callable[[tuple[Tree, Tree], jax.Array], jax.Array]:
    """Makes one device's embedding of images, to be mapped by `parallel`.

    It takes (parameters, other variables) and uint8 images `[B, H, W, 3]`, uses their
    centre crop and the running averages of batch norm, and returns `[B, M, D/M]`
    float32.
    """
    graphdef = split_model(_view(model, use_running_average=True))[0]

    def embed(variables: tuple[Tree, Tree], images: jax.Array) -> jax.Array:
        net = _merge(graphdef, *variables)
        return net(net.preprocessing(augment.centre_crop(images, image_size)))

    return embed
