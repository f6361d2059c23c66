"""What ABE asks of a network: a chain of named stages that can be cut between two.

S runs to the branching point, G from there to the features, and the attention branch
is a copy of the stages behind the branching point. `trunks.TRUNKS` lists the networks.
"""

import abc
import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from abe_jax.models.naming import Naming
from abe_jax.precision import working_dtype


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """What a trunk expects of its input: `(channels - mean) / scale`.

    Attributes:
      mean: per channel, in units of 0 to 255, in the trunk's channel order.
      scale: the divisor, in units of 0 to 255.
      reverse_channels: True where the trunk reads BGR.
    """

    mean: tuple[float, float, float]
    scale: float
    reverse_channels: bool

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps RGB images `[..., 3]` of 0 to 255 to float32 input of the trunk."""
        images = images.astype(working_dtype())
        if self.reverse_channels:
            images = images[..., ::-1]
        mean = jnp.asarray(self.mean, images.dtype)
        return (images - jnp.expand_dims(mean, range(images.ndim - 1))) / self.scale


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
        """Stages behind a branching point that an attention branch may copy.

        They keep the size of the maps: masks have the positions of S's output.
        """

    @property
    @abc.abstractmethod
    def default_attention_blocks(self) -> int:
        """How many of `attention_stages` an attention branch copies by default."""

    @abc.abstractmethod
    def channels(self, stage: str) -> int:
        """Number of channels that a stage puts out."""

    @abc.abstractmethod
    def section(self, stages: tuple[str, ...], *, rngs: nnx.Rngs) -> nnx.Module:
        """Some stages in a row, with random weights: images or maps to maps.

        Its attributes are layers, named as in every other section of the trunk: that is
        how weights find their place (`weights.layer_of`).
        """

    def split(
        self, branch: str | None = None
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The stages of S and those of G.

        Raises:
          KeyError: S cannot end there.
        """
        branch = branch or self.branches[0]
        if branch not in self.branches:
            raise KeyError(branch)
        end = self.stages.index(branch) + 1
        return self.stages[:end], self.stages[end:]
