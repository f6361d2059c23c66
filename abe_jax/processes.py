"""The host processes of a run: how they start, agree, and share results.

Process 0 is the one that writes files and talks to people. All take every step
together; what one of them decides alone, such as to stop on a signal, they vote on.
"""

import ctypes
import logging
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from abe_jax import parallel
from abe_jax.errors import UserError, first_line

# A process that says nothing for this long is taken for dead.
_HEARTBEAT_SECONDS = 20
# How long the first to come waits for the last, and when it says so.
_START_SECONDS = 300
_SILENT_SECONDS = 15

# From a name in JAX_PLATFORMS to the one that `jax.devices()` reports.
_PLATFORMS = {"cuda": "gpu", "rocm": "gpu", "gpu": "gpu", "tpu": "tpu"}

# In what JAX, gRPC, gloo and NCCL say when somebody else is gone.
_OF_ANOTHER = re.compile(
    r"gloo|nccl|coordination|heartbeat|socket closed|connection (closed|reset)|"
    r"unavailable|unhealthy",
    re.IGNORECASE,
)
_AGAIN = "start all of them again to go on from the newest checkpoint"

_log = logging.getLogger(__name__)


def check_compiler_flags() -> None:
    """Tries XLA_FLAGS in a subprocess: XLA ends a process whose flags have a typo.

    Raises:
      UserError: XLA does not accept them.
    """
    value = os.environ.get("XLA_FLAGS", "").strip()
    if not value:
        return
    program = "from jaxlib import xla_client; xla_client.CompileOptions()"
    read = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True
    )
    if read.returncode:
        reason = re.search(r"^[EF]\d{4} .*?\] (.*)$", read.stderr, re.MULTILINE)
        raise UserError(
            f"XLA does not take XLA_FLAGS={value!r}: "
            f"{reason[1] if reason else read.stderr[-300:]}"
        )


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
    if address is not None:
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise UserError(
                f"--coordinator_address={address} is no address; give HOST:PORT, such "
                "as 10.0.0.1:1234."
            )
    _reach_directly(address)
    before = signal.getsignal(signal.SIGTERM)

    def connect() -> None:
        jax.distributed.initialize(
            address,
            count,
            index,
            # A cluster's environment would choose devices that the flags do not.
            cluster_detection_method="deactivate" if all(given) else None,
            initialization_timeout=2 * _START_SECONDS,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
        )

    try:
        _in_time(connect, "process 0" if address is None else address)
    except (ValueError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"the processes did not find each other: {first_line(error)}."
        ) from error
    # JAX has put a handler of its own there, which only takes note.
    signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
    _abort_in_one_line()


def _reach_directly(address: str | None) -> None:
    """Keeps gRPC from asking a web proxy for the other processes."""
    names = ["localhost", "127.0.0.1", "::1"]
    if address is not None:
        names.append(address.rpartition(":")[0].strip("[]"))
    known = os.environ.get("no_grpc_proxy") or os.environ.get("no_proxy")
    os.environ["no_grpc_proxy"] = ",".join([*([known] if known else []), *names])
    if address is not None:  # else JAX's warning names what may be in the way
        jax.config.update("jax_check_proxy_envs", False)


def _in_time(connect: Callable[[], None], where: str) -> None:
    """Connects, or raises UserError when the others do not come.

    In a thread: JAX is deaf to signals while it waits, and ends the process by abort()
    when its own time is up.
    """
    errors: list[Exception] = []

    def run() -> None:
        try:
            connect()
        except Exception as error:  # for the thread that waits
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(min(_SILENT_SECONDS, _START_SECONDS))
    if thread.is_alive():
        _log.warning("waiting for the other processes of the run, at %s", where)
        thread.join(max(0, _START_SECONDS - _SILENT_SECONDS))
    if thread.is_alive():
        raise UserError(
            f"the other processes did not come within {_START_SECONDS} s; start all of "
            f"them, and see that each reaches {where}."
        )
    if errors:
        raise errors[0]


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _on_abort(number: int) -> None:
    del number
    line = (
        "abe_jax: ended from within JAX, as the lines above say; most likely another "
        f"process of this run ended: {_AGAIN}.\n"
    )
    os.write(2, line.encode())
    os._exit(1)


def _abort_in_one_line() -> None:
    """Prints one line when JAX, its coordinator gone, aborts instead of raising."""
    handle = ctypes.CDLL(None).signal
    handle.restype = ctypes.c_void_p
    handle(signal.SIGABRT, _on_abort)


def explain(error: Exception) -> UserError | None:
    """What an error from within JAX means for the user; None where nobody knows."""
    reason = first_line(error)
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in reason:
        return UserError(
            f"out of memory ({reason}); lower eval.batch_size, set train.chunks, "
            "model.rematerialize or model.learners_in_turn, or lower train.batch_size "
            "and give another --workdir."
        )
    if isinstance(error, OSError) and error.filename is not None:
        # Such as a path below a folder that this user may not enter.
        return UserError(f"cannot use {error.filename!r}: {error.strerror}.")
    return of_another(error)


def of_another(error: Exception) -> UserError | None:
    """What an error means that another process caused; None where none did.

    Orbax raises errors of its own from those of JAX, so its causes are asked as well.
    """
    cause: BaseException | None = error
    while cause is not None and jax.distributed.is_initialized():
        if _OF_ANOTHER.search(str(cause)):
            return UserError(
                "another process of this run ended, or the network failed; "
                f"{_AGAIN} ({first_line(cause)})."
            )
        cause = cause.__cause__ or cause.__context__
    return None


def describe_devices() -> str:
    """All devices of the run, in words: "8 gpu devices (NVIDIA H100), 2 processes".

    Raises:
      UserError: JAX cannot use what JAX_PLATFORMS names first.
    """
    wanted = os.environ.get("JAX_PLATFORMS", "").split(",")[0]
    try:
        devices = jax.devices()
        reason = f"it finds only {devices[0].platform}"
    except (AssertionError, RuntimeError) as error:
        devices, reason = None, str(error) or "no such plug-in"
    platform = _PLATFORMS.get(wanted)
    if devices is None or platform not in (None, devices[0].platform):
        raise UserError(
            f"JAX cannot use {wanted or 'any device'} here ({reason}); install its "
            "plug-in (the extra cuda or tpu of abe_jax), or unset JAX_PLATFORMS to "
            "take what there is."
        )
    kinds = sorted({device.device_kind for device in devices})
    platform = devices[0].platform
    named = "" if kinds == [platform] else f" ({', '.join(kinds)})"
    several = f", {jax.process_count()} processes" if jax.process_count() > 1 else ""
    plural = "" if len(devices) == 1 else "s"
    return f"{len(devices)} {platform} device{plural}{named}{several}"


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
