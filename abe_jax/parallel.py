"""One device's program, mapped over all devices. The only place that makes a mesh.

A program is written for one device and the named axis `DATA_AXIS`: it sees its own rows
of the batch and speaks to the others through collectives over the axis. State is
replicated, batches are split by rows.
"""

import collections
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from abe_jax.errors import UserError, require_known

DATA_AXIS = "data"

# This pass removes optimisation barriers. Without barriers XLA's CPU backend undoes
# rematerialisation, by merging what is computed again as common subexpressions, and
# recomputes what `lowering.computed_once` keeps.
_COMPILER_OPTIONS: dict[str, dict[str, Any]] = {
    "cpu": {"xla_disable_hlo_passes": "cse_barrier_expander"}
}
if jax.__version_info__ < (0, 11):
    # Measured on JAX 0.10: XLA's newer generator of CPU loops makes steps of this model
    # 1.5 times as long as the older one, which JAX 0.12 does not have any more.
    _COMPILER_OPTIONS["cpu"]["xla_cpu_use_fusion_emitters"] = False


def make_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of one axis over the given devices, by default those of all processes.

    Devices are ordered by process: each process reads the rows that its devices need.

    Raises:
      UserError: one process has more devices than another.
    """
    devices = jax.devices() if devices is None else devices
    devices = sorted(devices, key=lambda device: (device.process_index, device.id))
    counts = collections.Counter(device.process_index for device in devices)
    if len(set(counts.values())) > 1:
        each = ", ".join(f"process {i} has {counts[i]}" for i in sorted(counts))
        raise UserError(
            f"every process needs the same number of devices, but {each}; see what "
            "CUDA_VISIBLE_DEVICES and the like leave it, or that no device is broken."
        )
    return Mesh(np.asarray(devices), (DATA_AXIS,), axis_types=(AxisType.Auto,))


def map_over_devices(
    program: Callable[[Any, Any], Any],
    mesh: Mesh,
    *,
    mapping: str = "shard_map",
    rows_out: bool = False,
    donate_state: bool = False,
) -> Callable[[Any, Any], Any]:
    """Compiles one device's program for all devices of a mesh.

    Args:
      program: `(state, rows) -> outputs`, run by every device on its own rows.
      mesh: as returned by `make_mesh`.
      mapping: "shard_map" or "pmap"; the same program, the same results.
      rows_out: True where the outputs are rows, as the batch is; False where every
        device ends with equal outputs.
      donate_state: whether the memory of the state is given to the outputs.

    Returns:
      `(state, batch) -> outputs` on global arrays.

    Raises:
      UserError: a mapping of another name, or "pmap" with several processes.
    """
    require_known("parallel.mapping", mapping, ("shard_map", "pmap"))
    donated = (0,) if donate_state else ()
    if mapping == "shard_map":
        rows, same = PartitionSpec(DATA_AXIS), PartitionSpec()
        mapped = jax.shard_map(
            program,
            mesh=mesh,
            in_specs=(same, rows),
            out_specs=rows if rows_out else same,
            # The program sums its gradients itself. With the check on, JAX would have
            # summed those of replicated parameters already.
            check_vma=False,
        )
        options = _COMPILER_OPTIONS.get(mesh.devices.flat[0].platform)
        return jax.jit(mapped, donate_argnums=donated, compiler_options=options)
    if jax.process_count() > 1:
        raise UserError(
            "parallel.mapping = 'pmap' is for one process; use 'shard_map' for several."
        )
    mapped = jax.pmap(
        program,
        axis_name=DATA_AXIS,
        in_axes=(None, 0),
        out_axes=0 if rows_out else None,  # pyright: ignore[reportArgumentType]
        devices=list(mesh.devices.flat),
        donate_argnums=donated,
    )

    def by_device(state: Any, batch: Any) -> Any:
        stacked = jax.tree.map(lambda x: x.reshape(mesh.size, -1, *x.shape[1:]), batch)
        outputs = mapped(state, stacked)
        if not rows_out:
            return outputs
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), outputs)

    return by_device


def require_divisible(batch_size: int, mesh: Mesh, chunks: int = 1) -> None:
    """Refuses a global batch that devices and chunks cannot share equally.

    Raises:
      UserError: the batch is not divisible by the number of devices times chunks.
    """
    if batch_size % (mesh.size * chunks):
        each = f", {chunks} chunks each" if chunks > 1 else ""
        raise UserError(
            f"train.batch_size = {batch_size} is not divisible by {mesh.size} device(s)"
            f"{each}; make it a multiple of {mesh.size * chunks}."
        )


def split_rows(batch: Any, mesh: Mesh) -> Any:
    """Puts this process's rows of a global batch on the mesh, split by rows."""
    sharding = NamedSharding(mesh, PartitionSpec(DATA_AXIS))
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, x), batch
    )


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Copies a tree of arrays to every device of the mesh."""
    if jax.process_count() > 1:
        # Without this, JAX 0.10 makes arrays that cannot be checkpointed.
        tree = jax.device_get(tree)
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def abstract_replicated(tree: Any, mesh: Mesh) -> Any:
    """Shapes and dtypes of a tree, to be held by every device of the mesh."""
    sharding = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
    )
