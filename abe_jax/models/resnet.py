"""ResNet-50, cut where ABE needs it; an extension of ours, not the paper's.

S is conv1 to the end of layer3 (or layer2), the attention branch a copy of the next
layer's blocks, G the rest and the average over all positions. The classifier is left
out.

Sources: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, table 1;
torchvision's `resnet50` (v1.5: where a block halves the maps, its 3 x 3 convolution
does).
"""

import dataclasses
from functools import partial

import jax
from flax import nnx

from abe_jax.models import initializers, lowering, resnet_weights
from abe_jax.models.batch_norm import BatchNorm
from abe_jax.models.convolution import convolution
from abe_jax.models.trunk import IMAGENET_MEAN, IMAGENET_STD, Preprocessing, Trunk
from abe_jax.precision import at_least_float32

# Blocks of a layer, and channels of their 3 x 3 convolutions (table 1 of the paper).
_LAYERS = {
    "layer1": (3, 64),
    "layer2": (4, 128),
    "layer3": (6, 256),
    "layer4": (3, 512),
}
# A block puts out so many times the channels of its 3 x 3 convolution.
_EXPANSION = 4


@dataclasses.dataclass(frozen=True)
class ResNetForm(Trunk):
    """ResNet-50, and how it is computed.

    Single blocks, such as `layer3_0`, the first of layer3, are parts of stages: they
    keep the size of the maps, which the whole layer halves in its first block.
    """

    @property
    def has_batch_norm(self) -> bool:
        """Behind every convolution."""
        return True

    @property
    def stages(self) -> tuple[str, ...]:
        """conv1 with its pooling, four layers, and the average over all positions."""
        return ("conv1", *_LAYERS, "average")

    @property
    def branches(self) -> tuple[str, ...]:
        """layer3 has maps of a sixteenth of the image's side, as the paper's cut has.

        layer2 has four times the positions, and G twice the layers.
        """
        return ("layer3", "layer2")

    def attention_stages(self, branch: str) -> tuple[str, ...]:
        """The blocks of the next layer, without its stride."""
        layer = self.stages[self.stages.index(branch) + 1]
        return tuple(f"{layer}_{i}" for i in range(_LAYERS[layer][0]))

    @property
    def default_attention_blocks(self) -> int:
        """The whole layer: the longest has six blocks."""
        return 6

    def channels(self, stage: str) -> int:
        """Number of channels that a stage, or a block, puts out."""
        if stage == "conv1":
            return self.scaled(64)
        layer = "layer4" if stage == "average" else stage.split("_")[0]
        return _EXPANSION * self.scaled(_LAYERS[layer][1])

    def section(self, stages: tuple[str, ...], *, rngs: nnx.Rngs) -> "Section":
        """Some stages, or blocks, in a row, with random weights."""
        return Section(stages, form=self, rngs=rngs)


RESNET50 = ResNetForm(
    name="resnet50",
    preprocessing=Preprocessing(IMAGENET_MEAN, IMAGENET_STD, False),
    namings=(resnet_weights.TORCHVISION,),
)


class ConvNorm(nnx.Module):
    """Convolution without bias, batch norm."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        kernel: int,
        stride: int = 1,
        *,
        form: ResNetForm,
        rngs: nnx.Rngs,
    ):
        self.conv = convolution(
            in_channels,
            channels,
            kernel,
            stride,
            use_bias=False,
            kernel_init=initializers.small_uniform,
            dtype=form.dtype,
            rngs=rngs,
        )
        self.norm = BatchNorm(
            channels, epsilon=1e-5, frozen=form.freeze_batch_norm, rngs=rngs
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[B, h, w, C]` to `[B, h', w', C']`."""
        return self.norm(self.conv(x))


class Bottleneck(nnx.Module):
    """relu(x + f(x)), f being 1 x 1, 3 x 3 and 1 x 1 convolutions (figure 5, right)."""

    def __init__(
        self,
        in_channels: int,
        narrow: int,
        stride: int,
        *,
        form: ResNetForm,
        rngs: nnx.Rngs,
    ):
        unit = partial(ConvNorm, form=form, rngs=rngs)
        wide = _EXPANSION * narrow
        self.reduce = unit(in_channels, narrow, 1)
        self.three = unit(narrow, narrow, 3, stride)
        self.expand = unit(narrow, wide, 1)
        changes = stride != 1 or in_channels != wide
        self.shortcut = unit(in_channels, wide, 1, stride) if changes else None
        self.rematerialize = form.rematerialize

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[B, h, w, C]` to `[B, h / stride, w / stride, C']`."""
        run = Bottleneck._run
        return (nnx.remat(run) if self.rematerialize else run)(self, x)

    def _run(self, x: jax.Array) -> jax.Array:
        y = nnx.relu(self.three(nnx.relu(self.reduce(x))))
        kept = x if self.shortcut is None else self.shortcut(x)
        return lowering.computed_once(nnx.relu(self.expand(y) + kept))


class Section(nnx.Module):
    """Stages or blocks in a row. Layers are `conv1`, `layer1_0`, `layer1_1`, ..."""

    def __init__(self, stages: tuple[str, ...], *, form: ResNetForm, rngs: nnx.Rngs):
        self.stages = stages
        self.blocks = tuple(block for s in stages for block in _blocks(s))
        if "conv1" in stages:
            self.conv1 = ConvNorm(3, form.channels("conv1"), 7, 2, form=form, rngs=rngs)
        for block in self.blocks:
            layer, number = block.split("_")
            before = form.stages[form.stages.index(layer) - 1]
            source = form.channels(before if number == "0" else layer)
            halves = layer in stages and number == "0" and layer != "layer1"
            narrow, stride = form.scaled(_LAYERS[layer][1]), 2 if halves else 1
            module = Bottleneck(source, narrow, stride, form=form, rngs=rngs)
            setattr(self, block, module)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images `[B, H, W, 3]` or maps `[B, h, w, C]` to maps or features."""
        if "conv1" in self.stages:
            x = lowering.max_pool(nnx.relu(self.conv1(x)), 3, 2, ((1, 1), (1, 1)))
        for block in self.blocks:
            x = getattr(self, block)(x)
        if "average" in self.stages:
            x = at_least_float32(x).mean(axis=(1, 2))
        return x


def _blocks(stage: str) -> tuple[str, ...]:
    if stage in _LAYERS:
        return tuple(f"{stage}_{i}" for i in range(_LAYERS[stage][0]))
    return (stage,) if "_" in stage else ()
