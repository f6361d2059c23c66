"""The attention-based ensemble (Kim et al., ECCV 2018, section 3).

    B_m(x) = G(S(x) * A_m(S(x)))

S, G and the attention's common part are shared by the learners; each learner owns one
1 x 1 convolution. All learners run as one batch of B * M maps.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from abe_jax.models import googlenet, initializers
from abe_jax.models.cpu import lowering
from abe_jax.precision import at_least_float32


class Attention(nnx.Module):
    """Masks of all learners: a copy of inception 4a-4e, then one 1 x 1 convolution.

    The M last layers are one convolution to M * C channels, learner by learner.
    """

    def __init__(
        self,
        num_learners: int,
        *,
        width: float,
        variant: googlenet.Variant,
        rngs: nnx.Rngs,
    ):
        channels = googlenet.block_channels("3b", width)
        self.num_learners = num_learners
        self.common = googlenet.Inception4(width=width, variant=variant, rngs=rngs)
        self.last = nnx.Conv(
            googlenet.block_channels("4e", width),
            channels * num_learners,
            (1, 1),
            padding=((0, 0), (0, 0)),
            kernel_init=initializers.glorot_uniform,
            bias_init=initializers.zeros,
            conv_general_dilated=lowering.conv_general_dilated,
            dtype=variant.dtype,
            rngs=rngs,
        )

    def __call__(self, maps: jax.Array) -> jax.Array:
        """Maps `[B, h, w, C]` to masks `[B, M, h, w, C]` in (0, 1)."""
        masks = nnx.sigmoid(self.last(self.common(maps)))
        batch, height, width, _ = masks.shape
        masks = masks.reshape(batch, height, width, self.num_learners, -1)
        return jnp.moveaxis(masks, 3, 1)


class ABE(nnx.Module):
    """ABE-M: images to the unit-length embeddings of M learners."""

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
          rngs: source of the initial weights; new layers start Glorot (paper).
        """
        self.num_learners = num_learners
        form = googlenet.variant_of(trunk)
        self.trunk = googlenet.GoogLeNet(trunk, width=width, rngs=rngs)
        self.attention_branch = Attention(
            num_learners, width=width, variant=form, rngs=rngs
        )
        self.head = nnx.Linear(
            googlenet.block_channels("5b", width),
            embedding_dim // num_learners,
            kernel_init=initializers.glorot_uniform,
            bias_init=initializers.zeros,
            rngs=rngs,
        )

    @property
    def preprocessing(self) -> googlenet.Preprocessing:
        """What the trunk expects of its input."""
        return self.trunk.preprocessing

    def attention(self, images: jax.Array) -> jax.Array:
        """Maps images `[B, H, W, 3]` to masks `[B, M, H/16, W/16, 480]` in (0, 1)."""
        return self.attention_branch(self.trunk.spatial(images))

    def __call__(self, images: jax.Array) -> jax.Array:
        """Embeds preprocessed images.

        Args:
          images: `[B, H, W, 3]`, as `preprocessing` leaves them.

        Returns:
          `[B, M, D/M]` float32, of unit length for each learner.
        """
        maps = self.trunk.spatial(images)
        masked = maps[:, None] * self.attention_branch(maps)
        features = self.trunk.global_features(masked.reshape(-1, *maps.shape[1:]))
        embeddings = at_least_float32(self.head(features))
        return unit_length(embeddings.reshape(maps.shape[0], self.num_learners, -1))


def unit_length(vectors: jax.Array) -> jax.Array:
    """Scales vectors `[..., D]` to length 1; a zero vector stays zero."""
    squares = jnp.sum(jnp.square(vectors), axis=-1, keepdims=True)
    return vectors * jax.lax.rsqrt(jnp.maximum(squares, 1e-12))
