"""Models: images to the embeddings of M learners."""

import dataclasses
from typing import TypeAlias

import jax
import jax.numpy as jnp
from absl import logging
from flax import nnx

from abe_jax.errors import UserError
from abe_jax.models.abe import ABE
from abe_jax.models.googlenet import VARIANTS, GoogLeNet
from abe_jax.models.heads import MHeads, OneHead

__all__ = [
    "ABE",
    "Embedder",
    "GoogLeNet",
    "MHeads",
    "OneHead",
    "create",
    "is_new_layer",
]

Embedder: TypeAlias = ABE | MHeads | OneHead

_MODELS = {"abe": ABE, "m_heads": MHeads, "one_head": OneHead}

_DTYPES = {"float32": None, "bfloat16": jnp.bfloat16}

# Attributes that hold layers which no published GoogLeNet has.
_NEW_LAYERS = {"head", "last"}


def create(config, *, rngs: nnx.Rngs) -> Embedder:
    """Makes the model that `config.model` describes.

    `one_head` is an ensemble of one: it takes no notice of `num_learners`. With
    `pretrained`, the layers that GoogLeNet has start from that file; the others, and
    without it all, start at random.

    Args:
      config: the `model` section of a config (see `configs/default.py`).
      rngs: source of the initial weights.

    Returns:
      a module; `module(images [B, H, W, 3])` is `[B, M, D/M]` float32, of unit length
      per learner, for images as `module.preprocessing` leaves them.

    Raises:
      UserError: a field has a value that no model can have, or the file of pretrained
        weights is not that trunk's.
    """
    path = config.get("pretrained")
    frozen = config.get("freeze_batch_norm", False)
    dtype = config.get("dtype", "float32")
    _check(config, path, frozen, dtype)
    trunk = dataclasses.replace(
        VARIANTS[config.trunk],
        freeze_batch_norm=frozen,
        dtype=_DTYPES[dtype],
        rematerialize=config.get("rematerialize", False),
    )
    arguments = {
        "embedding_dim": config.embedding_dim,
        "trunk": trunk,
        "width": config.width,
    }
    if config.name != "one_head":
        arguments["num_learners"] = config.num_learners
    model = _MODELS[config.name](**arguments, rngs=rngs)
    if path:
        from abe_jax import pretrained  # not above: it builds on this package

        pretrained.initialize(model, path, trunk=config.trunk)
    else:
        total = sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param)))
        logging.info("All %d parameters of the model are new.", total)
    return model


def is_new_layer(path: tuple[str, ...]) -> bool:
    """Whether a parameter belongs to a layer that no published GoogLeNet has.

    Args:
      path: keys of a parameter in the pure dict of a model's `nnx.Param` state, such
        as `("attention_branch", "last", "kernel")`.
    """
    return not _NEW_LAYERS.isdisjoint(path)


def _check(config, path: str | None, frozen: bool, dtype: str) -> None:
    if config.name not in _MODELS:
        known = ", ".join(map(repr, _MODELS))
        raise UserError(f"model.name is {config.name!r}; known are {known}.")
    if config.trunk not in VARIANTS:
        known = ", ".join(map(repr, VARIANTS))
        raise UserError(f"model.trunk is {config.trunk!r}; known are {known}.")
    if dtype not in _DTYPES:
        known = ", ".join(map(repr, _DTYPES))
        raise UserError(f"model.dtype is {dtype!r}; known are {known}.")
    learners = 1 if config.name == "one_head" else config.num_learners
    dim = config.embedding_dim
    if learners < 1 or dim < 1 or dim % learners:
        raise UserError(
            f"model.embedding_dim = {dim} does not divide by model.num_learners = "
            f"{learners}; each learner gets embedding_dim / num_learners dimensions."
        )
    if config.width <= 0:
        raise UserError(f"model.width is {config.width}; it must be above 0.")
    if frozen and not VARIANTS[config.trunk].batch_norm:
        raise UserError(
            "model.freeze_batch_norm needs a trunk with batch norm, 'googlenet_bn'; "
            f"model.trunk is {config.trunk!r}."
        )
    if path and config.width != 1:
        raise UserError(
            f"model.pretrained needs model.width = 1, not {config.width}: published "
            "weights have the published sizes."
        )
