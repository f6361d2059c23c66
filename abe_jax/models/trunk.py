"""What ABE asks of a network: a chain of named stages that can be cut between two.

S runs to the branching point, G from there to the features, and the attention branch
is a copy of the stages behind the branching point. `trunks.TRUNKS` lists the networks.
Stages hand on maps, or maps beside tokens that have no place in the image.
"""

import abc
import dataclasses
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from abe_jax.errors import UserError, require_known
from abe_jax.models.naming import Naming
from abe_jax.precision import working_dtype

# `checkpoint_name` of what is kept where G is computed again, learner by learner: much
# arithmetic for few bytes.
KEPT = "kept"

# Mean and standard deviation of ImageNet's channels, RGB, in units of 0 to 255.
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)


class Tokens(NamedTuple):
    """What stages of a transformer hand on.

    Attributes:
      maps: the tokens of the patches, `[B, h, w, C]`.
      others: those without a place in the image, as class tokens are: `[B, N, C]`.
    """

    maps: jax.Array
    others: jax.Array


# Maps `[B, h, w, C]`, alone or beside other tokens.
SpatialFeatures: TypeAlias = jax.Array | Tokens


def maps_of(features: SpatialFeatures) -> jax.Array:
    """What has a place in the image, `[B, h, w, C]`."""
    return features.maps if isinstance(features, Tokens) else features


def masked(features: SpatialFeatures, masks: jax.Array) -> SpatialFeatures:
    """What each learner sees of S's output: the maps times its mask.

    Tokens without a place in the image are the same for all learners (ours).

    Args:
      features: maps `[B, h, w, C]`, alone or beside other tokens.
      masks: `[M, B, h, w, C]`.

    Returns:
      the same for a batch of M * B, the images of a learner side by side.
    """
    maps = maps_of(features)
    seen = (maps[None] * masks).reshape(-1, *maps.shape[1:])
    if not isinstance(features, Tokens):
        return seen
    batch, count, channels = features.others.shape
    spread = (masks.shape[0], batch, count, channels)
    others = jnp.broadcast_to(features.others[None], spread)
    return Tokens(seen, others.reshape(-1, count, channels))


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """What a trunk expects of its input: `(channels - mean) / scale`.

    Attributes:
      mean: per channel, in units of 0 to 255, in the trunk's channel order.
      scale: the divisor, in units of 0 to 255: one, or one per channel.
      reverse_channels: True where the trunk reads BGR.
      multiple_of: the sides of images are divisible by it; that of a ViT's patches.
    """

    mean: tuple[float, float, float]
    scale: float | tuple[float, float, float]
    reverse_channels: bool
    multiple_of: int = 1

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps RGB images `[..., 3]` of 0 to 255 to float32 input of the trunk."""
        images = images.astype(working_dtype())
        if self.reverse_channels:
            images = images[..., ::-1]

        def per_channel(values: tuple[float, float, float]) -> jax.Array:
            channels = jnp.asarray(values, images.dtype)
            return jnp.expand_dims(channels, range(images.ndim - 1))

        scale = self.scale
        divisor = per_channel(scale) if isinstance(scale, tuple) else scale
        return (images - per_channel(self.mean)) / divisor

    def check_size(self, *sides: int) -> None:
        """Raises UserError for images whose sides the trunk cannot take."""
        side = next((side for side in sides if side % self.multiple_of), None)
        if side is not None:
            below = side // self.multiple_of * self.multiple_of
            near = [str(n) for n in (below, below + self.multiple_of) if n]
            raise UserError(
                f"images are {' x '.join(map(str, sides))} pixels, but model.trunk "
                f"needs sides divisible by its patch size, {self.multiple_of}: set "
                f"--config.data.image_size to {' or '.join(near)}."
            )


@dataclasses.dataclass(frozen=True)
class Trunk(abc.ABC):
    """A published network, cut where ABE needs it, and how it is computed.

    Attributes:
      name: of the published form; its key in `trunks.TRUNKS`.
      preprocessing: the input it was trained on.
      namings: how files of its published weights name their tensors.
      width: factor on every number of channels; 1 is the published network.
      freeze_batch_norm: batch norm uses its running averages in training too.
      dtype: of convolutions and maps; None for that of the weights. Statistics and the
        final average are float32 at least.
      rematerialize: backward, a block is computed again from its input, so that only
        blocks' inputs are kept.
    """

    name: str
    preprocessing: Preprocessing
    namings: tuple[Naming, ...]
    width: float = 1.0
    freeze_batch_norm: bool = False
    dtype: DTypeLike | None = None
    rematerialize: bool = False

    @property
    @abc.abstractmethod
    def has_batch_norm(self) -> bool:
        """Whether there is any to freeze."""

    @property
    @abc.abstractmethod
    def stages(self) -> tuple[str, ...]:
        """Names of the stages in their order; the last one's output are features."""

    @property
    @abc.abstractmethod
    def branches(self) -> tuple[str, ...]:
        """The stages after which S may end; the first is the default."""

    @abc.abstractmethod
    def attention_stages(self, branch: str) -> tuple[str, ...]:
        """Stages, or parts of some, behind a branching point that attention may copy.

        They keep the size of the maps: masks have the positions of S's output.
        """

    @property
    @abc.abstractmethod
    def default_attention_blocks(self) -> int:
        """How many of `attention_stages` an attention branch copies by default.

        All, where there are fewer.
        """

    def copied_stages(
        self, branch: str | None = None, blocks: int | None = None
    ) -> tuple[str, ...]:
        """The stages behind the branching point that the attention branch copies.

        Args:
          branch: one of `branches`; by default the first.
          blocks: how many; by default `default_attention_blocks`.

        Raises:
          UserError: S cannot end there, or there are not so many.
        """
        branch = self.split(branch)[0][-1]
        stages = self.attention_stages(branch)
        if blocks is None:
            return stages[: self.default_attention_blocks]
        most = len(stages)
        if not min(1, most) <= blocks <= most:
            possible = f"1 to {most} blocks" if most else "no block (0)"
            raise UserError(
                f"model.attention_blocks is {blocks}; behind {branch!r} the attention "
                f"branch can copy {possible} of {self.name!r}."
            )
        return stages[:blocks]

    @abc.abstractmethod
    def channels(self, stage: str) -> int:
        """Number of channels that a stage puts out."""

    def scaled(self, channels: int) -> int:
        """Number of channels at the trunk's width; at least one."""
        return max(1, round(channels * self.width))

    @abc.abstractmethod
    def section(self, stages: tuple[str, ...], *, rngs: nnx.Rngs) -> nnx.Module:
        """Some stages in a row, with random weights, on images or `SpatialFeatures`.

        The last stage of the trunk puts out features, `[B, channels]`.

        Its attributes are layers, named as in every other section of the trunk: that is
        how weights find their place (`weights.layer_of`).
        """

    def split(
        self, branch: str | None = None
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The stages of S and those of G.

        Raises:
          UserError: S cannot end there.
        """
        branch = branch or self.branches[0]
        require_known("model.branch", branch, self.branches)
        end = self.stages.index(branch) + 1
        return self.stages[:end], self.stages[end:]
