"""Models: images to the embeddings of M learners."""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from abe_jax.errors import UserError, require_known
from abe_jax.models import weights
from abe_jax.models.abe import ABE, require_turns
from abe_jax.models.embedder import Embedder, dim_of_learner
from abe_jax.models.googlenet import GoogLeNet
from abe_jax.models.heads import MHeads, OneHead
from abe_jax.models.trunk import Trunk
from abe_jax.models.trunks import TRUNKS
from abe_jax.models.weights import is_new_layer, layer_of

__all__ = [
    "ABE",
    "Embedder",
    "GoogLeNet",
    "MHeads",
    "OneHead",
    "check",
    "create",
    "is_new_layer",
    "layer_of",
]

_MODELS = {"abe": ABE, "m_heads": MHeads, "one_head": OneHead}

_DTYPES = {"float32": None, "bfloat16": jnp.bfloat16}


def create(config, *, rngs: nnx.Rngs) -> Embedder:
    """Makes the model that `config.model` describes.

    `one_head` is an ensemble of one: it ignores `num_learners`. With `pretrained`, the
    trunk's layers start from that file; all else starts at random.

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
    check(config)
    path = config.get("pretrained")
    arguments = {
        "embedding_dim": config.embedding_dim,
        "trunk": _trunk(config),
        "branch": config.get("branch"),
    }
    if config.name != "one_head":
        arguments["num_learners"] = config.num_learners
    if config.name == "abe":
        arguments["attention_blocks"] = config.get("attention_blocks")
        arguments["attention_spread"] = config.get("attention_spread", 1.0)
        arguments["learners_in_turn"] = config.get("learners_in_turn", False)
    model = _MODELS[config.name](**arguments, rngs=rngs)
    if path:
        weights.initialize(model, path)
    return model


def _trunk(config) -> Trunk:
    return dataclasses.replace(
        TRUNKS[config.trunk],
        width=config.width,
        freeze_batch_norm=config.get("freeze_batch_norm", False),
        dtype=_DTYPES[config.get("dtype", "float32")],
        rematerialize=config.get("rematerialize", False),
    )


def check(config) -> None:
    """Raises UserError where a `model` section describes no possible model."""
    require_known("model.name", config.name, _MODELS)
    require_known("model.trunk", config.trunk, TRUNKS)
    require_known("model.dtype", config.get("dtype", "float32"), _DTYPES)
    if config.width <= 0:
        raise UserError(f"model.width is {config.width}; it must be above 0.")
    learners = 1 if config.name == "one_head" else config.num_learners
    dim_of_learner(learners, config.embedding_dim)
    trunk = _trunk(config)
    trunk.split(config.get("branch"))
    if config.name == "abe":
        trunk.copied_stages(config.get("branch"), config.get("attention_blocks"))
    if trunk.freeze_batch_norm and not trunk.has_batch_norm:
        having = ", ".join(repr(n) for n, t in TRUNKS.items() if t.has_batch_norm)
        raise UserError(
            "model.freeze_batch_norm needs a trunk with batch norm, such as "
            f"{having}; model.trunk is {config.trunk!r}."
        )
    if config.get("learners_in_turn"):
        if config.name != "abe":
            raise UserError(
                "model.learners_in_turn is for model.name = 'abe', not "
                f"{config.name!r}."
            )
        require_turns(trunk)
    if config.get("pretrained") and config.width != 1:
        raise UserError(
            f"model.pretrained needs model.width = 1, not {config.width}: published "
            "weights have the published sizes."
        )
