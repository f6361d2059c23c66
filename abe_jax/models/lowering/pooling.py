"""Max pooling where XLA's gradient of `reduce_window` is slow: on CPUs and GPUs."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from abe_jax.models.lowering import parts
from abe_jax.models.lowering.parts import Pads
from abe_jax.precision import at_least_float32


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def max_pool(window: int, stride: int, pads: Pads, x: jax.Array) -> jax.Array:
    """Native max pooling, with the gradient of pooling along W, then along H."""
    return native(window, stride, pads, x)


def native(window: int, stride: int, pads: Pads, x: jax.Array) -> jax.Array:
    return jax.lax.reduce_window(
        x,
        -jnp.inf,  # a literal: JAX must see that this is a maximum
        jax.lax.max,
        (1, window, window, 1),
        (1, stride, stride, 1),
        ((0, 0), *pads, (0, 0)),
    )


def _pool_forward(
    window: int, stride: int, pads: Pads, x: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    y: Any = max_pool(window, stride, pads, x)
    return y, (x, y)


def _pool_backward(
    window: int,
    stride: int,
    pads: Pads,
    saved: tuple[jax.Array, jax.Array],
    cotangent: jax.Array,
) -> tuple[jax.Array]:
    x, y = saved
    images = parts.split(x, math.prod(x.shape[1:]), parts.CACHED_VALUES)
    pool = {"window": window, "stride": stride}
    (top, _), (left, _) = pads

    def some(part: tuple[jax.Array, ...]) -> jax.Array:
        images, maxima, cotangent = part
        images = _surround(images, pads)
        rows = _pool_axis(images, axis=2, **pool)
        cotangent = _cotangent_of_pool(rows, maxima, cotangent, axis=1, **pool)
        cotangent = _cotangent_of_pool(images, rows, cotangent, axis=2, **pool)
        return cotangent[:, top : top + x.shape[1], left : left + x.shape[2]]

    y, cotangent = (parts.split_alike(v, images) for v in (y, cotangent))
    return (parts.join(jax.lax.map(some, (images, y, cotangent))),)


max_pool.defvjp(_pool_forward, _pool_backward)


def max_pool_by_place(window: int, stride: int, pads: Pads, x: jax.Array) -> jax.Array:
    """Native max pooling, with a gradient that knows each maximum's place by a number.

    The place of a maximum in its window, of at most 256, is kept in a byte in place of
    the maps; the gradient gathers from the windows that a position is in.
    """
    return _pool_by_place(window, stride, pads, x.shape, x)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _pool_by_place(
    window: int, stride: int, pads: Pads, maps: tuple[int, ...], x: jax.Array
) -> jax.Array:
    return native(window, stride, pads, x)


def _by_place_forward(
    window: int, stride: int, pads: Pads, maps: tuple[int, ...], x: jax.Array
) -> tuple[jax.Array, jax.Array]:
    y = native(window, stride, pads, x)
    x, (rows, columns) = _surround(x, pads), y.shape[1:3]
    place = jnp.zeros(y.shape, jnp.uint8)
    for k, (i, j) in reversed(list(enumerate(np.ndindex(window, window)))):
        seen = _shifted(x, i, rows, stride, axis=1)
        seen = _shifted(seen, j, columns, stride, axis=2)
        place = jnp.where(seen == y, jnp.uint8(k), place)
    return y, place


def _by_place_backward(
    window: int,
    stride: int,
    pads: Pads,
    maps: tuple[int, ...],
    place: jax.Array,
    cotangent: jax.Array,
) -> tuple[jax.Array]:
    total = at_least_float32(jnp.zeros(maps, cotangent.dtype))
    given = at_least_float32(cotangent)
    zero = jnp.zeros((), given.dtype)
    for k, offsets in enumerate(np.ndindex(window, window)):
        room = [(0, 0, 0)]
        for axis, offset in enumerate(offsets, start=1):
            before = offset - pads[axis - 1][0]
            span = (place.shape[axis] - 1) * stride + 1
            room.append((before, maps[axis] - before - span, stride - 1))
        total += jax.lax.pad(jnp.where(place == k, given, 0), zero, [*room, (0, 0, 0)])
    return (total.astype(cotangent.dtype),)


_pool_by_place.defvjp(_by_place_forward, _by_place_backward)


def _surround(x: jax.Array, pads: Pads) -> jax.Array:
    return jnp.pad(x, ((0, 0), *pads, (0, 0)), constant_values=-jnp.inf)


def _shifted(
    x: jax.Array, offset: int, count: int, stride: int, axis: int
) -> jax.Array:
    end = offset + (count - 1) * stride + 1
    return jax.lax.slice_in_dim(x, offset, end, stride, axis)


def _pool_axis(x: jax.Array, *, window: int, stride: int, axis: int) -> jax.Array:
    count = (x.shape[axis] - window) // stride + 1
    y = _shifted(x, 0, count, stride, axis)
    for offset in range(1, window):
        y = jnp.maximum(y, _shifted(x, offset, count, stride, axis))
    return y


def _cotangent_of_pool(
    x: jax.Array,
    y: jax.Array,
    cotangent: jax.Array,
    *,
    window: int,
    stride: int,
    axis: int,
) -> jax.Array:
    """Gives each maximum's cotangent to its first place along an axis."""
    count = y.shape[axis]
    # One array for each position modulo the stride. Padded and added: XLA takes three
    # times as long to add to slices in place.
    shape = list(x.shape)
    shape[axis] = length = -(-x.shape[axis] // stride)
    phases = [jnp.zeros(shape, cotangent.dtype)] * stride
    free = jnp.ones(y.shape, bool)
    for offset in range(window):
        hit = free & (_shifted(x, offset, count, stride, axis) == y)
        free &= ~hit
        before = offset // stride
        pads = [(0, 0)] * x.ndim
        pads[axis] = (before, length - count - before)
        phases[offset % stride] += jnp.pad(jnp.where(hit, cotangent, 0), pads)
    if stride == 1:
        return phases[0]
    together = jnp.stack(phases, axis=axis + 1)
    shape[axis] *= stride
    return jax.lax.slice_in_dim(together.reshape(shape), 0, x.shape[axis], axis=axis)
