"""Nearest neighbours: blocks of queries against gallery shards, merged."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from abe_jax.retrieval.exact import hash_rows
from abe_jax.retrieval.plan import AXIS, LANES, Device, Plan, mesh_of, product
from abe_jax.retrieval.rows import READ_ROWS, Rows

_GROUPS = (64, 32, 16, 8)
_HASHED = 16  # columns that pick the candidates for duplicates


class ChunkedRows:
    """A gallery as it is searched: equal rows once, in chunks, held or streamed.

    Attributes:
      number, dim: rows of the gallery, and their values.
      longest: an upper bound of the rows' lengths.
      chosen: [m] int, ascending; the first of each set of equal rows.
    """

    def __init__(self, rows: Rows, plan: Plan, hold: bool = False):
        """Finds equal rows; with `hold` puts all others on the devices, to stay."""
        self.number, self.dim = rows.number, rows.dim
        self.longest = float(rows.norms.max())
        first = duplicates(rows)
        self.chosen = np.flatnonzero(first == np.arange(rows.number))
        self._plan = plan
        # All rows, equal ones side by side, and where each chosen one's equals stand.
        self._copies = np.argsort(first, kind="stable")
        self._counts = np.bincount(first, minlength=rows.number)[self.chosen]
        self._starts = np.cumsum(self._counts) - self._counts
        self._rows, self._held, self._tile = rows, None, 0
        if hold:
            chunk, self._tile = self._chunk(_block(plan), whole=True)
            self._held = self._load(0, chunk)
            self._rows = None  # the caller may let go of the array

    def find(
        self, queries: Rows, k: int, own: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest gallery rows of each query; equal rows in their order.

        Args:
          queries: the embeddings.
          k: how many.
          own: [Q] int, the gallery row that each query leaves out, or -1.

        Returns:
          similarities [Q, k] float32 and gallery indices [Q, k] int32.
        """
        if len(self.chosen) == self.number:
            return self._search(queries, k, own)
        # One of a set of equal rows is searched for, and the others are filled in
        # afterwards: the product may give equal rows different last digits.
        wanted = k + int(own is not None)
        sims, positions = self._search(queries, min(wanted, len(self.chosen)), None)
        counts = self._counts
        out_sims = np.empty((queries.number, k), np.float32)
        out = np.empty((queries.number, k), np.int32)
        for begin in range(0, queries.number, READ_ROWS):
            rows = np.arange(begin, min(begin + READ_ROWS, queries.number))
            several = (counts[positions[rows]] > 1).any(axis=1)
            plain = rows[~several] if positions.shape[1] == wanted else rows[:0]
            if len(plain):
                index = self.chosen[positions[plain]]
                left_out = np.full(len(plain), k)
                if own is not None:
                    itself = index == own[plain, None]
                    left_out = np.where(itself.any(axis=1), itself.argmax(axis=1), k)
                keep = np.arange(wanted) != left_out[:, None]
                out[plain] = index[keep].reshape(-1, k)
                out_sims[plain] = sims[plain][keep].reshape(-1, k)
            for query in np.setdiff1d(rows, plain):
                position = positions[query]
                n = counts[position]
                within = np.arange(n.sum()) - np.repeat(np.cumsum(n) - n, n)
                index = self._copies[np.repeat(self._starts[position], n) + within]
                value = np.repeat(sims[query], n)
                # Different rows can tie as well: their copies mix by index.
                order = np.lexsort((index, -value))
                if own is not None:
                    order = order[index[order] != own[query]]
                out[query], out_sims[query] = index[order[:k]], value[order[:k]]
        return out_sims, out

    def _search(
        self, queries: Rows, k: int, own: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k best of the chosen rows, by their positions: both [Q, k].

        Args:
          queries: the embeddings.
          k: how many, at most m, or m - 1 with `own`.
          own: [Q] int, the position that each query leaves out, or -1.
        """
        plan, number = self._plan, len(self.chosen)
        block = min(_block(plan), queries.number)
        if self._held is None:
            chunk, tile = self._chunk(block, whole=False)
        else:
            # Few programs for any number of queries, and one product for few of them.
            block = min(_block(plan), 1 << (block - 1).bit_length())
            chunk, tile = len(self._held) // len(plan.devices), self._tile
            tile = chunk if 8 * block * chunk <= plan.memory / 8 else tile
        step = _searcher(plan.devices, tile, k, plan.precision)
        stride = chunk * len(plan.devices)
        total = -(-number // stride) * queries.number
        done = 0
        sims = np.full((queries.number, k), -np.inf, np.float32)
        positions = np.full((queries.number, k), -1, np.int32)
        for start in range(0, number, stride):
            held = self._load(start, chunk) if self._held is None else self._held
            waiting: list[tuple[int, Any]] = []

            def collect(entry: tuple[int, Any]) -> None:
                at, (values, index) = entry
                values, index = np.asarray(values), np.asarray(index)
                count = min(len(values), queries.number - at)
                sims[at : at + count] = values[:count]
                positions[at : at + count] = index[:count]

            for at in range(0, queries.number, block):
                x = queries.block(at, at + block)
                count = len(x)
                best, index = sims[at : at + count], positions[at : at + count]
                left_out = np.full(block, -1, np.int32)
                if own is not None:
                    left_out[:count] = own[at : at + count]
                if count < block:
                    fill = ((0, block - count), (0, 0))
                    x, best, index = (np.pad(v, fill) for v in (x, best, index))
                bounds = np.array([start, number], np.int32)
                values = (plan.put(v) for v in (bounds, x, left_out, best, index))
                waiting.append((at, step(*values, held)))
                if len(waiting) > 2:
                    collect(waiting.pop(0))
                done += count
                if plan.progress is not None:
                    plan.progress(done / total)
            for entry in waiting:
                collect(entry)
        return sims, positions

    def _chunk(self, block: int, whole: bool) -> tuple[int, int]:
        """Rows of a shard on a device at once, and of a tile, which divides it."""
        plan, shards = self._plan, len(self._plan.devices)
        # A quarter for a chunk and another for the next one, an eighth for
        # similarities.
        tile = max(LANES, int(plan.memory / 8 / (8 * block)) // LANES * LANES)
        chunk = -(-len(self.chosen) // shards)
        if whole or chunk * 4 * self.dim <= plan.memory / 2:  # even tiles
            tiles = -(-chunk // tile)
            tile = -(-chunk // tiles // LANES) * LANES
        else:
            chunk = int(plan.memory / 4 / (4 * self.dim))
            tile = min(tile, max(LANES, chunk // LANES * LANES))
            tiles = max(1, chunk // tile)
        return tile * tiles, tile

    def _load(self, start: int, chunk: int) -> jax.Array:
        """Puts a chunk of the chosen rows on each device, filled up with zeros."""
        assert self._rows is not None
        rows = np.zeros((chunk * len(self._plan.devices), self.dim), np.float32)
        part = self.chosen[start : start + len(rows)]
        for at in range(0, len(part), READ_ROWS):
            some = part[at : at + READ_ROWS]
            rows[at : at + len(some)] = self._rows.take(some)
        return self._plan.put(rows, P(AXIS))


def _block(plan: Plan) -> int:
    """Queries of one step, at most."""
    most = 256 if plan.devices[0].platform == "cpu" else 2048
    return max(1, min(most, int(plan.memory / 8 / (8 * LANES))))


def duplicates(rows: Rows) -> np.ndarray:
    """For each row the index of the first row equal to it, [n] int."""
    first = np.arange(rows.number)
    columns = np.unique(np.linspace(0, rows.dim - 1, _HASHED).astype(int))
    keys = np.empty(rows.number, np.uint64)
    for start in range(0, rows.number, READ_ROWS):
        block = rows.block(start, start + READ_ROWS)
        keys[start : start + READ_ROWS] = hash_rows(block[:, columns])
    maybe = _repeated(keys, first)
    for start in range(0, len(maybe), READ_ROWS):
        part = maybe[start : start + READ_ROWS]
        keys[part] = hash_rows(rows.take(part))
    maybe = _repeated(keys[maybe], maybe)
    maybe = maybe[np.argsort(keys[maybe], kind="stable")]
    while len(maybe):
        # The hash only suggests; equality with the first row of each hash decides.
        starts = np.flatnonzero(np.r_[True, keys[maybe][1:] != keys[maybe][:-1]])
        heads = np.repeat(maybe[starts], np.diff(np.r_[starts, len(maybe)]))
        equal = np.empty(len(maybe), bool)
        for start in range(0, len(maybe), READ_ROWS):
            part = slice(start, start + READ_ROWS)
            pair = rows.take(maybe[part]), rows.take(heads[part])
            equal[part] = (pair[0] == pair[1]).all(axis=1)
        first[maybe[equal]] = heads[equal]
        maybe = maybe[~equal]
    return first


def _repeated(keys: np.ndarray, index: np.ndarray) -> np.ndarray:
    """The index entries whose key occurs more than once."""
    if not len(keys):
        return index
    order = np.argsort(keys, kind="stable")
    same = keys[order][1:] == keys[order][:-1]
    return np.sort(index[order[np.r_[False, same] | np.r_[same, False]]])


@lru_cache(maxsize=32)
def _searcher(
    devices: tuple[Device, ...],
    tile: int,
    k: int,
    precision: lax.Precision,
) -> Callable[..., Any]:
    """The jitted step: one block of queries against every shard of a chunk."""

    def step(bounds: Any, x: Any, own: Any, best: Any, index: Any, shard: Any) -> Any:
        device = lax.axis_index(AXIS) if len(devices) > 1 else np.int32(0)
        first = bounds[0] + device * np.int32(len(shard))

        def body(t: jax.Array, found: Any) -> Any:
            rows = shard
            if tile < len(shard):
                rows = lax.dynamic_slice_in_dim(shard, t * tile, tile)
            sims = product(x, rows, precision)
            position = first + t * tile + jnp.arange(tile, dtype=jnp.int32)
            keep = (position < bounds[1])[None, :] & (position[None, :] != own[:, None])
            values, at = _best(jnp.where(keep, sims, -jnp.inf), min(k, tile))
            return _merge(found, (values, first + t * tile + at), k)

        none = (jnp.full_like(best, -jnp.inf), jnp.full_like(index, -1))
        tiles = np.int32(len(shard) // tile)
        found = lax.fori_loop(np.int32(0), tiles, body, none)
        if len(devices) > 1:
            # Shards lie in the gallery's order, so a stable merge keeps ties right.
            values, at = (lax.all_gather(v, AXIS, axis=1, tiled=True) for v in found)
            return _merge((best, index), (values, at), k)
        return _merge((best, index), found, k)

    if len(devices) > 1:
        step = jax.shard_map(
            step,
            mesh=mesh_of(devices),
            in_specs=(P(), P(), P(), P(), P(), P(AXIS)),
            out_specs=P(),
            check_vma=False,
        )
    return jax.jit(step)


def _merge(a: Any, b: Any, k: int) -> tuple[jax.Array, jax.Array]:
    """The k best of two lists, those of the first before equal ones."""
    values = jnp.concatenate([a[0], b[0]], axis=1)
    positions = jnp.concatenate([a[1], b[1]], axis=1)
    values, at = lax.top_k(values, k)
    return values, jnp.take_along_axis(positions, at, axis=1)


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
