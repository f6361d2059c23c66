"""Measuring methods in turns, in one process: what the benchmarks share."""

import dataclasses
import importlib
import json
import os
import pathlib
import platform
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

_ROOT = pathlib.Path(__file__).parent.parent


def config(name: str) -> Any:
    """That of configs/NAME.py; the folder is part of a checkout, not installed."""
    if str(_ROOT) not in sys.path:
        sys.path.insert(0, str(_ROOT))  # configs import each other as `configs.NAME`
    return importlib.import_module(f"configs.{name}").get_config()


def resident_mib() -> float:
    """Memory of this process, MiB."""
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


def measure(call: Callable[[], Any]) -> tuple[Any, float, float]:
    """(answer, seconds, peak resident MiB above the start) of one call."""
    before, peak, done = resident_mib(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], resident_mib())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    start = time.perf_counter()
    answer = call()
    seconds = time.perf_counter() - start
    done.set()
    thread.join()
    return answer, seconds, peak[0] - before


@dataclasses.dataclass
class Method:
    """One way to do the work, and what was measured of it.

    Attributes:
      name: shown in tables.
      run: does the work so many times, and waits until it is done.
      setup_seconds: of the first call, compilation included.
      peak_mib: of host memory above the start, in the first calls.
      turns: seconds for one piece of work, of each turn.
    """

    name: str
    run: Callable[[int], None]
    setup_seconds: float = 0.0
    peak_mib: float = 0.0
    turns: list[float] = dataclasses.field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Of one piece of work, in the fastest turn."""
        return min(self.turns)


def take_turns(methods: Sequence[Method], *, turns: int, seconds: float) -> None:
    """Runs all methods one after another, `turns` times, each turn about `seconds`.

    A turn starts with a piece of work that is not timed: it finds caches and memory as
    another method left them, which nobody who trains does.
    """
    counts = []
    for method in methods:
        _, method.setup_seconds, method.peak_mib = measure(lambda m=method: m.run(1))
        _, once, peak = measure(lambda m=method: m.run(2))
        method.peak_mib = max(method.peak_mib, peak)
        counts.append(max(1, round(seconds / (once / 2))))
    for _ in range(turns):
        for method, count in zip(methods, counts, strict=True):
            method.run(1)
            start = time.perf_counter()
            method.run(count)
            method.turns.append((time.perf_counter() - start) / count)


def matrix_rate(dtype: Any = jnp.float32) -> float:
    """Multiply-adds a second, times two, of the best square matrix product here."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    x = jnp.ones((size, size), dtype)
    product = jax.jit(jnp.matmul)

    def run(count: int) -> None:
        y = x
        for _ in range(count):
            y = product(x, y)
        y.block_until_ready()

    method = Method("product", run)
    take_turns([method], turns=3, seconds=0.5)
    return 2 * size**3 / method.seconds


def machine() -> dict[str, str]:
    """Date, commit, versions, device and benchmark of this run."""
    versions = {"python": platform.python_version(), "jax": jax.__version__}
    try:
        import torch  # pyright: ignore[reportMissingImports]

        versions["torch"] = str(torch.__version__)
    except ModuleNotFoundError:
        pass
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=_ROOT,
        capture_output=True,
        text=True,
    ).stdout.strip()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit,
        "device": f"{_processor()}, {len(os.sched_getaffinity(0))} cores",
        "benchmark": pathlib.Path(sys.argv[0]).stem,
        **versions,
    }


def _processor() -> str:
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    text = pathlib.Path("/proc/cpuinfo").read_text()
    found = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    return found[1] if found else platform.machine()


def show(
    rows: Sequence[dict[str, Any]],
    path: str | None,
    kept: Sequence[dict[str, Any]] | None = None,
) -> None:
    """Prints rows as a table for a markdown page, and appends them to a JSON file.

    Args:
      rows: to be printed.
      path: of the file, if any.
      kept: what is appended in place of the rows.
    """
    columns = list(rows[0])
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for row in rows:
        cells = (f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values())
        print("| " + " | ".join(cells) + " |", flush=True)
    if path:
        about = machine()
        with open(path, "a") as file:
            for row in rows if kept is None else kept:
                file.write(json.dumps(about | row) + "\n")
