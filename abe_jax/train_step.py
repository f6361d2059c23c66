"""One device's step over the axis `DATA_AXIS`, and one device's embedding of images."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from abe_jax import augment, losses
from abe_jax.errors import UserError, require_known
from abe_jax.models.batch_norm import BatchNorm
from abe_jax.parallel import DATA_AXIS
from abe_jax.precision import at_least_float32

Tree = Any

# What may train: the whole model, or all but S.
PARTS = ("all", "heads")
_FROZEN = "spatial"  # where each model has S


class TrainState(NamedTuple):
    """What training changes, and a checkpoint holds.

    Attributes:
      step: int32 scalar, number of steps taken.
      params: nested dict of the model's parameters.
      model_state: nested dict of its other variables (batch-norm averages).
      opt_state: state of the optimiser of both kinds of parameters.
      loss_params: nested dict of the loss's own parameters, such as proxies; mostly
        empty.
    """

    step: jax.Array
    params: Tree
    model_state: Tree
    opt_state: Tree
    loss_params: Tree


def initial_state(
    model: nnx.Module,
    optimizer: optax.GradientTransformation,
    loss_params: Tree | None = None,
    part: str = "all",
) -> TrainState:
    """The state before the first step, with the weights of the model.

    Args:
      model: to be trained.
      optimizer: as returned by `optimizer.create`.
      loss_params: as returned by `losses.initial_parameters`.
      part: what of the model trains, one of `PARTS`.
    """
    _, params, model_state = split_model(model)
    loss_params = loss_params or {}
    step = jnp.zeros((), jnp.int32)
    opt_state = optimizer.init(_optimised(_trained(params, part), loss_params))
    return TrainState(step, params, model_state, opt_state, loss_params)


def _optimised(params: Tree, loss_params: Tree) -> Tree:
    """The parameters, or the gradients, as the optimiser has them."""
    return {"model": params, "loss": loss_params}


def _trained(params: Tree, part: str) -> Tree:
    """Those of the model's parameters that train."""
    return {k: v for k, v in params.items() if part == "all" or k != _FROZEN}


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
    With `data.feature_cache`, "image" is what `make_features_step` gives of the images.

    Args:
      model: gives structure and preprocessing; its weights are those of the state.
      optimizer: as returned by `optimizer.create`.
      learning_rate: schedule, for the metrics.
      config: whole config.

    Raises:
      UserError: `train.chunks` above 1 with batch norm that is not frozen, or images
        of a size that the model cannot take, or an unknown loss or crop.
    """
    part, cached = config.model.train, bool(config.data.feature_cache)
    graphdef = split_model(_training_view(model, part))[0]
    microbatches = config.train.chunks
    losses.check(config.loss)
    require_known("augment.crop", config.augment.crop, augment.CROPS)
    _check_size(model, config.data.image_size)
    like = features_like(model, config.data.image_size) if cached else None
    if microbatches > 1 and _learns_statistics(model, part):
        raise UserError(
            f"train.chunks = {microbatches}: batch norm needs the statistics of the "
            "whole batch at once; set model.freeze_batch_norm=True, or "
            "model.trunk=googlenet, or train.chunks=1."
        )

    def step(state: TrainState, batch: dict) -> tuple[TrainState, dict]:
        labels = batch["label"]
        rows = labels.shape[0]
        if cached:
            views = batch["image"]
        else:
            first = jax.lax.axis_index(DATA_AXIS) * rows
            positions = first + jnp.arange(rows, dtype=jnp.int32)
            keys = augment.image_keys(config.seed, state.step, positions)
            with jax.named_scope("augment"):
                views = augment.augment(
                    batch["image"], keys, config.data.image_size, config.augment
                )
        trained = _trained(state.params, part)

        def embed(trained: Tree, views: jax.Array) -> tuple[jax.Array, Tree]:
            net = _merge(graphdef, state.params | trained, state.model_state)
            if like is not None:
                features = _unflatten(views, like)
            else:
                with jax.named_scope("spatial"):
                    features = net.spatial(net.preprocessing(views))
            embeddings = net.from_spatial(features)
            return embeddings, nnx.to_pure_dict(nnx.state(net, nnx.Not(nnx.Param)))

        def share_of_loss(embeddings: jax.Array, own: Tree) -> tuple[jax.Array, dict]:
            with jax.named_scope("losses"):
                return losses.total(
                    embeddings, labels, own, config.loss, axis_name=DATA_AXIS
                )

        def loss_gradient(embeddings: jax.Array) -> tuple[tuple[jax.Array, Tree], dict]:
            # Of this device's share: differentiating a psum of it would be wrong.
            gradient = jax.grad(share_of_loss, argnums=(0, 1), has_aux=True)
            return gradient(embeddings, state.loss_params)

        if microbatches == 1:
            embeddings, pull_back, model_state = jax.vjp(
                lambda trained: embed(trained, views), trained, has_aux=True
            )
            (cotangent, of_loss), shares = loss_gradient(embeddings)
            (of_model,) = pull_back(cotangent)
        else:
            model_state = state.model_state
            of_model, of_loss, shares = _in_microbatches(
                lambda params, views: embed(params, views)[0],
                loss_gradient,
                trained,
                views.reshape(microbatches, rows // microbatches, *views.shape[1:]),
            )
        # Summed when all are there: in bfloat16 XLA else rounds weights, on GPUs, where
        # their summed gradients are used, and the pass backward waits for 17 sums.
        of_device = jax.lax.optimization_barrier(_optimised(of_model, of_loss))
        gradients, metrics = jax.lax.psum((of_device, shares), DATA_AXIS)
        before = _optimised(trained, state.loss_params)
        with jax.named_scope("update"):
            updates, opt_state = optimizer.update(gradients, state.opt_state, before)
            after: Any = optax.apply_updates(before, updates)
            metrics["gradient_norm"] = _norm(gradients)
        metrics["learning_rate"] = jnp.asarray(learning_rate(state.step), jnp.float32)
        following = TrainState(
            state.step + 1,
            state.params | after["model"],
            model_state,
            opt_state,
            after["loss"],
        )
        return following, metrics

    return step


def _check_size(model: Any, image_size: int) -> None:
    model.preprocessing.check_size(image_size, image_size)


def _norm(tree: Tree) -> jax.Array:
    """The length of all values as one vector, which the optimiser makes as well."""
    return jnp.linalg.norm(jnp.concatenate([x.ravel() for x in jax.tree.leaves(tree)]))


def _training_view(model: nnx.Module, part: str) -> Any:
    """The module in training mode; a frozen S uses its running averages."""
    view: Any = _view(model, use_running_average=False)
    if part != "all":
        frozen = _view(getattr(model, _FROZEN), use_running_average=True)
        setattr(view, _FROZEN, frozen)
    return view


def _learns_statistics(model: nnx.Module, part: str) -> bool:
    return any(
        isinstance(module, BatchNorm)
        and not module.frozen
        and (part == "all" or path[0] != _FROZEN)
        for path, module in nnx.iter_modules(model)
    )


def _in_microbatches(
    embed: Callable[[Tree, jax.Array], jax.Array],
    loss_gradient: Callable[[jax.Array], tuple[tuple[jax.Array, Tree], dict]],
    params: Tree,
    views: jax.Array,
) -> tuple[Tree, Tree, dict]:
    """Gradients of a loss over all pairs, with one microbatch's activations at a time.

    Embeds all microbatches, takes the gradient of the loss with respect to all
    embeddings, and embeds each microbatch once more to pull its cotangents back
    (gradient caching; Gao et al., 2021).

    Args:
      embed: parameters and views to embeddings `[rows, M, D/M]`.
      loss_gradient: all embeddings to the gradients of the loss, with respect to them
        and to its own parameters, and metrics.
      params: of the model.
      views: `[microbatches, rows, H, W, 3]`.
    """
    embeddings = jax.lax.map(lambda images: embed(params, images), views)
    rows = embeddings.reshape(-1, *embeddings.shape[2:])
    (cotangents, of_loss), metrics = loss_gradient(rows)

    def add(total: Tree, part: tuple[jax.Array, jax.Array]) -> tuple[Tree, None]:
        images, cotangent = part
        _, pull_back = jax.vjp(lambda params: embed(params, images), params)
        (gradients,) = pull_back(cotangent)
        return jax.tree.map(jnp.add, total, gradients), None

    zeros = jax.tree.map(jnp.zeros_like, params)
    parts = (views, cotangents.reshape(embeddings.shape))
    gradients, _ = jax.lax.scan(add, zeros, parts)
    return gradients, of_loss, metrics


def make_embed_step(
    model: nnx.Module, image_size: int
) -> Callable[[tuple[Tree, Tree], jax.Array], jax.Array]:
    """Makes one device's embedding of images, to be mapped by `parallel`.

    It takes (parameters, other variables) and uint8 images `[B, H, W, 3]`, uses their
    centre crop and the running averages of batch norm, and returns `[B, M, D/M]`
    float32.
    """
    return _on_centre_crops(model, image_size, lambda net, images: net(images))


def make_attention_step(
    model: nnx.Module, image_size: int
) -> Callable[[tuple[Tree, Tree], jax.Array], jax.Array]:
    """As `make_embed_step`, but returns the masks `[B, M, h, w, C]`, float32."""
    return _on_centre_crops(
        model, image_size, lambda net, x: at_least_float32(net.attention(x))
    )


def make_features_step(
    model: nnx.Module, image_size: int
) -> Callable[[tuple[Tree, Tree], jax.Array], jax.Array]:
    """As `make_embed_step`, but returns the outputs of S, flattened: `[B, F]`."""

    def features(net: Any, images: jax.Array) -> jax.Array:
        parts = jax.tree.leaves(net.spatial(images))
        return jnp.concatenate([x.reshape(len(images), -1) for x in parts], axis=1)

    return _on_centre_crops(model, image_size, features)


def features_like(model: Any, image_size: int) -> Tree:
    """Shapes and dtypes of what S puts out for one image."""
    image = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    spatial: Any = _view(model.spatial, use_running_average=True)
    return jax.eval_shape(lambda x: spatial(x), image)


def _unflatten(rows: jax.Array, like: Tree) -> Tree:
    """Turns what `make_features_step` flattened, `[B, F]`, back into outputs of S."""
    leaves, structure = jax.tree.flatten(like)
    ends = np.cumsum([leaf.size for leaf in leaves])[:-1]
    parts = jnp.split(rows, ends, axis=1)
    return jax.tree.unflatten(
        structure,
        [
            part.reshape(-1, *leaf.shape[1:])
            for part, leaf in zip(parts, leaves, strict=True)
        ],
    )


def _on_centre_crops(
    model: nnx.Module, image_size: int, method: Callable[[Any, jax.Array], jax.Array]
) -> Callable[[tuple[Tree, Tree], jax.Array], jax.Array]:
    graphdef = split_model(_view(model, use_running_average=True))[0]
    _check_size(model, image_size)

    def program(variables: tuple[Tree, Tree], images: jax.Array) -> jax.Array:
        net = _merge(graphdef, *variables)
        views = augment.centre_crop(images, image_size)
        return method(net, net.preprocessing(views))

    return program
