"""GoogLeNet (Inception v1), cut where ABE needs it.

`spatial` is the paper's S: conv1 to inception 3b and pool3. `global_features` is the
part of G that has published weights: inception 4a to 5b and average pooling. The
classifiers are left out.

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
from jax.typing import DTypeLike

from abe_jax.models import initializers
from abe_jax.models.batch_norm import BatchNorm
from abe_jax.models.cpu import lowering
from abe_jax.precision import at_least_float32, working_dtype

DATA_AXIS = "data"

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
class Variant:
    """One published form of GoogLeNet, and how it is computed.

    Attributes:
      name: of the published form.
      batch_norm: batch norm behind every convolution (then without bias), or biases
        and local response normalisation in the stem.
      third_kernel: kernel of the third branch of an inception block.
      pool4_window: window of pool4.
      preprocessing: the input it was trained on.
      freeze_batch_norm: batch norm uses its running averages in training too.
      dtype: of convolutions and maps; None for that of the weights. Statistics, local
        response normalisation and the final average are float32 at least.
      rematerialize: backward, an inception block is computed again from its input,
        so that only blocks' inputs are kept.
    """

    name: str
    batch_norm: bool
    third_kernel: int
    pool4_window: int
    preprocessing: Preprocessing
    freeze_batch_norm: bool = False
    dtype: DTypeLike | None = None
    rematerialize: bool = False


_PUBLISHED = (
    # BVLC's Caffe model, on which the paper builds.
    Variant(
        "googlenet",
        batch_norm=False,
        third_kernel=5,
        pool4_window=3,
        preprocessing=Preprocessing((104.0, 117.0, 123.0), 1.0, True),
    ),
    # torchvision's, itself TensorFlow's Inception v1.
    Variant(
        "googlenet_bn",
        batch_norm=True,
        third_kernel=3,
        pool4_window=2,
        preprocessing=Preprocessing((127.5, 127.5, 127.5), 127.5, False),
    ),
)
VARIANTS = {variant.name: variant for variant in _PUBLISHED}


def variant_of(trunk: str | Variant) -> Variant:
    """The variant itself, or the published one of that name."""
    return VARIANTS[trunk] if isinstance(trunk, str) else trunk


def scaled(channels: int, width: float) -> int:
    """Number of channels at a width factor; at least one."""
    return max(1, round(channels * width))


def block_channels(block: str, width: float) -> int:
    """Number of channels that an inception block puts out at a width factor."""
    one, _, three, _, five, pool = _INCEPTION_CHANNELS[block]
    return sum(scaled(c, width) for c in (one, three, five, pool))


class ConvUnit(nnx.Module):
    """Convolution, batch norm where the variant has it, ReLU."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        kernel: int,
        stride: int = 1,
        *,
        variant: Variant,
        rngs: nnx.Rngs,
    ):
        pad = kernel // 2
        self.conv = nnx.Conv(
            in_channels,
            channels,
            (kernel, kernel),
            stride,
            padding=((pad, pad), (pad, pad)),
            use_bias=not variant.batch_norm,
            kernel_init=(
                initializers.small_uniform
                if variant.batch_norm
                else initializers.he_normal
            ),
            bias_init=initializers.zeros,
            conv_general_dilated=lowering.conv_general_dilated,
            dtype=variant.dtype,
            rngs=rngs,
        )
        self.norm = (
            BatchNorm(
                channels,
                axis_name=DATA_AXIS,
                frozen=variant.freeze_batch_norm,
                rngs=rngs,
            )
            if variant.batch_norm
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
        width: float,
        variant: Variant,
        rngs: nnx.Rngs,
    ):
        unit = partial(ConvUnit, variant=variant, rngs=rngs)
        one, three_reduce, three, five_reduce, five, pool = (
            scaled(c, width) for c in _INCEPTION_CHANNELS[block]
        )
        self.one = unit(in_channels, one, 1)
        self.three_reduce = unit(in_channels, three_reduce, 1)
        self.three = unit(three_reduce, three, 3)
        self.five_reduce = unit(in_channels, five_reduce, 1)
        self.five = unit(five_reduce, five, variant.third_kernel)
        self.pool = unit(in_channels, pool, 1)
        self.rematerialize = variant.rematerialize

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


class Inception4(nnx.Module):
    """Inception 4a to 4e: once inside G, once more as the attention's common part."""

    def __init__(self, *, width: float, variant: Variant, rngs: nnx.Rngs):
        block = partial(Inception, width=width, variant=variant, rngs=rngs)
        self.a = block("4a", block_channels("3b", width))
        self.b = block("4b", block_channels("4a", width))
        self.c = block("4c", block_channels("4b", width))
        self.d = block("4d", block_channels("4c", width))
        self.e = block("4e", block_channels("4d", width))

    def __call__(self, maps: jax.Array) -> jax.Array:
        """Maps `[B, h, w, 480]` to `[B, h, w, 832]` (at width 1)."""
        return self.e(self.d(self.c(self.b(self.a(maps)))))


class SpatialTrunk(nnx.Module):
    """The paper's S: conv1 to inception 3b and pool3."""

    def __init__(self, *, width: float, variant: Variant, rngs: nnx.Rngs):
        unit = partial(ConvUnit, variant=variant, rngs=rngs)
        block = partial(Inception, width=width, variant=variant, rngs=rngs)
        narrow, wide = scaled(64, width), scaled(192, width)
        self.local_norm = not variant.batch_norm
        self.conv1 = unit(3, narrow, 7, 2)
        self.conv2_reduce = unit(narrow, narrow, 1)
        self.conv2 = unit(narrow, wide, 3)
        self.inception_3a = block("3a", wide)
        self.inception_3b = block("3b", block_channels("3a", width))

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images `[B, H, W, 3]` to maps `[B, H/16, W/16, 480]` (at width 1)."""
        x = _halve(self.conv1(images))
        if self.local_norm:
            x = local_response_norm(x)
        x = self.conv2(self.conv2_reduce(x))
        if self.local_norm:
            x = local_response_norm(x)
        return _halve(self.inception_3b(self.inception_3a(_halve(x))))


class GlobalTrunk(nnx.Module):
    """The paper's G up to its last layer: inception 4a to 5b and average pooling."""

    def __init__(self, *, width: float, variant: Variant, rngs: nnx.Rngs):
        block = partial(Inception, width=width, variant=variant, rngs=rngs)
        self.pool4_window = variant.pool4_window
        self.inception_4 = Inception4(width=width, variant=variant, rngs=rngs)
        self.inception_5a = block("5a", block_channels("4e", width))
        self.inception_5b = block("5b", block_channels("5a", width))

    def __call__(self, maps: jax.Array) -> jax.Array:
        """Maps `[B, h, w, 480]` to features `[B, 1024]` (at width 1)."""
        x = _halve(self.inception_4(maps), self.pool4_window)
        x = self.inception_5b(self.inception_5a(x))
        return at_least_float32(x).mean(axis=(1, 2))


class GoogLeNet(nnx.Module):
    """The trunk: `trunk.global_features(trunk.spatial(images))` is `[B, 1024]`."""

    def __init__(
        self,
        variant: str | Variant = "googlenet",
        *,
        width: float = 1.0,
        rngs: nnx.Rngs,
    ):
        """Makes a trunk with random weights.

        Args:
          variant: a key of `VARIANTS`, or what it stands for with other options.
          width: factor on every number of channels; 1 is the published network.
          rngs: source of the initial weights (He; pretrained weights replace them).
        """
        form = variant_of(variant)
        self.variant = form.name
        self.preprocessing = form.preprocessing
        self.spatial = SpatialTrunk(width=width, variant=form, rngs=rngs)
        self.global_features = GlobalTrunk(width=width, variant=form, rngs=rngs)


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
