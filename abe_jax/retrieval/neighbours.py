"""Nearest neighbours within one set: each tile of the symmetric matrix once.

First, half of the matrix product gives each row's highest similarity to every group of
neighbouring rows. The k nearest rows lie in the k groups where that is highest, and the
products with these groups are computed again, group by group.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from abe_jax.retrieval.plan import LANES, Plan, product
from abe_jax.retrieval.rows import READ_ROWS, Rows

GROUP = 128  # rows


def fits(rows: Rows, k: int, plan: Plan) -> bool:
    """Whether `find_others` is the way: one device, enough memory, k far from all."""
    groups = -(-rows.number // GROUP)
    held = 4 * rows.number * (rows.dim + groups)
    near = k <= GROUP and 8 * k <= groups
    on_host = 8 * rows.number * k * k  # the best k of k groups
    return len(plan.devices) == 1 and near and max(held, on_host) <= plan.memory


def find_others(rows: Rows, k: int, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest other rows of each row; of equal similarity the lower index.

    Args:
      rows: the embeddings, no two of them equal.
      k: how many; `fits` says whether it is small enough.
      plan: device and memory.

    Returns:
      similarities [n, k] float32 and indices [n, k] int32.
    """
    tile = plan.widest_tile
    blocks = -(-rows.number // tile)
    held = np.zeros((blocks * tile, rows.dim), np.float32)
    for at in range(0, rows.number, READ_ROWS):
        block = rows.block(at, at + READ_ROWS)
        held[at : at + len(block)] = block
    placed = plan.put(held)
    del held
    groups = _best_groups(placed, rows.number, tile, k, plan)
    sims, positions = _best_of_groups(placed, groups, rows.number, k, plan)
    # Groups ascend, and so do ties within one: a stable top k gives the lower index.
    best_sims = np.empty((rows.number, k), np.float32)
    best = np.empty((rows.number, k), np.int32)
    for at in range(0, rows.number, READ_ROWS):
        some = slice(at, at + READ_ROWS)
        values, columns = lax.top_k(plan.put(sims[some].reshape(-1, k * k)), k)
        best_sims[some] = values
        found = positions[some].reshape(-1, k * k)
        best[some] = np.take_along_axis(found, np.asarray(columns), axis=1)
    return best_sims, best


def _best_groups(
    rows: jax.Array, number: int, tile: int, k: int, plan: Plan
) -> np.ndarray:
    """The k groups that hold the most similar rows, ascending: [number, k] int32."""
    blocks = len(rows) // tile
    step, choose = _group_steps(tile, k, plan.precision)
    maxima = plan.put(np.full((len(rows), len(rows) // GROUP), -np.inf, np.float32))
    for i in range(blocks):
        maxima = step(np.int32(i), np.int32(number), maxima, rows)
        if i % 8 == 7:  # a few row blocks under way keep the device busy
            jax.block_until_ready(maxima)
        if plan.progress is not None:
            plan.progress(0.9 * (1 - (1 - (i + 1) / blocks) ** 2))
    chosen = [np.asarray(choose(np.int32(i), maxima)) for i in range(blocks)]
    return np.concatenate(chosen)[:number]


@lru_cache(maxsize=32)
def _group_steps(
    tile: int, k: int, precision: lax.Precision
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Jitted: a row of tiles, for its rows and its columns; the choice of groups."""
    per_tile = tile // GROUP

    def step(i: Any, number: Any, maxima: Any, rows: Any) -> Any:
        left = lax.dynamic_slice_in_dim(rows, i * tile, tile)
        query = i * tile + jnp.arange(tile, dtype=jnp.int32)

        def body(j: jax.Array, maxima: Any) -> Any:
            right = lax.dynamic_slice_in_dim(rows, j * tile, tile)
            sims = product(left, right, precision)
            position = j * tile + jnp.arange(tile, dtype=jnp.int32)

            def only_others(sims: jax.Array) -> jax.Array:
                keep = (position < number)[None, :] & (
                    position[None, :] != query[:, None]
                )
                return jnp.where(keep, sims, -jnp.inf)

            at_edge = (i == j) | ((j + 1) * tile > number)
            sims = lax.cond(at_edge, only_others, lambda sims: sims, sims)
            # Lane by lane first: XLA's CPU backend then uses vectors.
            by_lane = sims.reshape(tile, per_tile, GROUP // LANES, LANES).max(axis=2)
            of_rows = by_lane.max(axis=2)
            of_columns = sims.reshape(per_tile, GROUP, tile).max(axis=1).T
            of_columns = jnp.where(i == j, of_rows, of_columns)
            maxima = lax.dynamic_update_slice(maxima, of_rows, (i * tile, j * per_tile))
            return lax.dynamic_update_slice(
                maxima, of_columns, (j * tile, i * per_tile)
            )

        return lax.fori_loop(i, len(rows) // tile, body, maxima)

    def choose(i: Any, maxima: Any) -> Any:
        some = lax.dynamic_slice_in_dim(maxima, i * tile, tile)
        return jnp.sort(lax.top_k(some, k)[1], axis=1)

    return jax.jit(step, donate_argnums=2), jax.jit(choose)


def _best_of_groups(
    rows: jax.Array, groups: np.ndarray, number: int, k: int, plan: Plan
) -> tuple[np.ndarray, np.ndarray]:
    """The k best rows of each chosen group: two [number, k groups, k]."""
    pairs = np.argsort(groups.ravel(), kind="stable")
    counts = np.bincount(groups.ravel(), minlength=len(rows) // GROUP)
    ends = np.cumsum(counts)
    # So many queries of one group at a time; a power of two, for few programs.
    size = 1 << int(np.clip(np.log2(1 + counts.mean()), 5, 10))
    step = _pair_step(k, plan.precision)
    sims = np.empty((groups.size, k), np.float32)
    positions = np.empty((groups.size, k), np.int32)
    waiting: list[tuple[np.ndarray, Any]] = []

    def collect(some: np.ndarray, found: Any) -> None:
        values, index = (np.asarray(x)[: len(some)] for x in found)
        sims[some], positions[some] = values, index

    for group, (end, count) in enumerate(zip(ends, counts, strict=True)):
        for at in range(end - count, end, size):
            some = pairs[at : min(at + size, end)]
            queries = np.zeros(size, np.int32)
            queries[: len(some)] = some // k
            bounds = np.array([group, number], np.int32)
            waiting.append((some, step(bounds, plan.put(queries), rows)))
            if len(waiting) > 2:
                collect(*waiting.pop(0))
        if plan.progress is not None and count:
            plan.progress(0.9 + 0.1 * float(end / ends[-1]))
    for entry in waiting:
        collect(*entry)
    return sims.reshape(number, k, k), positions.reshape(number, k, k)


@lru_cache(maxsize=32)
def _pair_step(k: int, precision: lax.Precision) -> Callable[..., Any]:
    """Jitted: some queries against the rows of one group."""

    def step(bounds: Any, queries: Any, rows: Any) -> Any:
        first = bounds[0] * GROUP
        sims = product(
            rows[queries], lax.dynamic_slice_in_dim(rows, first, GROUP), precision
        )
        position = first + jnp.arange(GROUP, dtype=jnp.int32)
        keep = (position < bounds[1])[None, :] & (position[None, :] != queries[:, None])
        values, at = lax.top_k(jnp.where(keep, sims, -jnp.inf), k)
        return values, first + at

    return jax.jit(step)
