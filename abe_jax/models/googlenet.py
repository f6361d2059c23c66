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
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from abe_jax.errors import require_known
from abe_jax.models import googlenet_weights, initializers, lowering
from abe_jax.models.batch_norm import BatchNorm
from abe_jax.models.convolution import convolution
from abe_jax.models.trunk import KEPT, Preprocessing, Trunk
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


# Scope of sums over channels, which are no multiply-adds of the published network.
NEIGHBOURS = "sum_of_neighbours"
# Blocks whose convolutions are `KEPT`: the last ones, of many channels on small maps.
_KEEPING = ("4e", "5a", "5b")
# Stages that halve the maps.
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
            one, _, three, _, five, pool = _INCEPTION_CHANNELS[blocks[-1]]
            return sum(map(self.scaled, (one, three, five, pool)))
        return self.scaled(64 if stage == "conv1" else 192)

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
            BatchNorm(channels, frozen=form.freeze_batch_norm, rngs=rngs)
            if form.batch_norm
            else None
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        return _activated([self], [_products([self], x)])


def _products(units: Sequence[ConvUnit], x: jax.Array) -> jax.Array:
    """Convolutions of the same maps side by side, without what follows them.

    Those of several units, with kernels of one size, are one operation forward and
    backward, so that the maps are read once.
    """
    first, kernels = units[0].conv, [unit.conv.kernel[...] for unit in units]
    kernel = jnp.concatenate(kernels, axis=3)
    dtype = first.dtype or jnp.promote_types(x.dtype, kernel.dtype)
    assert isinstance(first.strides, tuple)  # for type checkers
    return lowering.conv_general_dilated(
        x.astype(dtype),
        kernel.astype(dtype),
        first.strides,
        first.padding,
        dimension_numbers=lowering.LAYOUT,
    )


def _activated(units: Sequence[ConvUnit], products: Sequence[jax.Array]) -> jax.Array:
    """Convolutions side by side; batch norms or biases and ReLU of all at once.

    Backward, the cotangent of what all units put out is masked and summed in one pass.
    """
    norms = [unit.norm for unit in units if unit.norm is not None]
    if norms:
        products = [norm(x) for norm, x in zip(norms, products, strict=True)]
    x = jnp.concatenate(products, axis=3)
    biases = [unit.conv.bias[...] for unit in units if unit.conv.bias is not None]
    if biases:
        x += jnp.concatenate(biases).astype(x.dtype).reshape(1, 1, 1, -1)
    return lowering.relu(x)


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
            form.scaled(c) for c in _INCEPTION_CHANNELS[block]
        )
        self.one = unit(in_channels, one, 1)
        self.three_reduce = unit(in_channels, three_reduce, 1)
        self.three = unit(three_reduce, three, 3)
        self.five_reduce = unit(in_channels, five_reduce, 1)
        self.five = unit(five_reduce, five, form.third_kernel)
        self.pool = unit(in_channels, pool, 1)
        self.rematerialize = form.rematerialize
        self.keeps = block in _KEEPING

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[B, h, w, C]` to those of its four branches side by side."""
        run = Inception._run
        return (nnx.remat(run) if self.rematerialize else run)(self, x)

    def _run(self, x: jax.Array) -> jax.Array:
        reduce = self.three_reduce, self.five_reduce
        sizes = [unit.conv.out_features for unit in (self.one, *reduce)]
        one, three, five = jnp.split(
            self._named([self.one, *reduce], x), np.cumsum(sizes)[:-1], axis=3
        )
        products = (
            one,
            self._named([self.three], _activated(reduce[:1], [three])),
            self._named([self.five], _activated(reduce[1:], [five])),
            self._named([self.pool], lowering.max_pool(x, 3, 1, ((1, 1), (1, 1)))),
        )
        return _activated((self.one, self.three, self.five, self.pool), products)

    def _named(self, units: Sequence[ConvUnit], x: jax.Array) -> jax.Array:
        products = _products(units, x)
        return checkpoint_name(products, KEPT) if self.keeps else products


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
        width: float | None = None,
        rngs: nnx.Rngs,
    ):
        """Makes a trunk with random weights.

        Args:
          form: "googlenet" (BVLC's), "googlenet_bn" (torchvision's), or one of these
            with other options.
          width: factor on every number of channels; by default the form's, 1 being
            the published network.
          rngs: source of the initial weights (He; pretrained weights replace them).

        Raises:
          UserError: there is no such form.
        """
        if isinstance(form, str):
            named = {known.name: known for known in (BVLC, TORCHVISION)}
            require_known("form", form, named)
            form = named[form]
        if width is not None:
            form = dataclasses.replace(form, width=width)
        self.variant = form.name
        self.preprocessing = form.preprocessing
        stages_of_s, stages_of_g = form.split()
        self.spatial = form.section(stages_of_s, rngs=rngs)
        self.global_features = form.section(stages_of_g, rngs=rngs)


# Of BVLC's GoogLeNet: channels that are summed, and the factor on their mean square.
_NEAR, _ALPHA = 5, 1e-4


@jax.custom_vjp
def local_response_norm(x: jax.Array) -> jax.Array:
    """Divides by `(1 + 1e-4 / 5 * sum of squares over 5 channels) ** 0.75`.

    The sum is centred on each channel of `[..., C]` (Krizhevsky et al., 2012, section
    3.3; the numbers are those of BVLC's GoogLeNet). Backward only `x` is kept.
    """
    wide, _, power = _response(x)
    return (wide * power).astype(x.dtype)


def _response(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The maps, the base of the power that divides them, and one over that power."""
    wide = at_least_float32(x)
    scale = 1 + _ALPHA / _NEAR * _sum_of_neighbours(jnp.square(wide), x.dtype)
    # The power by square roots: a fifth of the time of a logarithm and an exponential.
    return wide, scale, jax.lax.rsqrt(scale * jnp.sqrt(scale))


def _response_backward(x: jax.Array, cotangent: jax.Array) -> tuple[jax.Array]:
    wide, scale, power = _response(x)
    by_power = at_least_float32(cotangent) * power
    sums = _sum_of_neighbours(by_power * wide / scale, x.dtype)
    return ((by_power - 1.5 * _ALPHA / _NEAR * wide * sums).astype(x.dtype),)


local_response_norm.defvjp(lambda x: (local_response_norm(x), x), _response_backward)


def _sum_of_neighbours(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Sums over the neighbouring channels of `[..., C]`, centred on each.

    As a product with a band matrix, which every platform does faster than shifts. Its
    factors are rounded to `dtype`, that of the maps; the sums are float32 at least.
    """
    channels = np.arange(x.shape[-1])
    band = np.abs(channels[:, None] - channels[None, :]) <= _NEAR // 2
    with jax.named_scope(NEIGHBOURS):
        return jnp.tensordot(
            x.astype(dtype),
            jnp.asarray(band, dtype),
            axes=1,
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=x.dtype,
        )


def _halve(maps: jax.Array, window: int = 3) -> jax.Array:
    """Max pooling with stride 2 that rounds up, as Caffe does."""
    _, height, width, _ = maps.shape
    pads = (
        lowering.ceil_pads(height, window, 2),
        lowering.ceil_pads(width, window, 2),
    )
    return lowering.max_pool(maps, window, 2, pads)
