"""Convolution and pooling, lowered to what each platform runs fastest.

XLA's CPU backend is slow at three things that GoogLeNet is made of: 1 x 1
convolutions, convolutions of small maps, and the gradient of `reduce_window`. Here
they become matrix products and element-wise maxima on the CPU; every other platform
gets the native operation. Values and gradients are those of the plain operations.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

# Measured: below this many positions per map, patches times matrix beats XLA's CPU
# convolution; above it, gathering the patches costs more than it saves.
_SMALL_MAP = 16

Pads = tuple[tuple[int, int], tuple[int, int]]


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
      **options: passed on; group counts and dilations other than 1 are always native.

    Returns:
      maps `[B, H', W', D]`, in the promoted dtype of the inputs.
    """

    def native(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x, kernel, window_strides, padding, **options
        )

    if not _is_plain(window_strides, padding, options):
        return native(lhs, rhs)
    if rhs.shape[:2] == (1, 1):
        return jax.lax.platform_dependent(lhs, rhs, cpu=_pointwise, default=native)
    if lhs.shape[1] * lhs.shape[2] <= _SMALL_MAP:

        def patches(x: jax.Array, kernel: jax.Array) -> jax.Array:
            return _patches_times_matrix(x, kernel, padding)

        return jax.lax.platform_dependent(lhs, rhs, cpu=patches, default=native)
    return native(lhs, rhs)


def max_pool(
    maps: jax.Array, window: int, stride: int, pads: Pads = ((0, 0), (0, 0))
) -> jax.Array:
    """Maximum over square windows; padding never wins.

    On the CPU equal maxima of a window share its gradient; the native operation gives
    it all to the first. Behind a ReLU equal maxima are zeros, which pass no gradient.

    Args:
      maps: `[B, H, W, C]`, floating point.
      window: side of the window.
      stride: step of the window.
      pads: `((top, bottom), (left, right))`; negative values are not allowed.

    Returns:
      `[B, H', W', C]`, with `H' = (H + top + bottom - window) // stride + 1`.
    """

    def native(x: jax.Array) -> jax.Array:
        return jax.lax.reduce_window(
            x,
            -jnp.inf,  # a literal: JAX must see that this is a maximum
            jax.lax.max,
            (1, window, window, 1),
            (1, stride, stride, 1),
            ((0, 0), *pads, (0, 0)),
        )

    def shifted(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), *pads, (0, 0)), constant_values=-jnp.inf)
        for axis in (1, 2):
            count = (x.shape[axis] - window) // stride + 1
            slices = [
                jax.lax.slice_in_dim(
                    x, start, start + (count - 1) * stride + 1, stride, axis
                )
                for start in range(window)
            ]
            x = slices[0]
            for other in slices[1:]:
                x = jnp.maximum(x, other)
        return x

    return jax.lax.platform_dependent(maps, cpu=shifted, default=native)


def ceil_pads(size: int, window: int, stride: int) -> tuple[int, int]:
    """Padding on the far side that makes a pooling round its output size up."""
    outputs = max(0, -(-(size - window) // stride)) + 1
    return 0, max(0, (outputs - 1) * stride + window - size)


def _is_plain(strides: Sequence[int], padding: Any, options: dict[str, Any]) -> bool:
    dilations = (*(options.get("lhs_dilation") or ()),)
    dilations += (*(options.get("rhs_dilation") or ()),)
    return (
        not isinstance(padding, str)
        and set(strides) == {1}
        and set(dilations) <= {1}
        and options.get("feature_group_count", 1) == 1
    )


def _pointwise(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.tensordot(x, kernel[0, 0], axes=1)


def _patches_times_matrix(x: jax.Array, kernel: jax.Array, pads: Any) -> jax.Array:
    height, width, channels, features = kernel.shape
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    rows, columns = x.shape[1] - height + 1, x.shape[2] - width + 1
    patches = jnp.concatenate(
        [
            x[:, i : i + rows, j : j + columns]
            for i in range(height)
            for j in range(width)
        ],
        axis=-1,
    )
    matrix = kernel.reshape(height * width * channels, features)
    return jnp.tensordot(patches, matrix, axes=1)
