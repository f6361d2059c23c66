"""Nearest neighbours: blocks of queries against gallery shards, merged."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from abe_jax.retrieval import neighbours
from abe_jax.retrieval.exact import READ_ROWS, Rows
from abe_jax.retrieval.plan import AXIS, LANES, Device, Plan, product

_GROUPS = (64, 32, 16, 8)
_HASHED = 16  # columns that pick the candidates for duplicates


def find(
    queries: Rows, gallery: Rows, k: int, own: bool, plan: Plan
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest gallery rows of each query; equal rows in their order.

    Args:
      queries, gallery: the embeddings.
      k: how many.
      own: whether query i leaves out gallery row i.
      plan: devices and memory.

    Returns:
      similarities [Q, k] float32 and gallery indices [Q, k] int32.
    """
    first = duplicates(gallery)
    chosen = np.flatnonzero(first == np.arange(gallery.number))
    if len(chosen) == gallery.number:
        if own and queries.same_as(gallery) and neighbours.fits(gallery, k, plan):
            return neighbours.find_others(gallery, k, plan)
        return search(queries, gallery, chosen, k, own, plan)
    # Equal rows are searched for once, as one, and then take their places: the
    # product may give them different last digits.
    wanted = k + int(own)
    sims, places = search(
        queries, gallery, chosen, min(wanted, len(chosen)), False, plan
    )
    copies = np.argsort(first, kind="stable")
    counts = np.bincount(first, minlength=gallery.number)[chosen]
    starts = np.cumsum(counts) - counts
    out_sims = np.empty((queries.number, k), np.float32)
    out = np.empty((queries.number, k), np.int32)
    for begin in range(0, queries.number, READ_ROWS):
        rows = np.arange(begin, min(begin + READ_ROWS, queries.number))
        several = (counts[places[rows]] > 1).any(axis=1)
        plain = rows[~several] if places.shape[1] == wanted else rows[:0]
        if len(plain):
            index = chosen[places[plain]]
            left_out = np.full(len(plain), k)
            if own:
                itself = index == plain[:, None]
                left_out = np.where(itself.any(axis=1), itself.argmax(axis=1), k)
            keep = np.arange(wanted) != left_out[:, None]
            out[plain] = index[keep].reshape(-1, k)
            out_sims[plain] = sims[plain][keep].reshape(-1, k)
        for query in np.setdiff1d(rows, plain):
            place = places[query]
            n = counts[place]
            within = np.arange(n.sum()) - np.repeat(np.cumsum(n) - n, n)
            index = copies[np.repeat(starts[place], n) + within]
            value = np.repeat(sims[query], n)
            # Different rows can tie as well: their copies mix by index.
            order = np.lexsort((index, -value))
            if own:
                order = order[index[order] != query]
            out[query], out_sims[query] = index[order[:k]], value[order[:k]]
    return out_sims, out


def duplicates(rows: Rows) -> np.ndarray:
    """For each row the index of the first row equal to it, [n] int."""
    first = np.arange(rows.number)
    columns = np.unique(np.linspace(0, rows.dim - 1, _HASHED).astype(int))
    keys = np.empty(rows.number, np.uint64)
    for start in range(0, rows.number, READ_ROWS):
        block = rows.block(start, start + READ_ROWS)
        keys[start : start + READ_ROWS] = _hash(block[:, columns])
    maybe = _repeated(keys, first)
    if len(maybe):
        for start in range(0, len(maybe), READ_ROWS):
            part = maybe[start : start + READ_ROWS]
            keys[part] = _hash(rows.take(part))
        maybe = _repeated(keys[maybe], maybe)
    order = maybe[np.argsort(keys[maybe], kind="stable")]
    head = -1
    for row in order:
        # The hash only suggests; equality decides.
        if head >= 0 and keys[row] == keys[head]:
            if np.array_equal(rows.block(row, row + 1), rows.block(head, head + 1)):
                first[row] = head
                continue
        head = row
    return first


def _hash(block: np.ndarray) -> np.ndarray:
    words = (block + np.float32(0)).view(np.uint32)  # -0.0 becomes 0.0
    factors = np.random.default_rng(0).integers(
        1, 2**63, block.shape[1], dtype=np.uint64
    )
    return (words * (factors | np.uint64(1))).sum(axis=1, dtype=np.uint64)


def _repeated(keys: np.ndarray, index: np.ndarray) -> np.ndarray:
    """The index entries whose key occurs more than once."""
    order = np.argsort(keys, kind="stable")
    same = keys[order][1:] == keys[order][:-1]
    return np.sort(index[order[np.r_[False, same] | np.r_[same, False]]])


def search(
    queries: Rows, gallery: Rows, chosen: np.ndarray, k: int, own: bool, plan: Plan
) -> tuple[np.ndarray, np.ndarray]:
    """The k best of the gallery rows `chosen` for each query.

    Args:
      queries, gallery: the embeddings.
      chosen: [m] int, ascending; the gallery rows that take part.
      k: how many, at most m, or m - 1 with `own`.
      own: whether to leave out place i of `chosen` for query i.
      plan: devices and memory.

    Returns:
      similarities [Q, k] float32 and places in `chosen` [Q, k] int32.
    """
    number, dim, shards = len(chosen), gallery.dim, len(plan.devices)
    # A quarter for a chunk and another for the next one, an eighth for similarities.
    block = 256 if plan.devices[0].platform == "cpu" else 2048
    block = max(1, min(block, queries.number, int(plan.memory / 8 / (8 * LANES))))
    tile = max(LANES, int(plan.memory / 8 / (8 * block)) // LANES * LANES)
    chunk = -(-number // shards)
    if chunk * 4 * dim <= plan.memory / 2:  # all of it fits: even tiles
        tiles = -(-chunk // tile)
        tile = -(-chunk // tiles // LANES) * LANES
    else:
        chunk = int(plan.memory / 4 / (4 * dim))
        tile = min(tile, max(LANES, chunk // LANES * LANES))
        tiles = max(1, chunk // tile)
    chunk = tile * tiles
    step = _searcher(plan.devices, tile, k, own, plan.precision)
    total = -(-number // (chunk * shards)) * queries.number
    done = 0
    sims = np.full((queries.number, k), -np.inf, np.float32)
    places = np.full((queries.number, k), -1, np.int32)
    for start in range(0, number, chunk * shards):
        rows = np.zeros((chunk * shards, dim), np.float32)
        part = chosen[start : start + len(rows)]
        for at in range(0, len(part), READ_ROWS):
            some = part[at : at + READ_ROWS]
            rows[at : at + len(some)] = gallery.take(some)
        placed = plan.put(rows, P(AXIS))
        waiting: list[tuple[int, Any]] = []

        def collect(entry: tuple[int, Any]) -> None:
            at, (values, index) = entry
            values, index = np.asarray(values), np.asarray(index)
            count = min(len(values), queries.number - at)
            sims[at : at + count] = values[:count]
            places[at : at + count] = index[:count]

        for at in range(0, queries.number, block):
            x = queries.block(at, at + block)
            count = len(x)
            best, index = sims[at : at + count], places[at : at + count]
            if count < block:
                fill = ((0, block - count), (0, 0))
                x, best, index = (np.pad(v, fill) for v in (x, best, index))
            bounds = np.array([start, number, at], np.int32)
            waiting.append(
                (at, step(*(plan.put(v) for v in (bounds, x, best, index)), placed))
            )
            if len(waiting) > 2:
                collect(waiting.pop(0))
            done += count
            if plan.progress is not None:
                plan.progress(done / total)
        for entry in waiting:
            collect(entry)
    return sims, places


@lru_cache(maxsize=32)
def _searcher(
    devices: tuple[Device, ...],
    tile: int,
    k: int,
    own: bool,
    precision: lax.Precision,
) -> Callable[..., Any]:
    """The jitted step: one block of queries against every shard of a chunk."""

    def step(bounds: Any, x: Any, best: Any, index: Any, shard: Any) -> Any:
        device = lax.axis_index(AXIS) if len(devices) > 1 else 0
        first = bounds[0] + device * shard.shape[0]
        query = bounds[2] + jnp.arange(len(x), dtype=jnp.int32)

        def body(t: jax.Array, found: Any) -> Any:
            rows = lax.dynamic_slice_in_dim(shard, t * tile, tile)
            sims = product(x, rows, precision)
            place = first + t * tile + jnp.arange(tile, dtype=jnp.int32)
            keep = (place < bounds[1])[None, :]
            if own:
                keep = keep & (place[None, :] != query[:, None])
            values, at = _best(jnp.where(keep, sims, -jnp.inf), min(k, tile))
            return _merge(found, (values, first + t * tile + at), k)

        none = (jnp.full_like(best, -jnp.inf), jnp.full_like(index, -1))
        found = lax.fori_loop(0, shard.shape[0] // tile, body, none)
        if len(devices) > 1:
            # Shards lie in the gallery's order, so a stable merge keeps ties right.
            values, at = (lax.all_gather(v, AXIS, axis=1, tiled=True) for v in found)
            return _merge((best, index), (values, at), k)
        return _merge((best, index), found, k)

    if len(devices) > 1:
        step = jax.shard_map(
            step,
            mesh=Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,)),
            in_specs=(P(), P(), P(), P(), P(AXIS)),
            out_specs=P(),
            check_vma=False,
        )
    return jax.jit(step)


def _merge(a: Any, b: Any, k: int) -> tuple[jax.Array, jax.Array]:
    """The k best of two lists, those of the first before equal ones."""
    values = jnp.concatenate([a[0], b[0]], axis=1)
    places = jnp.concatenate([a[1], b[1]], axis=1)
    values, at = lax.top_k(values, k)
    return values, jnp.take_along_axis(places, at, axis=1)


def _best(sims: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Stable top k of each row [B, n]; n is a multiple of LANES."""
    number, width = sims.shape
    for size in _GROUPS:
        if width % size == 0 and width // size >= 4 * k:
            break
    else:
        return lax.top_k(sims, k)
    # The k best lie in the k groups of neighbours whose maxima are best: each group
    # before theirs holds a better value, or an equal one at a lower index.
    groups = sims.reshape(number, width // size, size)
    _, chosen = lax.top_k(groups.max(axis=2), k)
    chosen = jnp.sort(chosen, axis=1)
    held = jnp.take_along_axis(groups, chosen[:, :, None], axis=1)
    values, at = lax.top_k(held.reshape(number, k * size), k)
    return values, jnp.take_along_axis(chosen, at // size, axis=1) * size + at % size
