"""Where and in what portions a search runs, and its product of rows."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from abe_jax.retrieval.inputs import short_repr

AXIS = "blocks"
REPLICATED = P()
_CPU_MEMORY_MB = 256.0
Device = Any  # type checkers do not take jax.Device for a type
ProgressCallback = Callable[[int, int], None]
LANES = 32  # tiles are multiples of this, so that counts vectorise


@dataclass(frozen=True)
class Plan:
    """Where and in what portions a search runs.

    Attributes:
      devices: devices that share the work.
      memory: bytes that blocks may take on each of them.
      precision: of the matrix product on the device.
      progress: called with the share of the work done, in (0, 1].
    """

    devices: tuple[Device, ...]
    memory: float
    precision: lax.Precision
    progress: Callable[[float], None] | None

    def part(self, begin: float, end: float) -> "Plan":
        """The same plan for a part of the work, whose progress is a part as well."""
        report = self.progress
        if report is None:
            return self
        return replace(self, progress=lambda x: report(begin + x * (end - begin)))

    @property
    def mesh(self) -> Mesh:
        return mesh_of(self.devices)

    @property
    def widest_tile(self) -> int:
        """Largest side of a tile of similarities: 4 MB on a CPU, elsewhere 256 MB."""
        return 1024 if self.devices[0].platform == "cpu" else 8192

    @property
    def most_positives(self) -> int:
        """Positives of a query up to which counting beats sorting on the host."""
        return 256 if self.devices[0].platform == "cpu" else 8192

    def put(self, value: np.ndarray, spec: P = REPLICATED) -> jax.Array:
        if len(self.devices) == 1:
            return jax.device_put(value, self.devices[0])
        return jax.device_put(value, NamedSharding(self.mesh, spec))


def mesh_of(devices: Sequence[Device]) -> Mesh:
    """The devices in a row along `AXIS`."""
    return Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,))


def make_plan(
    devices: Sequence[Device] | None,
    block_memory_mb: float | None,
    precision: lax.PrecisionLike,
    progress: ProgressCallback | None,
    number: int,
) -> Plan:
    """Fills in the defaults; progress is then of shares instead of queries."""
    try:
        chosen = tuple(jax.local_devices() if devices is None else devices)
    except TypeError:
        chosen = ()
    if not chosen or not all(isinstance(device, jax.Device) for device in chosen):
        raise ValueError(
            f"devices is {short_repr(devices)}; it must hold devices, as jax.devices() "
            "does, or be None for all."
        )
    if block_memory_mb is None:
        # The CPU reports nothing, and its memory is the caller's as well.
        stats = chosen[0].memory_stats() if chosen[0].platform != "cpu" else None
        memory = _CPU_MEMORY_MB * 2**20
        if stats and "bytes_limit" in stats:
            memory = (stats["bytes_limit"] - stats.get("bytes_in_use", 0)) / 2
    else:
        memory = _mebibytes(block_memory_mb)
    try:
        level = lax.Precision(precision)
    except (TypeError, ValueError):
        raise ValueError(
            f"precision is {short_repr(precision)}; it must be 'highest', 'high' or "
            "'default'."
        ) from None
    if progress is None:
        return Plan(chosen, memory, level, None)
    if not callable(progress):
        raise ValueError(
            f"progress is {short_repr(progress)}; it must be a function of (done, "
            "total)."
        )
    report = progress
    return Plan(chosen, memory, level, lambda x: report(round(x * number), number))


def _mebibytes(value: Any) -> float:
    """The number of bytes; a ValueError if `block_memory_mb` is no number above 0."""
    try:
        number = math.nan if isinstance(value, str | bytes | bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf:
        raise ValueError(
            f"block_memory_mb is {short_repr(value)}; it must be a number above 0."
        )
    return number * 2**20


def product(left: jax.Array, right: jax.Array, precision: lax.Precision) -> jax.Array:
    """Inner products of all pairs of rows, [n, m]."""
    return lax.dot_general(left, right, (((1,), (1,)), ((), ())), precision=precision)
