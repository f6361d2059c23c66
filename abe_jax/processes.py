"""The host processes of a run: how they start, agree, and share results.

Process 0 is the one that writes files and talks to people. All take every step
together; what one of them decides alone, such as to stop on a signal, they vote on.
"""

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from abe_jax import parallel
from abe_jax.errors import UserError

# A process that says nothing for this long is taken for dead.
_HEARTBEAT_SECONDS = 20
_START_SECONDS = 300


def join(address: str | None, count: int | None, index: int | None) -> None:
    """Makes this process one of several; to be called before anything uses a device.

    Args:
      address: "host:port" of process 0. With None for all three, the cluster's
        environment tells (TPU pods, SLURM, Open MPI).
      count: number of processes.
      index: number of this one, from 0.

    Raises:
      UserError: the arguments do not fit each other, the environment tells nothing, or
        the others do not come.
    """
    given = [value is not None for value in (address, count, index)]
    if any(given) and not all(given):
        raise UserError(
            "--coordinator_address, --num_processes and --process_id belong together; "
            "give all three, or --distributed alone to ask the cluster's environment."
        )
    if count is not None and index is not None and not 0 <= index < count:
        raise UserError(
            f"--process_id={index} is not one of {count} processes; they count from 0."
        )
    try:
        jax.distributed.initialize(
            address,
            count,
            index,
            initialization_timeout=_START_SECONDS,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"the processes did not find each other: {reason}") from error


def is_first() -> bool:
    """Whether this is the process that writes and talks."""
    return jax.process_index() == 0


def place() -> tuple[int, int]:
    """Number of this process, from 0, and how many there are."""
    return jax.process_index(), jax.process_count()


def wait_for_all(what: str) -> None:
    """Returns when every process has come here; `what` names the place."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def gather_rows(rows: jax.Array) -> np.ndarray:
    """All rows of an array that is split over the devices of all processes."""
    if jax.process_count() > 1:
        return np.asarray(multihost_utils.process_allgather(rows, tiled=True))
    return np.asarray(rows)


def gather(values: np.ndarray) -> np.ndarray:
    """Every process's values, `[number of processes, *values.shape]`, bit by bit.

    Args:
      values: of a dtype of 4 or 8 bytes, of one shape on all processes.
    """
    if jax.process_count() == 1:
        return values[None]
    # As words: JAX would round float64 to float32 on the way.
    words = np.ascontiguousarray(values)[..., None].view(np.uint32)
    gathered = np.asarray(multihost_utils.process_allgather(words))
    return gathered.view(values.dtype).squeeze(-1)


def all_agree(own: bool) -> bool:
    """Whether `own` is true on every process; waits for all of them."""
    return bool(gather(np.array([own], np.int32)).all())


class Vote:
    """Lets all processes learn, at the same call, that one of them wants something.

    The answer is that of the call before: so the host never waits for the device's
    newest step. All processes must call equally often, in the same places.
    """

    def __init__(self, mesh: Mesh):
        self._mesh = mesh
        self._pending: jax.Array | None = None
        same = NamedSharding(mesh, PartitionSpec())
        self._any = jax.jit(lambda raised: raised.any(), out_shardings=same)

    def __call__(self, raised: bool) -> bool:
        """Whether any process had raised its hand at the call before."""
        if jax.process_count() == 1:
            return raised
        pending = self._pending
        own = np.full(len(self._mesh.local_devices), raised)
        self._pending = self._any(parallel.split_rows(own, self._mesh))
        return pending is not None and bool(pending)
