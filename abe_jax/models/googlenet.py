"""GoogLeNet (Inception v1), cut where ABE needs it.

The paper's S is conv1 to inception 3b and pool3; its G has inception 4a to 5b and the
average over all positions. The classifiers are left out.

Sources: Szegedy et al., "Going Deeper with Convolutions", CVPR 2015, table 1;
BVLC's Caffe model and torchvision's `googlenet` for the details in which they differ.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from abe_jax.models import googlenet_weights, initializers
from abe_jax.models.batch_norm import DATA_AXIS, BatchNorm
from abe_jax.models.convolution import convolution
from abe_jax.models.cpu import lowering
from abe_jax.models.trunk import Preprocessing, Trunk
from abe_jax.precision import at_least_float32

# 1x1 | 3x3 reduce, 3x3 | 5x5 reduce, 5x5 | pool projection (table 1 of the paper).
_INCEPTION_CHANNELS = {
    "3a": (64, 96, 128, 16, 32, 32),
    "3b": (128, 128, 192, 32, 96, 64),
    "4a": (192, 96, 208, 16, 48, 64),
    "4b": (160, 112, 224, 24, 64, 64),
    "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64),
    "4e": (256, 160, 320, 32, 128, 128),
    "5a": (256, 160, 320, 32, 128, 128),
    "5b": (384, 192, 384, 48, 128, 128),
}


# Stages that halve the maps, and the window with which they do.
_POOLS = ("pool2", "pool3", "pool4")


@dataclasses.dataclass(frozen=True)
class GoogLeNetForm(Trunk):
    """One published form of GoogLeNet, and how it is computed.

    Attributes:
      batch_norm: batch norm behind every convolution (then without bias), or biases
        and local response normalisation in the stem.
      third_kernel: kernel of the third branch of an inception block.
      pool4_window: window of pool4.
    """

    batch_norm: bool = False
    third_kernel: int = 5
    pool4_window: int = 3

    @property
    def has_batch_norm(self) -> bool:
        """Torchvision's form has; BVLC's has none."""
        return self.batch_norm

    @property
    def stages(self) -> tuple[str, ...]:
        """conv1 with its pooling to 5b, and the average over all positions."""
        return (
            *("conv1", "conv2", "pool2", "3a", "3b", "pool3"),
            *("4a", "4b", "4c", "4d", "4e", "pool4", "5a", "5b", "average"),
        )

    @property
    def branches(self) -> tuple[str, ...]:
        """pool3 is the paper's choice; the others are those of its Figure 7."""
        return ("pool3", "pool2", "3a", "4a", "4b")

    def attention_stages(self, branch: str) -> tuple[str, ...]:
        """The inception blocks: the pooling between them is left out (paper)."""
        behind = self.stages[self.stages.index(branch) + 1 :]
        return tuple(stage for stage in behind if stage in _INCEPTION_CHANNELS)

    @property
    def default_attention_blocks(self) -> int:
        """4a to 4e (paper)."""
        return 5

    def channels(self, stage: str) -> int:
        """Number of channels that a stage puts out."""
        before = self.stages[: self.stages.index(stage) + 1]
        blocks = [s for s in before if s in _INCEPTION_CHANNELS]
        if blocks:
            return block_channels(blocks[-1], self.width)
        return scaled(64 if stage == "conv1" else 192, self.width)

    def section(self, stages: tuple[str, ...], *, rngs: nnx.Rngs) -> "Section":
        """Some stages in a row, with random weights."""
        return Section(stages, form=self, rngs=rngs)


# BVLC's Caffe model, on which the paper builds.
BVLC = GoogLeNetForm(
    name="googlenet",
    preprocessing=Preprocessing((104.0, 117.0, 123.0), 1.0, True),
    namings=(googlenet_weights.BVLC,),
)
# torchvision's, itself TensorFlow's Inception v1.
TORCHVISION = GoogLeNetForm(
    name="googlenet_bn",
    preprocessing=Preprocessing((127.5, 127.5, 127.5), 127.5, False),
    namings=(googlenet_weights.TORCHVISION,),
    batch_norm=True,
    third_kernel=3,
    pool4_window=2,
)


def scaled(channels: int, width: float) -> int:
    """Number of channels at a width factor; at least one."""
    return max(1, round(channels * width))


def block_channels(block: str, width: float) -> int:
    """Number of channels that an inception block puts out at a width factor."""
    one, _, three, _, five, pool = _INCEPTION_CHANNELS[block]
    return sum(scaled(c, width) for c in (one, three, five, pool))


class ConvUnit(nnx.Module):
    """Convolution, batch norm where the form has it, ReLU."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        kernel: int,
        stride: int = 1,
        *,
        form: GoogLeNetForm,
        rngs: nnx.Rngs,
    ):
        self.conv = convolution(
            in_channels,
            channels,
            kernel,
            stride,
            use_bias=not form.batch_norm,
            kernel_init=(
                initializers.small_uniform
                if form.batch_norm
                else initializers.he_normal
            ),
            dtype=form.dtype,
            rngs=rngs,
        )
        self.norm = (
            BatchNorm(
                channels,
                axis_name=DATA_AXIS,
                frozen=form.freeze_batch_norm,
                rngs=rngs,
            )
            if form.batch_norm
            else None
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.activate(self.conv(x))

    def activate(self, x: jax.Array) -> jax.Array:
        """What follows the convolution."""
        if self.norm is not None:
            x = self.norm(x)
        return nnx.relu(x)


def _pointwise_together(units: Sequence[ConvUnit], x: jax.Array) -> list[jax.Array]:
    """Units with 1 x 1 kernels on the same maps: one matrix product, one gradient."""
    convs = [unit.conv for unit in units]
    kernel = jnp.concatenate([conv.kernel[...] for conv in convs], axis=3)
    dtype = convs[0].dtype or jnp.promote_types(x.dtype, kernel.dtype)
    y = lowering.conv_general_dilated(
        x.astype(dtype),
        kernel.astype(dtype),
        (1, 1),
        ((0, 0), (0, 0)),
        dimension_numbers=lowering.LAYOUT,
    )
    biases = [conv.bias[...] for conv in convs if conv.bias is not None]
    if biases:
        bias = jnp.concatenate(biases).astype(dtype)
        y += bias.reshape(1, 1, 1, -1)
    ends = np.cumsum([conv.out_features for conv in convs])[:-1]
    parts = jnp.split(y, ends, axis=3)
    return [unit.activate(part) for unit, part in zip(units, parts, strict=True)]


class Inception(nnx.Module):
    """One inception block, named as in the paper: "3a" to "5b"."""

    def __init__(
        self,
        block: str,
        in_channels: int,
        *,
        form: GoogLeNetForm,
        rngs: nnx.Rngs,
    ):
        unit = partial(ConvUnit, form=form, rngs=rngs)
        one, three_reduce, three, five_reduce, five, pool = (
            scaled(c, form.width) for c in _INCEPTION_CHANNELS[block]
        )
        self.one = unit(in_channels, one, 1)
        self.three_reduce = unit(in_channels, three_reduce, 1)
        self.three = unit(three_reduce, three, 3)
        self.five_reduce = unit(in_channels, five_reduce, 1)
        self.five = unit(five_reduce, five, form.third_kernel)
        self.pool = unit(in_channels, pool, 1)
        self.rematerialize = form.rematerialize

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[B, h, w, C]` to `[B, h, w, block_channels]`."""
        run = Inception._run
        return (nnx.remat(run) if self.rematerialize else run)(self, x)

    def _run(self, x: jax.Array) -> jax.Array:
        pooled = lowering.max_pool(x, 3, 1, ((1, 1), (1, 1)))
        reading_x = (self.one, self.three_reduce, self.five_reduce)
        one, three, five = _pointwise_together(reading_x, x)
        branches = one, self.three(three), self.five(five), self.pool(pooled)
        return jnp.concatenate(branches, axis=-1)


class Section(nnx.Module):
    """Some stages in a row. Layers are `conv1`, `conv2`, `inception_3a`, ..."""

    def __init__(self, stages: tuple[str, ...], *, form: GoogLeNetForm, rngs: nnx.Rngs):
        self.stages = stages
        self.local_norm = not form.batch_norm
        self.pool4_window = form.pool4_window
        unit = partial(ConvUnit, form=form, rngs=rngs)
        narrow, wide = form.channels("conv1"), form.channels("conv2")
        for stage in stages:
            if stage == "conv1":
                self.conv1 = unit(3, narrow, 7, 2)
            elif stage == "conv2":
                self.conv2_reduce = unit(narrow, narrow, 1)
                self.conv2 = unit(narrow, wide, 3)
            elif stage in _INCEPTION_CHANNELS:
                channels = form.channels(form.stages[form.stages.index(stage) - 1])
                block = Inception(stage, channels, form=form, rngs=rngs)
                setattr(self, f"inception_{stage}", block)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images `[B, H, W, 3]` or maps `[B, h, w, C]` to maps or features."""
        for stage in self.stages:
            x = self._run(stage, x)
        return x

    def _run(self, stage: str, x: jax.Array) -> jax.Array:
        if stage == "conv1":
            x = _halve(self.conv1(x))
            return local_response_norm(x) if self.local_norm else x
        if stage == "conv2":
            x = self.conv2(self.conv2_reduce(x))
            return local_response_norm(x) if self.local_norm else x
        if stage in _POOLS:
            return _halve(x, self.pool4_window if stage == "pool4" else 3)
        if stage == "average":
            return at_least_float32(x).mean(axis=(1, 2))
        return getattr(self, f"inception_{stage}")(x)


class GoogLeNet(nnx.Module):
    """The trunk: `trunk.global_features(trunk.spatial(images))` is `[B, 1024]`.

    Cut at the paper's branching point: `spatial` maps images `[B, H, W, 3]` to maps
    `[B, H/16, W/16, 480]`.
    """

    def __init__(
        self,
        form: str | GoogLeNetForm = "googlenet",
        *,
        width: float = 1.0,
        rngs: nnx.Rngs,
    ):
        """Makes a trunk with random weights.

        Args:
          form: "googlenet" (BVLC's), "googlenet_bn" (torchvision's), or one of these
            with other options.
          width: factor on every number of channels; 1 is the published network.
          rngs: source of the initial weights (He; pretrained weights replace them).
        """
        if isinstance(form, str):
            named = {known.name: known for known in (BVLC, TORCHVISION)}
            form = dataclasses.replace(named[form], width=width)
        self.variant = form.name
        self.preprocessing = form.preprocessing
        stages_of_s, stages_of_g = form.split()
        self.spatial = form.section(stages_of_s, rngs=rngs)
        self.global_features = form.section(stages_of_g, rngs=rngs)


def local_response_norm(
    x: jax.Array, *, size: int = 5, alpha: float = 1e-4
) -> jax.Array:
    """Divides by `(1 + alpha / size * sum of squares over size channels) ** 0.75`.

    The sum is centred on each channel of `[..., C]`; BVLC's GoogLeNet uses the
    defaults (Krizhevsky et al., 2012, section 3.3).
    """
    wide = at_least_float32(x)
    total = lowering.sum_of_neighbours(jnp.square(wide), size)
    scale = 1 + alpha / size * total
    # The power by square roots: a fifth of the time of a logarithm and an exponential.
    return (wide * jax.lax.rsqrt(scale * jnp.sqrt(scale))).astype(x.dtype)


def _halve(maps: jax.Array, window: int = 3) -> jax.Array:
    """Max pooling with stride 2 that rounds up, as Caffe does."""
    _, height, width, _ = maps.shape
    pads = (
        lowering.ceil_pads(height, window, 2),
        lowering.ceil_pads(width, window, 2),
    )
    return lowering.max_pool(maps, window, 2, pads)
