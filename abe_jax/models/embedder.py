"""What all models are: images to the unit-length embeddings of M learners."""

import abc

import jax
import jax.numpy as jnp
from flax import nnx

from abe_jax.errors import UserError
from abe_jax.models import initializers
from abe_jax.models.trunk import SpatialFeatures, Trunk


class Embedder(nnx.Module):
    """M learners behind an S that they share.

    Attributes:
      num_learners: M.
      trunk: name of the trunk.
      preprocessing: what the trunk expects of its input.
      spatial: S, the trunk's stages up to the branching point.
    """

    def __init__(
        self,
        num_learners: int,
        *,
        trunk: Trunk,
        stages_of_s: tuple[str, ...],
        rngs: nnx.Rngs,
    ):
        """Makes S with random weights."""
        self.num_learners = num_learners
        self.trunk = trunk.name
        self.preprocessing = trunk.preprocessing
        self.spatial = trunk.section(stages_of_s, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Embeds preprocessed images.

        Args:
          images: `[B, H, W, 3]`, as `preprocessing` leaves them.

        Returns:
          `[B, M, D/M]` float32, of unit length for each learner.
        """
        return self.from_spatial(self.spatial(images))

    @abc.abstractmethod
    def from_spatial(self, features: SpatialFeatures) -> jax.Array:
        """S's output to embeddings; see `__call__`."""


def dim_of_learner(num_learners: int, embedding_dim: int) -> int:
    """D/M, the share of each learner.

    Raises:
      UserError: the learners cannot share D equally.
    """
    if min(num_learners, embedding_dim) < 1:
        raise UserError(
            f"model.num_learners = {num_learners} and model.embedding_dim = "
            f"{embedding_dim} must be 1 or more."
        )
    if embedding_dim % num_learners:
        raise UserError(
            f"model.embedding_dim = {embedding_dim} is not divisible by "
            f"model.num_learners = {num_learners}; each learner gets embedding_dim / "
            "num_learners dimensions."
        )
    return embedding_dim // num_learners


def embedding_layer(features: int, dim: int, rngs: nnx.Rngs) -> nnx.Linear:
    """The last layer of G, `[..., features]` to `[..., dim]`; Glorot start (paper)."""
    return nnx.Linear(
        features,
        dim,
        kernel_init=initializers.glorot_uniform,
        bias_init=initializers.zeros,
        rngs=rngs,
    )


def unit_length(vectors: jax.Array) -> jax.Array:
    """Scales vectors `[..., D]` to length 1; a zero vector stays zero."""
    squares = jnp.sum(jnp.square(vectors), axis=-1, keepdims=True)
    return vectors * jax.lax.rsqrt(jnp.maximum(squares, 1e-12))
