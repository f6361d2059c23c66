"""Counting negatives on the device, without sorting, tile by tile.

Each positive has two counts, of the negatives surely at or above it and of those
perhaps at or above it; a rigorous bound on the float32 product's error separates them.
Where it leaves a query's metrics undecided, which is rare, `recount` counts again in
exact arithmetic. So block sizes, devices and the product's precision change the time,
never a count.
"""

import math
from collections.abc import Callable
from functools import lru_cache, partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from abe_jax.retrieval.plan import AXIS, LANES, Device, Plan, mesh_of, product
from abe_jax.retrieval.rows import READ_ROWS, Side

_PRECISION_ERROR = {
    # Relative to |q| |g|, beside float32's own. DEFAULT: one pass of bfloat16. HIGH: on
    # TPUs three of them, elsewhere one of tensorfloat32, whose operands are rounded or
    # cut to 10 bits.
    lax.Precision.HIGHEST: 0.0,
    lax.Precision.HIGH: 2.0**-9,
    lax.Precision.DEFAULT: 2.0**-7,
}
_HIGH_ERROR_OF_TPUS = 2.0**-14


def count_negatives(
    left: Side, right: Side | None, plan: Plan
) -> tuple[np.ndarray, np.ndarray]:
    """Counts, for each positive of each query, the negatives at or above it.

    Args:
      left: the queries.
      right: the gallery; None where it is the queries, and then each tile of the
        symmetric matrix is computed once, for its rows and its columns.
      plan: devices and memory.

    Returns:
      Two arrays [n, R] int32: negatives surely and perhaps at or above.
    """
    gallery = left if right is None else right
    assert left.positives is not None
    width = left.positives.shape[1]
    surely, perhaps = (np.zeros((len(left.order), width), np.int32) for _ in range(2))
    tile, chunk = _portions(left, gallery, right is None, plan)
    longest = float(gallery.rows.norms.max())
    bounds = _bounds(left, longest, plan)
    chunks = [
        [(s, min(s + chunk, len(side.order))) for s in range(0, len(side.order), chunk)]
        for side in (left, gallery)
    ]
    pairs = [
        (a, b)
        for a in chunks[0]
        for b in chunks[1]
        if right is not None or a[0] <= b[0]
    ]
    areas = [(a[1] - a[0]) * (b[1] - b[0]) for a, b in pairs]
    done, held, loaded = 0, (-1, -1), None
    for (a, b), area in zip(pairs, areas, strict=True):
        triangle = right is None and a == b
        if loaded is None or held != a:
            loaded, held = _load(left, bounds, *a, tile, triangle, plan), a
        other = loaded
        if not triangle:
            other = _load(
                gallery, bounds if right is None else None, *b, tile, False, plan
            )
        rows, columns = _count_pair(
            loaded, other, tile, triangle, right is None, plan, (done, area, sum(areas))
        )
        done += area
        for total, part in zip((surely, perhaps), rows, strict=True):
            total[a[0] : a[1]] += part[: a[1] - a[0], :width]
        if right is None:
            for total, part in zip((surely, perhaps), columns, strict=True):
                total[b[0] : b[1]] += part[: b[1] - b[0], :width]
    return surely, perhaps


def _portions(left: Side, right: Side, same: bool, plan: Plan) -> tuple[int, int]:
    """The side of a tile and the number of rows held on the device at once."""
    tile = int(math.sqrt(plan.memory / 48)) // LANES * LANES
    tile = max(LANES, min(tile, plan.widest_tile))
    number = max(len(left.order), len(right.order))
    row_bytes = 4 * left.rows.dim
    total = row_bytes * (number if same else len(left.order) + len(right.order))
    if total <= 0.75 * plan.memory:
        # Tiles fill the one chunk evenly; the triangle needs them in odd number.
        blocks = max(-(-number // tile), len(plan.devices)) | 1
        return -(-number // blocks // LANES) * LANES, number
    # One chunk of each side, and the next one on its way.
    blocks = max(1, int(plan.memory / 4 / row_bytes) // tile - 1) | 1
    return tile, tile * blocks


def _bounds(side: Side, longest: float, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """Products surely at or above each positive, and perhaps: two [R, n] float32."""
    assert side.positives is not None
    sims = side.positives.T
    # The bound for a sum of products in any order (gamma_n), two roundings to float32,
    # and the error of float64 beside them.
    lost = _PRECISION_ERROR[plan.precision]
    if plan.precision == lax.Precision.HIGH and plan.devices[0].platform == "tpu":
        lost = _HIGH_ERROR_OF_TPUS
    unit = (side.rows.dim + 16) * 2.0**-24 + lost
    norms = side.rows.norms[side.order]
    # Devices take subnormal numbers for zero: values, products, sums and bounds.
    underflow = side.rows.dim * 4e-38 * (1 + norms + longest)
    error = norms * longest * unit + underflow
    upper = np.nextafter((sims + error).astype(np.float32), np.float32(np.inf))
    lower = np.nextafter((sims - error).astype(np.float32), np.float32(-np.inf))
    lower[np.isinf(sims)] = np.inf
    return upper, lower


def _load(
    side: Side,
    bounds: tuple[np.ndarray, np.ndarray] | None,
    start: int,
    stop: int,
    tile: int,
    triangle: bool,
    plan: Plan,
) -> tuple[jax.Array, ...]:
    """Puts a chunk on the devices, filled up to whole tiles.

    Returns:
      rows [size, D]; their marks [size, 1 or 2] int32, labels and groups, -1 in the
      filling; the least and the largest mark of each tile [blocks, 1 or 2, 2]; how many
      positives a tile asks for [blocks]; and the two bounds [R, size].
    """
    number = stop - start
    blocks = -(-number // tile)
    blocks = blocks | 1 if triangle else blocks
    size = blocks * tile
    order = side.order[start:stop]
    rows = np.zeros((size, side.rows.dim), np.float32)
    for at in range(0, number, READ_ROWS):
        part = order[at : at + READ_ROWS]
        rows[at : at + len(part)] = side.rows.take(part)
    kinds = [x[start:stop] for x in (side.labels, side.groups) if x is not None]
    marks = np.full((size, len(kinds)), -1, np.int32)
    marks[:number] = np.stack(kinds, axis=1)
    tiles = marks.reshape(blocks, tile, len(kinds))
    least = np.where(tiles < 0, np.iinfo(np.int32).max, tiles).min(axis=1)
    ranges = np.stack([least, tiles.max(axis=1)], axis=2)
    ranges[tiles[:, -1, 0] < 0, 0] = 0, np.iinfo(np.int32).max  # filling meets all
    # A power of two, so that few programs are compiled; `asked` ends the loops.
    width = 0 if bounds is None else len(bounds[0])
    shape = (1 << max(0, width - 1).bit_length(), size)
    upper, lower = (np.full(shape, np.inf, np.float32) for _ in range(2))
    if bounds is not None:
        upper[:width, :number], lower[:width, :number] = (
            x[:, start:stop] for x in bounds
        )
    asked = (
        np.isfinite(lower)
        .sum(axis=0)
        .reshape(blocks, tile)
        .max(axis=1)
        .astype(np.int32)
    )
    return tuple(plan.put(x) for x in (rows, marks, ranges, asked, upper, lower))


def _count_pair(
    a: tuple[jax.Array, ...],
    b: tuple[jax.Array, ...],
    tile: int,
    triangle: bool,
    columns: bool,
    plan: Plan,
    work: tuple[int, int, int],
) -> tuple[Any, ...]:
    """Counts over one pair of chunks: for the rows of `a` and the columns of `b`."""
    number = len(plan.devices)
    step = _counter(plan.devices, tile, triangle, columns, plan.precision)
    totals = tuple(
        plan.put(np.zeros((number, *x[4].shape, 2), np.int32), P(AXIS)) for x in (a, b)
    )
    blocks = a[2].shape[0]
    waiting = None
    for index in range(-(-blocks // number)):
        *totals, mark = step(np.int32(index), *totals, a, b)
        # One step stays in flight: enough to keep the device busy.
        if waiting is not None:
            jax.block_until_ready(waiting)
        waiting = mark
        if plan.progress is not None and index:
            share = min(1.0, index * number / blocks)
            plan.progress((work[0] + share * work[1]) / work[2])
    rows, cols = (np.asarray(x).sum(axis=0, dtype=np.int32) for x in totals)
    if plan.progress is not None:
        plan.progress((work[0] + work[1]) / work[2])
    return tuple(tuple(x[:, :, kind].T for kind in (0, 1)) for x in (rows, cols))


@lru_cache(maxsize=32)
def _counter(
    devices: tuple[Device, ...],
    tile: int,
    triangle: bool,
    columns: bool,
    precision: lax.Precision,
) -> Callable[..., Any]:
    """The jitted step: one row of tiles on each device."""
    on_cpu = devices[0].platform == "cpu"
    count = partial(_count_tile, on_cpu=on_cpu)

    def cut(x: jax.Array, block: jax.Array, axis: int) -> jax.Array:
        return lax.dynamic_slice_in_dim(x, block * tile, tile, axis)

    def step(index: Any, row_total: Any, column_total: Any, a: Any, b: Any):
        rows_a, marks_a, ranges_a, asked_a, upper_a, lower_a = a
        rows_b, marks_b, ranges_b, asked_b, upper_b, lower_b = b
        blocks_a, blocks_b = ranges_a.shape[0], ranges_b.shape[0]
        device = lax.axis_index(AXIS) if len(devices) > 1 else np.int32(0)
        i = index * len(devices) + device
        # In the triangle each row takes the half of the tiles that follow it,
        # around the end: every pair once, the same work for every row.
        trips = (blocks_a + 1) // 2 if triangle else blocks_b
        trips = jnp.where(i < blocks_a, np.int32(trips), np.int32(0))
        i = jnp.minimum(i, np.int32(blocks_a - 1))
        left, mark = cut(rows_a, i, 0), cut(marks_a, i, 0)

        def body(offset: jax.Array, totals: Any):
            row_total, column_total = totals
            j = (i + offset) % blocks_b if triangle else offset
            right, other = cut(rows_b, j, 0), cut(marks_b, j, 0)
            sims = product(left, right, precision)
            # Tiles whose labels and groups cannot meet need no mask. A loop of one turn
            # or none works in place, where `lax.cond` copies the tile; the barrier
            # keeps XLA from making the mask for every tile, before the loop.
            least_a, most_a = ranges_a[i, :, 0], ranges_a[i, :, 1]
            least_b, most_b = ranges_b[j, :, 0], ranges_b[j, :, 1]
            meet = ((least_a <= most_b) & (least_b <= most_a)).any()

            def masked(turn: jax.Array, sims: jax.Array) -> jax.Array:
                here, _ = lax.optimization_barrier((mark, turn))
                return _only_negatives(sims, here, other)

            sims = lax.fori_loop(np.int32(0), meet.astype(jnp.int32), masked, sims)
            row_total = count(sims, row_total, upper_a, lower_a, asked_a[i], i, 1)
            if columns:
                asked = asked_b[j]
                if triangle:
                    asked = jnp.where(offset == 0, jnp.int32(0), asked)
                column_total = count(sims, column_total, upper_b, lower_b, asked, j, 0)
            return row_total, column_total

        totals = lax.fori_loop(
            np.int32(0), trips, body, (row_total[0], column_total[0])
        )
        return totals[0][None], totals[1][None], totals[0][None, 0, 0, :1]

    if len(devices) > 1:
        step = jax.shard_map(
            step,
            mesh=mesh_of(devices),
            in_specs=(P(), P(AXIS), P(AXIS), P(), P()),
            out_specs=(P(AXIS), P(AXIS), P(AXIS)),
            check_vma=False,
        )
    return jax.jit(step, donate_argnums=(1, 2))


def _only_negatives(sims: jax.Array, left: jax.Array, right: jax.Array) -> jax.Array:
    keep = (left[:, None, 0] >= 0) & (right[None, :, 0] >= 0)
    for kind in range(left.shape[1]):
        keep = keep & (left[:, None, kind] != right[None, :, kind])
    return jnp.where(keep, sims, -jnp.inf)


def _count_tile(
    sims: jax.Array,
    total: jax.Array,
    upper: jax.Array,
    lower: jax.Array,
    asked: jax.Array,
    block: jax.Array,
    axis: int,
    on_cpu: bool,
) -> jax.Array:
    """Adds a tile's counts along one axis to total [R, n, 2] int32."""
    tile = sims.shape[0]
    start = block * tile

    def mark(values: jax.Array, sure: jax.Array, maybe: jax.Array) -> jax.Array:
        # Both counts in one integer: a tile is less than 2^15 wide.
        return (values >= maybe).astype(jnp.int32) + jnp.int32(65536) * (
            values >= sure
        ).astype(jnp.int32)

    def body(r: jax.Array, total: jax.Array) -> jax.Array:
        sure = lax.dynamic_slice(upper, (r, start), (1, tile))[0]
        maybe = lax.dynamic_slice(lower, (r, start), (1, tile))[0]
        if on_cpu and axis == 1:
            # Summed lane by lane first: XLA's CPU backend then uses vectors, and
            # keeps no marks in memory.
            strips = jnp.split(sims, tile // LANES, axis=1)
            marks = (mark(strip, sure[:, None], maybe[:, None]) for strip in strips)
            packed = reduce(jnp.add, marks).sum(axis=1, dtype=jnp.int32)
        elif on_cpu:
            packed = lax.scan(
                lambda c, row: (c + mark(row, sure, maybe), None),
                jnp.zeros(tile, jnp.int32),
                sims,
            )[0]
        else:
            sure, maybe = (jnp.expand_dims(x, axis) for x in (sure, maybe))
            packed = mark(sims, sure, maybe).sum(axis=axis, dtype=jnp.int32)
        both = jnp.stack([packed >> 16, packed & 0xFFFF], axis=1)[None]
        position = (r, start, np.int32(0))
        old = lax.dynamic_slice(total, position, (1, tile, 2))
        return lax.dynamic_update_slice(total, old + both, position)

    return lax.fori_loop(np.int32(0), asked, body, total)
