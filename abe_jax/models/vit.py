"""Vision transformers, cut where ABE needs it; an extension of ours, not the paper's.

S is the patch embedding and the first half of the blocks. The attention branch is a
copy of the next blocks, and its masks are of the patches' tokens: class and register
tokens pass to every learner as they are. G has the remaining blocks, the final norm,
and the class token as features, which is what timm pools by default in these models.
Where no block is left to G, no mask reaches the class token: then the features are the
average of the patches' tokens, for frozen trunks of which only heads are trained.

Sources: Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, section 3.1;
Oquab et al., "DINOv2", 2023; Darcet et al., "Vision Transformers Need Registers", 2023;
timm's `vision_transformer.py` for names and details.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from abe_jax.models import initializers, lowering, vit_weights
from abe_jax.models.trunk import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Preprocessing,
    Tokens,
    Trunk,
)
from abe_jax.precision import at_least_float32

_DEPTH = 12


@dataclasses.dataclass(frozen=True)
class ViTForm(Trunk):
    """One published form of twelve blocks, and how it is computed.

    Attributes:
      patch_size: side of a patch, pixels.
      grid: patches along a side of the images that it was trained on, to which the
        position embeddings belong; for others they are interpolated.
      num_heads: of attention, each of 64 channels; `width` scales these.
      num_registers: tokens beside the class token.
      positions_of_others: how many of the other tokens have position embeddings.
      layer_scale: learnt factors on what a block adds.
    """

    patch_size: int = 16
    grid: int = 14
    num_heads: int = 6
    num_registers: int = 0
    positions_of_others: int = 1
    layer_scale: bool = False

    @property
    def has_batch_norm(self) -> bool:
        """Only layer norm."""
        return False

    @property
    def stages(self) -> tuple[str, ...]:
        """Patch embedding, blocks from 1, and the final norm with the class token."""
        return ("embedding", *_BLOCKS, "norm")

    @property
    def branches(self) -> tuple[str, ...]:
        """block6, half of the depth (ours); or any other."""
        return ("block6", *(b for b in _BLOCKS if b != "block6"))

    def attention_stages(self, branch: str) -> tuple[str, ...]:
        """The blocks that follow: all have the same tokens."""
        return _BLOCKS[_BLOCKS.index(branch) + 1 :]

    @property
    def default_attention_blocks(self) -> int:
        """Two (ours)."""
        return 2

    def channels(self, stage: str) -> int:
        """The same for every stage: of all heads."""
        return self.num_heads * self.scaled(64)

    def section(self, stages: tuple[str, ...], *, rngs: nnx.Rngs) -> "Section":
        """Some stages in a row, with random weights."""
        return Section(stages, form=self, rngs=rngs)


_BLOCKS = tuple(f"block{i}" for i in range(1, _DEPTH + 1))


def _dinov2(name: str, num_heads: int) -> ViTForm:
    return ViTForm(
        name,
        Preprocessing(IMAGENET_MEAN, IMAGENET_STD, False, multiple_of=14),
        (vit_weights.naming(name, name),),
        patch_size=14,
        grid=37,
        num_heads=num_heads,
        num_registers=4 if "reg4" in name else 0,
        # With registers, timm folds the class token's position into the token.
        positions_of_others=0 if "reg4" in name else 1,
        layer_scale=True,
    )


def _patch16(size: str, num_heads: int) -> tuple[ViTForm, ViTForm]:
    """Google's, and the same network trained on ImageNet's scale: DINO, DeiT, MAE."""
    name, timm = f"vit_{size}_patch16", f"vit_{size}_patch16_224"
    google = Preprocessing((127.5, 127.5, 127.5), 127.5, False, multiple_of=16)
    imagenet = Preprocessing(IMAGENET_MEAN, IMAGENET_STD, False, multiple_of=16)
    of_google = vit_weights.naming(name, timm)
    of_dino = vit_weights.naming(name, timm, timm.replace("vit", "deit"))
    return (
        ViTForm(name, google, (of_google,), num_heads=num_heads),
        ViTForm(f"{name}_dino", imagenet, (of_dino,), num_heads=num_heads),
    )


FORMS = (
    *_patch16("small", 6),
    *_patch16("base", 12),
    _dinov2("vit_small_patch14_dinov2", 6),
    _dinov2("vit_base_patch14_dinov2", 12),
    _dinov2("vit_small_patch14_reg4_dinov2", 6),
    _dinov2("vit_base_patch14_reg4_dinov2", 12),
)


class LayerNorm(nnx.LayerNorm):
    """Layer norm over `[..., C]`, in float32 at least and rounded once."""

    def __init__(self, num_features: int, *, rngs: nnx.Rngs):
        super().__init__(num_features, epsilon=1e-6, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Normalises `[..., C]`."""
        assert self.scale is not None and self.bias is not None  # for type checkers

        def aligned(channels: jax.Array) -> jax.Array:
            return jnp.expand_dims(channels, range(x.ndim - 1))

        values = at_least_float32(x)
        # Flax's mean square minus squared mean would cancel where a token's mean is
        # large.
        values -= values.mean(axis=-1, keepdims=True)
        variance = jnp.square(values).mean(axis=-1, keepdims=True)
        y = values * jax.lax.rsqrt(variance + self.epsilon) * aligned(self.scale[...])
        return (y + aligned(self.bias[...])).astype(x.dtype)


class Embedding(nnx.Module):
    """Images to tokens: patches, a class token, registers, and where patches are."""

    def __init__(self, *, form: ViTForm, rngs: nnx.Rngs):
        channels, side = form.channels("embedding"), form.patch_size
        self.preprocessing = form.preprocessing
        self.grid = form.grid
        self.positions_of_others = form.positions_of_others
        self.projection = nnx.Conv(
            3,
            channels,
            (side, side),
            (side, side),
            padding=((0, 0), (0, 0)),
            kernel_init=initializers.glorot_uniform,
            bias_init=initializers.zeros,
            conv_general_dilated=_patch_products,
            dtype=form.dtype,
            rngs=rngs,
        )

        def token(count: int) -> nnx.Param:
            shape = (1, count, channels)
            return nnx.Param(
                initializers.small_normal(rngs.params(), shape, jnp.float32)
            )

        self.class_token = token(1)
        self.registers = token(form.num_registers) if form.num_registers else None
        self.position = token(form.positions_of_others + form.grid**2)

    def __call__(self, images: jax.Array) -> Tokens:
        """Maps images `[B, H, W, 3]` to tokens; sides are multiples of the patch's.

        Raises:
          UserError: they are not.
        """
        self.preprocessing.check_size(*images.shape[1:3])
        maps = self.projection(images)
        batch, height, width, channels = maps.shape
        position = self.position[...]
        of_others = position[:, : self.positions_of_others]
        of_patches = position[:, self.positions_of_others :]
        of_patches = of_patches.reshape(1, self.grid, self.grid, channels)
        if (height, width) != (self.grid, self.grid):
            # The antialiased bicubic filter is timm's.
            shape = (1, height, width, channels)
            of_patches = jax.image.resize(of_patches, shape, "bicubic")
        others = self.class_token[...]
        if self.positions_of_others:
            others = others + of_others
        if self.registers is not None:
            others = jnp.concatenate([others, self.registers[...]], axis=1)
        others = jnp.broadcast_to(others, (batch, *others.shape[1:]))
        return Tokens(maps + of_patches.astype(maps.dtype), others.astype(maps.dtype))


def _patch_products(
    lhs: jax.Array, rhs: jax.Array, *unused: Any, **also_unused: Any
) -> jax.Array:
    """A convolution whose stride is its kernel's side, as one matrix product."""
    batch, height, width, _ = lhs.shape
    side = rhs.shape[0]
    rows, columns = height // side, width // side
    patches = lhs.reshape(batch, rows, side, columns, side, -1)
    patches = patches.transpose(0, 1, 3, 2, 4, 5)
    patches = patches.reshape(batch, rows, columns, math.prod(rhs.shape[:3]))
    return patches @ rhs.reshape(-1, rhs.shape[3])


class Block(nnx.Module):
    """y = x + attention(norm(x)), then y + mlp(norm(y)) (equations 2 and 3)."""

    def __init__(self, *, form: ViTForm, rngs: nnx.Rngs):
        channels = form.channels("block1")

        def dense(source: int, target: int) -> nnx.Linear:
            return nnx.Linear(
                source,
                target,
                kernel_init=initializers.glorot_uniform,
                bias_init=initializers.zeros,
                dtype=form.dtype,
                rngs=rngs,
            )

        def factors() -> nnx.Param | None:
            # timm's start for DINOv2.
            start = jnp.asarray(np.full(channels, 1e-5, np.float32))
            return nnx.Param(start) if form.layer_scale else None

        self.num_heads = form.num_heads
        self.rematerialize = form.rematerialize
        self.norm1 = LayerNorm(channels, rngs=rngs)
        self.qkv = dense(channels, 3 * channels)
        self.projection = dense(channels, channels)
        self.scale1 = factors()
        self.norm2 = LayerNorm(channels, rngs=rngs)
        self.fc1 = dense(channels, 4 * channels)
        self.fc2 = dense(4 * channels, channels)
        self.scale2 = factors()

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps tokens `[B, N, C]` to tokens."""
        run = Block._run
        return (nnx.remat(run) if self.rematerialize else run)(self, x)

    def _run(self, x: jax.Array) -> jax.Array:
        x += _scaled(self._attend(self.norm1(x)), self.scale1)
        y = jax.nn.gelu(self.fc1(self.norm2(x)), approximate=False)
        return lowering.computed_once(x + _scaled(self.fc2(y), self.scale2))

    def _attend(self, x: jax.Array) -> jax.Array:
        heads = (*x.shape[:2], self.num_heads, x.shape[2] // self.num_heads)
        q, k, v = (part.reshape(heads) for part in jnp.split(self.qkv(x), 3, axis=-1))
        logits = jnp.einsum("bqhd,bkhd->bhqk", q * heads[-1] ** -0.5, k)
        weights = jax.nn.softmax(at_least_float32(logits)).astype(v.dtype)
        attended = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
        return self.projection(attended.reshape(x.shape))


def _scaled(x: jax.Array, factors: nnx.Param | None) -> jax.Array:
    return x if factors is None else x * factors[...].reshape(1, 1, -1).astype(x.dtype)


class Section(nnx.Module):
    """Some stages in a row. Layers are `embedding`, `block1` to `block12`, `norm`."""

    def __init__(self, stages: tuple[str, ...], *, form: ViTForm, rngs: nnx.Rngs):
        self.blocks = tuple(stage for stage in stages if stage in _BLOCKS)
        self.embedding = (
            Embedding(form=form, rngs=rngs) if "embedding" in stages else None
        )
        for block in self.blocks:
            setattr(self, block, Block(form=form, rngs=rngs))
        channels = form.channels("norm")
        self.norm = LayerNorm(channels, rngs=rngs) if "norm" in stages else None
        self.averages = stages == ("norm",)

    def __call__(self, x: jax.Array | Tokens) -> jax.Array | Tokens:
        """Maps images `[B, H, W, 3]` or tokens to tokens or features `[B, C]`."""
        tokens = x if isinstance(x, Tokens) else None
        if self.embedding is not None:
            assert isinstance(x, jax.Array)
            tokens = self.embedding(x)
        assert tokens is not None
        batch, height, width, channels = tokens.maps.shape
        patches = tokens.maps.reshape(batch, height * width, channels)
        # In timm's order; attention itself knows none.
        sequence = jnp.concatenate([tokens.others, patches], axis=1)
        for block in self.blocks:
            sequence = getattr(self, block)(sequence)
        if self.norm is not None and self.averages:
            return self.norm(at_least_float32(patches)).mean(axis=1)
        if self.norm is not None:
            return self.norm(at_least_float32(sequence[:, 0]))
        others, patches = jnp.split(sequence, [tokens.others.shape[1]], axis=1)
        return Tokens(patches.reshape(tokens.maps.shape), others)
