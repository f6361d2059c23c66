"""Models: images to the embeddings of M learners."""

from flax import nnx

from abe_jax.errors import UserError
from abe_jax.models.abe import ABE
from abe_jax.models.googlenet import VARIANTS, GoogLeNet

__all__ = ["ABE", "GoogLeNet", "create"]


def create(config, *, rngs: nnx.Rngs) -> ABE:
    """Makes the model that `config.model` describes, with random weights.

    Args:
      config: the `model` section of a config (see `configs/default.py`).
      rngs: source of the initial weights.

    Returns:
      a module; `module(images [B, H, W, 3])` is `[B, M, D/M]` float32, of unit length
      per learner.

    Raises:
      UserError: a field has a value that no model can have.
    """
    learners, dim = config.num_learners, config.embedding_dim
    if config.name != "abe":
        raise UserError(f"model.name is {config.name!r}; known is 'abe'.")
    if config.trunk not in VARIANTS:
        known = ", ".join(map(repr, VARIANTS))
        raise UserError(f"model.trunk is {config.trunk!r}; known are {known}.")
    if learners < 1 or dim < 1 or dim % learners:
        raise UserError(
            f"model.embedding_dim = {dim} does not divide by model.num_learners = "
            f"{learners}; each learner gets embedding_dim / num_learners dimensions."
        )
    if config.width <= 0:
        raise UserError(f"model.width is {config.width}; it must be above 0.")
    return ABE(
        num_learners=learners,
        embedding_dim=dim,
        trunk=config.trunk,
        width=config.width,
        rngs=rngs,
    )
