"""Convolution and pooling, lowered to what each platform runs fastest.

XLA's CPU backend is slow at parts of what GoogLeNet is made of: 1 x 1 convolutions,
convolutions of small maps, the weights' gradient of all others, the gradient of
`reduce_window`, and bfloat16. On the CPU these become matrix products, of patches
that stay in the cache, and element-wise maxima, and wide 3 x 3 convolutions are left
to `winograd`. XLA's GPU backend writes 20 bytes for each maximum of a pooling, and adds
its gradient up by atomic operations: there a maximum's place is kept in one byte. On
accelerators ReLU's gradient is computed from its output. All else is the native
operation. Values and gradients are those of the plain operations.
"""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from abe_jax.models.lowering import parts, pooling, winograd
from abe_jax.models.lowering.parts import Pads
from abe_jax.precision import at_least_float32

# Forward, maps of up to so many positions are multiplied as patches: at 14 x 14 that is
# up to 1.9 times as fast as the native convolution (AVX2), at 28 x 28 it is not.
_SMALL_MAP = 16 * 16

LAYOUT = ("NHWC", "HWIO", "NHWC")

# The platform that is traced for: JAX's default one, if None.
_PLATFORM: contextvars.ContextVar[str | None] = contextvars.ContextVar(
    "platform", default=None
)


@contextlib.contextmanager
def operations_of(platform: str) -> Iterator[None]:
    """Within, tracing takes what a platform runs fastest, wherever it is traced.

    Args:
      platform: "cpu", "gpu" or "tpu", as JAX calls it.
    """
    token = _PLATFORM.set(platform)
    try:
        yield
    finally:
        _PLATFORM.reset(token)


def plain_operations() -> contextlib.AbstractContextManager[None]:
    """Within, tracing takes the plain operations on every platform.

    For exported programs, as the lowerings need a batch of a known size, and the
    programs that read an export know few operations.
    """
    return operations_of("any")


def _by_platform(
    *operands: jax.Array,
    default: Callable[..., jax.Array],
    **by_platform: Callable[..., jax.Array],
) -> jax.Array:
    # Not `platform_dependent`, which traces all, and keeps all's values for backward.
    platform = _PLATFORM.get() or jax.default_backend()
    return by_platform.get(platform, default)(*operands)


def conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: Any,
    **options: Any,
) -> jax.Array:
    """Stands in for `jax.lax.conv_general_dilated` in `nnx.Conv`.

    Args:
      lhs: maps `[B, H, W, C]`.
      rhs: kernel `[kh, kw, C, D]`.
      window_strides: two strides.
      padding: `((top, bottom), (left, right))` for the CPU's own lowerings; strings
        are passed on to the native convolution.
      **options: of the native convolution, which takes all with group counts or
        dilations other than 1.

    Returns:
      maps `[B, H', W', D]`, in the dtype of `lhs`.
    """

    def native(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x, kernel, window_strides, padding, **options
        )

    if not _is_plain(padding, options):
        return native(lhs, rhs)
    strides = (window_strides[0], window_strides[1])
    on_cpu = partial(_convolution, strides, padding)
    if strides != (1, 1) and rhs.shape[:2] == (1, 1) and not np.any(padding):
        on_cpu = partial(_thinned, strides, padding)
    elif strides == (1, 1) and math.prod(lhs.shape[1:3]) <= math.prod(rhs.shape[:2]):
        on_cpu = partial(_as_dense_layer, padding)
    elif strides == (1, 1) and winograd.is_faster(lhs.shape, rhs.shape, padding):
        on_cpu = partial(winograd.convolution, padding)

    def widened(x: jax.Array, kernel: jax.Array) -> jax.Array:
        # Few CPUs multiply bfloat16; its values are multiplied in float32.
        y = on_cpu(at_least_float32(x), at_least_float32(kernel))
        return y.astype(x.dtype)

    return _by_platform(lhs, rhs, cpu=widened, default=native)


def convolution_by_group(maps: jax.Array, kernel: jax.Array) -> jax.Array:
    """A 1 x 1 convolution to groups of channels, each contiguous in memory.

    Accelerators write this layout directly; CPUs transpose their output.

    Args:
      maps: `[B, h, w, C]`, floating point.
      kernel: `[C, groups, D]`, of the same dtype.

    Returns:
      `[groups, B, h, w, D]`.
    """

    def transposed(x: jax.Array, kernel: jax.Array) -> jax.Array:
        flat = kernel.reshape(1, 1, x.shape[3], -1)
        y = conv_general_dilated(
            x, flat, (1, 1), ((0, 0), (0, 0)), dimension_numbers=LAYOUT
        )
        return jnp.moveaxis(y.reshape(*y.shape[:3], *kernel.shape[1:]), 3, 0)

    product = partial(jnp.einsum, "bhwi,imc->mbhwc")
    return _by_platform(maps, kernel, cpu=transposed, default=product)


def max_pool(
    maps: jax.Array, window: int, stride: int, pads: Pads = ((0, 0), (0, 0))
) -> jax.Array:
    """Maximum over square windows; padding never wins.

    Of equal maxima the first in reading order takes the gradient, on every platform.

    Args:
      maps: `[B, H, W, C]`, floating point.
      window: side of the window.
      stride: step of the window.
      pads: `((top, bottom), (left, right))`; negative values are not allowed.

    Returns:
      `[B, H', W', C]`, with `H' = (H + top + bottom - window) // stride + 1`.
    """

    def widened(x: jax.Array) -> jax.Array:
        y: Any = pooling.max_pool(window, stride, pads, at_least_float32(x))
        return y.astype(x.dtype)

    native, by_place = (
        partial(pool, window, stride, pads)
        for pool in (pooling.native, pooling.max_pool_by_place)
    )
    return _by_platform(maps, cpu=widened, gpu=by_place, default=native)


def relu(x: jax.Array) -> jax.Array:
    """max(x, 0). Accelerators need not keep `x` for the gradient, only what is put out.

    CPUs are no faster so.
    """
    return _by_platform(x, cpu=jax.nn.relu, default=_relu_by_output)


@jax.custom_jvp
def _relu_by_output(x: jax.Array) -> jax.Array:
    return jax.nn.relu(x)


@_relu_by_output.defjvp
def _relu_by_output_jvp(
    primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    y = _relu_by_output(*primals)
    # Without a barrier XLA compares x with 0, and keeps that too.
    return y, jnp.where(jax.lax.optimization_barrier(y) > 0, *tangents, 0)


def computed_once(x: jax.Array) -> jax.Array:
    """`x`, which XLA on a CPU is kept from recomputing for each of its readers.

    For residual sums: XLA would fuse the sums of all earlier blocks into every reader.
    Holds in programs of `parallel.map_over_devices`, except those of "pmap".

    Args:
      x: any array.

    Returns:
      the same values.
    """
    return _by_platform(x, cpu=jax.lax.optimization_barrier, default=lambda x: x)


def ceil_pads(size: int, window: int, stride: int) -> tuple[int, int]:
    """Padding on the far side that makes a pooling round its output size up."""
    outputs = max(0, -(-(size - window) // stride)) + 1
    return 0, max(0, (outputs - 1) * stride + window - size)


def _is_plain(padding: Any, options: dict[str, Any]) -> bool:
    dilations = (*(options.get("lhs_dilation") or ()),)
    dilations += (*(options.get("rhs_dilation") or ()),)
    return (
        not isinstance(padding, str)
        and set(dilations) <= {1}
        and options.get("feature_group_count", 1) == 1
        and options.get("batch_group_count", 1) == 1
    )


def _thinned(strides: Any, pads: Pads, x: jax.Array, w: jax.Array) -> jax.Array:
    """A 1 x 1 convolution of what its strides leave: a faster gradient (1.6 times)."""
    return _convolution((1, 1), pads, x[:, :: strides[0], :: strides[1]], w)


def _as_dense_layer(pads: Pads, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """One matrix from all positions to all positions, for maps as small as a kernel.

    It takes fewer multiplications than patches do, which are padding for the most part,
    and copies nothing but the kernel.
    """
    (top, bottom), (left, right) = pads
    batch, height, width, channels = x.shape
    rows = height + top + bottom - kernel.shape[0] + 1
    columns = width + left + right - kernel.shape[1] + 1
    room = ((height, height), (width, width), (0, 0), (0, 0))
    wide = jnp.pad(kernel, room)

    def from_all_inputs(i: int, j: int) -> jax.Array:
        """Weights from each input to the output at (i, j)."""
        row, column = height + top - i, width + left - j
        return wide[row : row + height, column : column + width]

    positions = [(i, j) for i in range(rows) for j in range(columns)]
    matrix = jnp.stack([from_all_inputs(i, j) for i, j in positions], axis=3)
    matrix = matrix.reshape(height * width * channels, -1)
    y = jnp.matmul(x.reshape(batch, -1), matrix)
    return y.reshape(batch, rows, columns, -1)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _convolution(
    strides: tuple[int, int], pads: Pads, x: jax.Array, kernel: jax.Array
) -> jax.Array:
    """Patches times matrix, some images at a time; large maps are native forward."""
    if kernel.shape[:2] != (1, 1) and math.prod(x.shape[1:3]) > _SMALL_MAP:
        return _native_convolution(strides, pads, x, kernel)
    matrix = kernel.reshape(-1, kernel.shape[3])

    def some(images: jax.Array) -> jax.Array:
        return jnp.matmul(_patches(images, kernel.shape, strides, pads), matrix)

    return parts.join(jax.lax.map(some, _split(x, kernel.shape, strides)))


def _native_convolution(
    strides: tuple[int, int], pads: Pads, x: jax.Array, kernel: jax.Array
) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x, kernel, strides, pads, dimension_numbers=LAYOUT
    )


def _convolution_forward(
    strides: tuple[int, int], pads: Pads, x: jax.Array, kernel: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _convolution(strides, pads, x, kernel), (x, kernel)


def _convolution_backward(
    strides: tuple[int, int],
    pads: Pads,
    saved: tuple[jax.Array, jax.Array],
    cotangent: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    images = _split(x, kernel.shape, strides)
    cotangents = parts.split_alike(cotangent, images)
    features = kernel.shape[3]

    def add_part(
        total: jax.Array, part: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, None]:
        images, cotangent = part
        patches = _patches(images, kernel.shape, strides, pads)
        patches = patches.reshape(-1, total.shape[0])
        flat = cotangent.reshape(-1, features)
        return total + at_least_float32(jnp.matmul(patches.T, flat)), None

    zeros = at_least_float32(jnp.zeros_like(kernel.reshape(-1, features)))
    total, _ = jax.lax.scan(add_part, zeros, (images, cotangents))
    back = partial(_back_to_maps, x.shape, strides, pads, kernel)
    return (
        parts.join(jax.lax.map(back, cotangents)),
        total.astype(kernel.dtype).reshape(kernel.shape),
    )


def _back_to_maps(
    maps: tuple[int, ...],
    strides: tuple[int, int],
    pads: Pads,
    kernel: jax.Array,
    cotangent: jax.Array,
) -> jax.Array:
    """Cotangents `[b, H', W', D]` of a convolution to those of its `maps`."""
    height, width, channels, features = kernel.shape
    rows, columns = cotangent.shape[1:3]
    matrix = kernel.reshape(-1, features)
    by_offset = jnp.matmul(cotangent.reshape(-1, features), matrix.T)
    by_offset = by_offset.reshape(-1, rows, columns, height, width, channels)
    (top, bottom), (left, right) = pads
    down, over = strides
    # An offset adds to positions `strides` apart: to neighbours, once each axis of the
    # maps is split into (steps, phases).
    tall = -(-(maps[1] + top + bottom) // down)
    wide = -(-(maps[2] + left + right) // over)
    shape = (len(cotangent), tall, wide, channels)
    phases = [[jnp.zeros(shape, kernel.dtype)] * over for _ in range(down)]
    for i in range(height):
        for j in range(width):
            above, before = i // down, j // over
            room = (above, tall - rows - above), (before, wide - columns - before)
            add = jnp.pad(by_offset[:, :, :, i, j], ((0, 0), *room, (0, 0)))
            phases[i % down][j % over] += add
    by_row = [jnp.stack(phase, axis=3) for phase in phases]
    back = jnp.stack(by_row, axis=2)
    back = back.reshape(len(cotangent), tall * down, wide * over, channels)
    return back[:, top : top + maps[1], left : left + maps[2]]


_convolution.defvjp(_convolution_forward, _convolution_backward)


def _patches(
    x: jax.Array, kernel: tuple[int, ...], strides: tuple[int, int], pads: Pads
) -> jax.Array:
    """Maps `[B, H, W, C]` to `[B, H', W', kh * kw * C]`."""
    height, width = kernel[:2]
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    down, right = strides
    rows, columns = x.shape[1] - height, x.shape[2] - width
    offsets = [(i, j) for i in range(height) for j in range(width)]
    shifted = [
        x[:, i : i + rows + 1 : down, j : j + columns + 1 : right] for i, j in offsets
    ]
    return jnp.concatenate(shifted, axis=-1)


def _split(
    x: jax.Array, kernel: tuple[int, ...], strides: tuple[int, int]
) -> jax.Array:
    """Maps in parts whose patches stay in the cache."""
    values = math.prod(x.shape[1:]) * math.prod(kernel[:2]) // math.prod(strides)
    return parts.split(x, values, parts.CACHED_VALUES)
