"""3 x 3 convolutions by 16 multiplications for every 2 x 2 outputs instead of 36.

F(2 x 2, 3 x 3) of Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks",
CVPR 2016, section 4.1. With `d` a tile of 4 x 4 inputs, tiles lying two apart, and `g`
the kernel, the 2 x 2 outputs of the tile are

    A^T ((G g G^T) * (B^T d B)) A

where `*` is element by element: over channels, features and tiles one matrix product
for each of the 16 places. Both gradients take as few multiplications. As all factors
are 1, -1 or 1/2, rounding is little worse than the plain sum's.
"""

import math
import operator
from collections.abc import Sequence
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp

from abe_jax.models.lowering import parts
from abe_jax.models.lowering.parts import Pads

Matrix = Sequence[Sequence[float]]
# Arrays of one shape by their place in a tile: `grid[row][column]`.
Grid = list[list[jax.Array]]

_B_T = ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1))
_G = ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1))
_A_T = ((1, 1, 1, 0), (0, 1, -1, -1))
_B, _A = tuple(zip(*_B_T, strict=True)), tuple(zip(*_A_T, strict=True))

# Narrower convolutions gain nothing in time and take twice as long to compile.
_MIN_CHANNELS = 64

# 16 MB in float32 (measured: 2 to 256): tiles and products of some images at once.
_TILE_VALUES = 2**22


def is_faster(maps: tuple[int, ...], kernel: tuple[int, ...], pads: Pads) -> bool:
    """Whether a convolution of stride 1 is faster in this way.

    Args:
      maps: shape `[B, H, W, C]`.
      kernel: shape `[kh, kw, C, D]`.
      pads: `((top, bottom), (left, right))`.
    """
    if kernel[:2] != (3, 3) or min(kernel[2:]) < _MIN_CHANNELS:
        return False
    rows, columns = _outputs(maps, pads)
    return 16 * _half(rows) * _half(columns) < 9 * rows * columns


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def convolution(pads: Pads, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolution of stride 1.

    Args:
      pads: `((top, bottom), (left, right))`.
      x: maps `[B, H, W, C]`.
      kernel: `[3, 3, C, D]`, of the same dtype.

    Returns:
      maps `[B, H', W', D]`.
    """
    rows, columns = _outputs(x.shape, pads)
    factors = _of_kernel(kernel)

    def some(images: jax.Array) -> jax.Array:
        inputs = _of_maps(images, pads)
        outputs = _transform(_A_T, _each(_over_channels, inputs, factors))
        return _side_by_side(outputs)[:, :rows, :columns]

    return parts.join(jax.lax.map(some, _split(x, kernel)))


def _forward(
    pads: Pads, x: jax.Array, kernel: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return convolution(pads, x, kernel), (x, kernel)


def _backward(
    pads: Pads, saved: tuple[jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    (top, _), (left, _) = pads
    factors, pull_back = jax.vjp(_of_kernel, kernel)
    transposed = jax.tree.map(jnp.transpose, factors)
    images = _split(x, kernel)
    cotangents = parts.split_alike(cotangent, images)

    def add_part(total: Grid, part: tuple[jax.Array, jax.Array]) -> Any:
        images, cotangent = part
        cotangents = _transform(_A, _places(_even(cotangent), 2))
        by_factor = _each(_over_tiles, _of_maps(images, pads), cotangents)
        total = _each(operator.add, total, by_factor)
        back = _to_maps(_each(_over_channels, cotangents, transposed))
        return total, back[:, top : top + x.shape[1], left : left + x.shape[2]]

    zeros = jax.tree.map(jnp.zeros_like, factors)
    total, back = jax.lax.scan(add_part, zeros, (images, cotangents))
    return parts.join(back), *pull_back(total)


convolution.defvjp(_forward, _backward)


def _split(x: jax.Array, kernel: jax.Array) -> jax.Array:
    channels, features = kernel.shape[2:]
    values = 4 * math.prod(x.shape[1:3]) * (channels + features)
    return parts.split(x, values, _TILE_VALUES)


def _of_kernel(kernel: jax.Array) -> Grid:
    """`G g G^T`: a matrix `[C, D]` for each place of a tile."""
    return _transform(_G, [list(row) for row in kernel])


def _of_maps(x: jax.Array, pads: Pads) -> Grid:
    """`B^T d B` of maps `[B, H, W, C]`: `[B, H' / 2, W' / 2, C]` for each place."""
    x = _even(jnp.pad(x, ((0, 0), *pads, (0, 0))))
    return _transform(_B_T, _places(x, 4))


def _places(x: jax.Array, size: int) -> Grid:
    """Takes apart tiles of `size` x `size`, two apart, of maps of even sides."""
    rows, columns = x.shape[1] - size + 1, x.shape[2] - size + 1
    return [
        [x[:, i : i + rows : 2, j : j + columns : 2] for j in range(size)]
        for i in range(size)
    ]


def _to_maps(tiles: Grid) -> jax.Array:
    """The transpose of `_of_maps` before it pads; `[B, 2h + 2, 2w + 2, C]`."""
    rows = [_overlapping(_combine(_B, row), axis=2) for row in tiles]
    return _overlapping(_combine(_B, rows), axis=1)


def _overlapping(places: Sequence[jax.Array], axis: int) -> jax.Array:
    """Four places of tiles along an axis, added where one tile lies on the next."""

    def total(place: int) -> jax.Array:
        here, next_tile = [(0, 0)] * 4, [(0, 0)] * 4
        here[axis], next_tile[axis] = (0, 1), (1, 0)
        return jnp.pad(places[place], here) + jnp.pad(places[place + 2], next_tile)

    x = jnp.stack([total(0), total(1)], axis=axis + 1)
    shape = list(x.shape)
    shape[axis : axis + 2] = [-1]
    return x.reshape(shape)


def _side_by_side(tiles: Grid) -> jax.Array:
    """Puts together tiles of 2 x 2: four of `[B, h, w, D]` to `[B, 2h, 2w, D]`."""
    batch, height, width, features = tiles[0][0].shape
    x = jnp.stack([jnp.stack(row, axis=3) for row in tiles], axis=2)
    return x.reshape(batch, 2 * height, 2 * width, features)


def _transform(matrix: Matrix, grid: Grid) -> Grid:
    """`matrix @ grid @ matrix.T`."""
    columns = [_combine(matrix, column) for column in zip(*grid, strict=True)]
    return [_combine(matrix, row) for row in zip(*columns, strict=True)]


def _combine(matrix: Matrix, arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """`matrix @ arrays`, with no more than additions where factors allow it."""

    def total(factors: Sequence[float]) -> jax.Array:
        pairs = zip(factors, arrays, strict=True)
        return reduce(operator.add, (a if f == 1 else f * a for f, a in pairs if f))

    return [total(row) for row in matrix]


def _each(function: Any, *grids: Grid) -> Grid:
    """The function of what the grids hold at each place."""
    return jax.tree.map(function, *grids)


def _over_channels(x: jax.Array, matrix: jax.Array) -> jax.Array:
    return jnp.tensordot(x, matrix, axes=1)


def _over_tiles(x: jax.Array, cotangent: jax.Array) -> jax.Array:
    # As two matrices: contracting three axes, XLA would transpose `x` in memory.
    return jnp.matmul(_rows(x).T, _rows(cotangent))


def _rows(x: jax.Array) -> jax.Array:
    return x.reshape(-1, x.shape[-1])


def _even(x: jax.Array) -> jax.Array:
    """Pads maps to even sides."""
    return jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)))


def _outputs(maps: tuple[int, ...], pads: Pads) -> tuple[int, int]:
    (top, bottom), (left, right) = pads
    return maps[1] + top + bottom - 2, maps[2] + left + right - 2


def _half(length: int) -> int:
    return -(-length // 2)
