"""The paper's baselines, with the interface of `ABE` (Kim et al., ECCV 2018).

M-heads: B_m(x) = G_m(S(x))     S shared, M separate G_m, no attention
1-head:  B(x) = G(S(x))         plain GoogLeNet
"""

import jax
from flax import nnx

from abe_jax.models import googlenet, initializers
from abe_jax.models.abe import unit_length
from abe_jax.precision import at_least_float32


class Head(nnx.Module):
    """G_m with its last layer: maps to the vectors of one learner."""

    def __init__(
        self,
        dim: int,
        *,
        width: float,
        variant: googlenet.Variant,
        rngs: nnx.Rngs,
    ):
        self.global_features = googlenet.GlobalTrunk(
            width=width, variant=variant, rngs=rngs
        )
        self.head = nnx.Linear(
            googlenet.block_channels("5b", width),
            dim,
            kernel_init=initializers.glorot_uniform,
            bias_init=initializers.zeros,
            rngs=rngs,
        )

    def __call__(self, maps: jax.Array) -> jax.Array:
        """Maps `[B, h, w, 480]` to `[B, D/M]` (at width 1)."""
        return self.head(self.global_features(maps))


class MHeads(nnx.Module):
    """M-heads: images to the unit-length embeddings of M learners.

    The heads are one module whose variables have a leading axis of M.
    """

    def __init__(
        self,
        *,
        num_learners: int,
        embedding_dim: int,
        trunk: str | googlenet.Variant = "googlenet",
        width: float = 1.0,
        rngs: nnx.Rngs,
    ):
        """Makes an ensemble with random weights.

        Args:
          num_learners: M.
          embedding_dim: D, the dimensions of all learners together.
          trunk: a key of `googlenet.VARIANTS`, or a variant with other options.
          width: factor on the trunk's channels; 1 is the paper's network.
          rngs: source of the initial weights; the heads' all differ.
        """
        variant = googlenet.variant_of(trunk)
        self.num_learners = num_learners
        self.preprocessing = variant.preprocessing
        self.spatial = googlenet.SpatialTrunk(width=width, variant=variant, rngs=rngs)

        @nnx.split_rngs(splits=num_learners)
        @nnx.vmap
        def make_head(rngs: nnx.Rngs) -> Head:
            return Head(
                embedding_dim // num_learners, width=width, variant=variant, rngs=rngs
            )

        self.heads = make_head(rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Embeds preprocessed images.

        Args:
          images: `[B, H, W, 3]`, as `preprocessing` leaves them.

        Returns:
          `[B, M, D/M]` float32, of unit length for each learner.
        """
        run = nnx.vmap(lambda head, maps: head(maps), in_axes=(0, None), out_axes=1)
        return unit_length(at_least_float32(run(self.heads, self.spatial(images))))


class OneHead(nnx.Module):
    """1-head: images to one unit-length embedding, the ensemble of one learner."""

    num_learners = 1

    def __init__(
        self,
        *,
        embedding_dim: int,
        trunk: str | googlenet.Variant = "googlenet",
        width: float = 1.0,
        rngs: nnx.Rngs,
    ):
        """Makes a network with random weights.

        Args:
          embedding_dim: D.
          trunk: a key of `googlenet.VARIANTS`, or a variant with other options.
          width: factor on the trunk's channels; 1 is the published network.
          rngs: source of the initial weights.
        """
        self.trunk = googlenet.GoogLeNet(trunk, width=width, rngs=rngs)
        self.head = nnx.Linear(
            googlenet.block_channels("5b", width),
            embedding_dim,
            kernel_init=initializers.glorot_uniform,
            bias_init=initializers.zeros,
            rngs=rngs,
        )

    @property
    def preprocessing(self) -> googlenet.Preprocessing:
        """What the trunk expects of its input."""
        return self.trunk.preprocessing

    def __call__(self, images: jax.Array) -> jax.Array:
        """Embeds preprocessed images.

        Args:
          images: `[B, H, W, 3]`, as `preprocessing` leaves them.

        Returns:
          `[B, 1, D]` float32, of unit length.
        """
        features = self.trunk.global_features(self.trunk.spatial(images))
        return unit_length(at_least_float32(self.head(features)))[:, None]
