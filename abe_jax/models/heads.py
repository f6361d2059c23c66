"""The paper's baselines, with the interface of `ABE` (Kim et al., ECCV 2018).

M-heads: B_m(x) = G_m(S(x))     S shared, M separate G_m, no attention
1-head:  B(x) = G(S(x))         plain GoogLeNet, or another trunk
"""

import jax
from flax import nnx

from abe_jax.models.embedder import (
    Embedder,
    dim_of_learner,
    embedding_layer,
    unit_length,
)
from abe_jax.models.trunk import SpatialFeatures, Trunk
from abe_jax.models.trunks import trunk_of
from abe_jax.precision import at_least_float32


class Head(nnx.Module):
    """G_m with its last layer: maps to the vectors of one learner."""

    def __init__(
        self, dim: int, *, trunk: Trunk, stages: tuple[str, ...], rngs: nnx.Rngs
    ):
        self.global_features = trunk.section(stages, rngs=rngs)
        self.head = embedding_layer(trunk.channels(stages[-1]), dim, rngs)

    def __call__(self, features: SpatialFeatures) -> jax.Array:
        """S's output to `[B, D/M]`."""
        return self.head(self.global_features(features))


class MHeads(Embedder):
    """M-heads: images to the unit-length embeddings of M learners.

    The heads are one module whose variables have a leading axis of M.
    """

    def __init__(
        self,
        *,
        num_learners: int,
        embedding_dim: int,
        trunk: str | Trunk = "googlenet",
        branch: str | None = None,
        rngs: nnx.Rngs,
    ):
        """Makes an ensemble with random weights; the heads' all differ.

        Args and what is raised are those of `ABE`.
        """
        trunk, dim = trunk_of(trunk), dim_of_learner(num_learners, embedding_dim)
        stages_of_s, stages_of_g = trunk.split(branch)
        super().__init__(num_learners, trunk=trunk, stages_of_s=stages_of_s, rngs=rngs)

        @nnx.split_rngs(splits=num_learners)
        @nnx.vmap
        def make_head(rngs: nnx.Rngs) -> Head:
            return Head(dim, trunk=trunk, stages=stages_of_g, rngs=rngs)

        self.heads = make_head(rngs)

    def from_spatial(self, features: SpatialFeatures) -> jax.Array:
        """S's output to embeddings; see `__call__`."""
        run = nnx.vmap(lambda head, x: head(x), in_axes=(0, None), out_axes=1)
        return unit_length(at_least_float32(run(self.heads, features)))


class OneHead(Embedder):
    """1-head: images to one unit-length embedding, the ensemble of one learner."""

    def __init__(
        self,
        *,
        embedding_dim: int,
        trunk: str | Trunk = "googlenet",
        branch: str | None = None,
        rngs: nnx.Rngs,
    ):
        """Makes a network with random weights.

        Args and what is raised are those of `ABE`.
        """
        trunk, dim = trunk_of(trunk), dim_of_learner(1, embedding_dim)
        stages_of_s, stages_of_g = trunk.split(branch)
        super().__init__(1, trunk=trunk, stages_of_s=stages_of_s, rngs=rngs)
        self.global_features = trunk.section(stages_of_g, rngs=rngs)
        self.head = embedding_layer(trunk.channels(stages_of_g[-1]), dim, rngs)

    def from_spatial(self, features: SpatialFeatures) -> jax.Array:
        """S's output to embeddings; see `__call__`."""
        embeddings = self.head(self.global_features(features))
        return unit_length(at_least_float32(embeddings))[:, None]
