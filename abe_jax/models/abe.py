"""The attention-based ensemble (Kim et al., ECCV 2018, section 3).

    B_m(x) = G(S(x) * A_m(S(x)))

S, G and the attention's common part are shared by the learners; each learner owns one
1 x 1 convolution. All learners run as one batch of M * B maps, or in turn.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from abe_jax.errors import UserError
from abe_jax.models import initializers, lowering
from abe_jax.models.convolution import convolution
from abe_jax.models.embedder import (
    Embedder,
    dim_of_learner,
    embedding_layer,
    unit_length,
)
from abe_jax.models.trunk import KEPT, SpatialFeatures, Trunk, maps_of, masked
from abe_jax.models.trunks import trunk_of
from abe_jax.precision import at_least_float32


class Attention(nnx.Module):
    """Masks of all learners: a copy of the stages behind S, then one 1 x 1 convolution.

    In the paper these stages are inception 4a to 4e. The M last layers are one
    convolution to M * C channels, learner by learner. Of a transformer's tokens only
    those of patches have masks (ours).
    """

    def __init__(
        self,
        num_learners: int,
        *,
        trunk: Trunk,
        branch: str,
        copied: tuple[str, ...],
        spread: float,
        rngs: nnx.Rngs,
    ):
        self.num_learners = num_learners
        self.common = trunk.section(copied, rngs=rngs)
        self.last = convolution(
            trunk.channels((branch, *copied)[-1]),
            trunk.channels(branch) * num_learners,
            1,
            kernel_init=partial(
                initializers.glorot_uniform, layers=num_learners, spread=spread
            ),
            dtype=trunk.dtype,
            rngs=rngs,
        )

    def __call__(self, features: SpatialFeatures) -> jax.Array:
        """S's output, maps `[B, h, w, C]`, to masks `[M, B, h, w, C]` in (0, 1)."""
        return self.masks(maps_of(self.common(features)))

    def masks(self, common: jax.Array) -> jax.Array:
        """The common part's output to masks."""
        assert self.last.bias is not None  # for type checkers
        common, kernel, bias = self.last.promote_dtype(
            (common, self.last.kernel[...], self.last.bias[...]), dtype=self.last.dtype
        )
        kernel = kernel.reshape(kernel.shape[2], self.num_learners, -1)
        masks = lowering.convolution_by_group(common, kernel)
        return nnx.sigmoid(masks + bias.reshape(self.num_learners, 1, 1, 1, -1))


class ABE(Embedder):
    """ABE-M: images to the unit-length embeddings of M learners."""

    def __init__(
        self,
        *,
        num_learners: int,
        embedding_dim: int,
        trunk: str | Trunk = "googlenet",
        branch: str | None = None,
        attention_blocks: int | None = None,
        attention_spread: float = 1.0,
        learners_in_turn: bool = False,
        rngs: nnx.Rngs,
    ):
        """Makes an ensemble with random weights.

        Args:
          num_learners: M.
          embedding_dim: D, the dimensions of all learners together.
          trunk: a key of `trunks.TRUNKS`, or a trunk with other options.
          branch: stage after which S ends, one of the trunk's `branches`; by default
            the first of them, which is the paper's.
          attention_blocks: how many of the trunk's blocks behind S the attention branch
            copies; by default the paper's number.
          attention_spread: factor on the initial (Glorot) weights of the masks' layer.
          learners_in_turn: G runs on one learner's maps at a time, and again in the
            backward pass but for what the trunk names `KEPT`; else on those of all
            learners at once.
          rngs: source of the initial weights; new layers start Glorot (paper).

        Raises:
          UserError: there can be no such model.
        """
        trunk = trunk_of(trunk)
        dim = dim_of_learner(num_learners, embedding_dim)
        copied = trunk.copied_stages(branch, attention_blocks)
        if learners_in_turn:
            require_turns(trunk)
        # In turn G is computed again anyway; flax's remat cannot be within that.
        of_g = replace(
            trunk, rematerialize=trunk.rematerialize and not learners_in_turn
        )
        stages_of_s, stages_of_g = trunk.split(branch)
        super().__init__(num_learners, trunk=trunk, stages_of_s=stages_of_s, rngs=rngs)
        self.learners_in_turn = learners_in_turn
        self.global_features = of_g.section(stages_of_g, rngs=rngs)
        self.attention_branch = Attention(
            num_learners,
            trunk=trunk,
            branch=stages_of_s[-1],
            copied=copied,
            spread=attention_spread,
            rngs=rngs,
        )
        self.head = embedding_layer(trunk.channels(stages_of_g[-1]), dim, rngs)

    def attention(self, images: jax.Array) -> jax.Array:
        """Maps images `[B, H, W, 3]` to masks in (0, 1) `[B, M, h, w, C]`.

        At the paper's branching point h, w are H/16, W/16, and C is 480.
        """
        return jnp.moveaxis(self.attention_branch(self.spatial(images)), 0, 1)

    def from_spatial(self, features: SpatialFeatures) -> jax.Array:
        """S's output to embeddings; see `__call__`."""
        with jax.named_scope("attention"):
            masks = self.attention_branch(features)
        learn = partial(self._learn, features)
        with jax.named_scope("learners"):
            if self.learners_in_turn:
                kept = jax.checkpoint_policies.save_only_these_names(KEPT)
                again = jax.checkpoint(learn, policy=kept)
                by_learner = jax.lax.map(again, masks[:, None])[:, 0]
            else:
                by_learner = learn(masks)
        return unit_length(jnp.moveaxis(by_learner, 0, 1))

    def _learn(self, features: SpatialFeatures, masks: jax.Array) -> jax.Array:
        """The unscaled embeddings, `[M, B, D/M]`, of the learners with these masks."""
        seen = masked(features, masks)
        embeddings = at_least_float32(self.head(self.global_features(seen)))
        return embeddings.reshape(*masks.shape[:2], -1)


def require_turns(trunk: Trunk) -> None:
    """Raises UserError where learners cannot run in turn on a trunk."""
    if trunk.has_batch_norm and not trunk.freeze_batch_norm:
        raise UserError(
            "model.learners_in_turn needs model.freeze_batch_norm=True, or a trunk "
            "without batch norm: else its statistics are those of all learners' maps."
        )
