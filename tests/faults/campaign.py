"""Kills a real training run at seeded moments, and shows what is left of it.

    python tests/faults/campaign.py --runs=10 --kills=3 --terms=2

Each run is a shortened quickstart in processes of its own. It is killed a few times,
started again by the same command after each, and must end as a run that nothing
disturbed: parameters, optimiser state and metrics bit for bit. With the arguments above
30 SIGKILLs and 20 SIGTERMs; --devices=4 and --processes=2 for the other two rows of the
table in docs/reliability.md. The last line printed is that row.
"""

import argparse
import contextlib
import hashlib
import json
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable

sys.path[:0] = [str(pathlib.Path(__file__).parents[n]) for n in (1, 2)]

from command_line import SMALL, free_port, lines_of, without_times  # noqa: E402

from abe_jax import host_memory  # noqa: E402

STEPS = 40
_PATIENCE = 900  # seconds

# Moments of a run, in the order in which they come.
MOMENTS = ("start", "first evaluation", "step", "save", "evaluation", "page", "end")


class Child:
    """A process of a run, forked from this one, which has all imports done."""

    def __init__(self, arguments: list[str], log: pathlib.Path, devices: int):
        self.log = log
        self.status: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            _become_a_run(arguments, log, devices)

    def poll(self) -> int | None:
        """Its exit status, negative for a signal; None while it runs."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status

    def wait(self, seconds: float = _PATIENCE) -> int:
        until = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > until:
                self.send(signal.SIGKILL)
                raise TimeoutError(self.log.read_text()[-2000:])
            time.sleep(0.01)
        assert self.status is not None
        return self.status

    def send(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def _become_a_run(arguments: list[str], log: pathlib.Path, devices: int) -> None:
    """Does what `python -m abe_jax.main` does, and never returns."""
    status = 1
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        import jax

        from abe_jax import main

        jax.config.update("jax_num_cpu_devices", devices)
        sys.argv = ["abe-jax", *arguments]
        try:
            main.run()
            status = 0
        except SystemExit as ended:
            status = int(ended.code or 0)
        if status == 0:  # as at Python's own end: the coordinator waits for the others
            jax.distributed.shutdown()
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


class Run:
    """A run in a folder: one process or two, started again and again."""

    def __init__(self, folder: pathlib.Path, devices: int, processes: int):
        self.workdir = folder / "run"
        self._folder = folder
        self._devices = devices
        self._processes = processes
        self._starts = 0
        self.children: list[Child] = []

    def start(self) -> None:
        self._starts += 1
        command = [*SMALL, f"--config.train.steps={STEPS}", f"--workdir={self.workdir}"]
        self.children = []
        address = f"--coordinator_address=127.0.0.1:{free_port()}"
        for index in range(self._processes):
            own = [address, f"--num_processes={self._processes}"]
            own.append(f"--process_id={index}")
            arguments = command + own if self._processes > 1 else command
            log = self._folder / f"log.{self._starts}.{index}"
            self.children.append(Child(arguments, log, self._devices))

    def wait(self) -> list[int]:
        return [child.wait() for child in self.children]

    def logs(self) -> str:
        return "\n".join(child.log.read_text() for child in self.children)


def fingerprint(run: Run) -> dict:
    """What a finished run left: hashes of its state, and its metrics without times."""
    reader, writer = os.pipe()
    pid = os.fork()  # this process must not touch a device, as its children do
    if pid == 0:
        from abe_jax.workdir import checkpoints

        # Without an end for the threads, which a fork has none of.
        with contextlib.suppress(BaseException):
            saved = checkpoints.Checkpoints(run.workdir, read_only=True)
            state = saved.restore_as_stored(STEPS)
            os.write(writer, json.dumps(_hashes(state)).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        text = file.read()
    os.waitpid(pid, 0)
    return {**json.loads(text), "metrics": without_times(lines_of(run.workdir))}


def _hashes(state: dict) -> dict[str, str]:
    import jax

    return {
        part: hashlib.sha256(
            b"".join(leaf.tobytes() for leaf in jax.tree.leaves(state[part]))
        ).hexdigest()
        for part in ("step", "params", "model_state", "opt_state")
    }


def _when(moment: str, run: Run, rng: random.Random, seconds_to_start: float):
    """A test that becomes true at a moment, and how long to wait from there."""
    metrics = run.workdir / "metrics.jsonl"
    folder = run.workdir / "checkpoints"
    page = run.workdir / "report.html"
    began = time.time()

    def logged(words: str) -> Callable[[], bool]:
        size = metrics.stat().st_size if metrics.exists() else 0
        return lambda: (
            metrics.exists()
            and metrics.stat().st_size > size
            and words in metrics.read_text()[max(size - 1, 0) :]
        )

    if moment == "start":
        return (lambda: True), rng.uniform(0, seconds_to_start)
    if moment == "first evaluation":
        return (run.workdir / "lock").exists, rng.uniform(0, 0.5 * seconds_to_start)
    if moment == "save":
        return (lambda: any(folder.glob("*tmp*"))), rng.uniform(0, 0.03)
    if moment == "page":
        return (lambda: page.exists() and page.stat().st_mtime > began), rng.uniform(
            0, 0.02
        )
    if moment == "evaluation":
        return logged('"train/'), rng.uniform(0.0, 0.5)
    if moment == "end":
        return (folder / str(STEPS)).exists, rng.uniform(0, 0.5)
    return logged("train/loss"), rng.uniform(0, 0.1)


def disturb(
    run: Run, number: int, moment: str, rng: random.Random, seconds_to_start: float
) -> str:
    """Starts a run and sends it a signal at a moment; says what became of it.

    SIGKILL goes to all processes, as if the power failed; every third time to one of
    several only, which the others must notice. SIGTERM goes to one.
    """
    run.start()
    reached, delay = _when(moment, run, rng, seconds_to_start)
    until = time.monotonic() + _PATIENCE
    while not reached() and run.children[0].poll() is None:
        assert time.monotonic() < until, run.logs()
        time.sleep(0.002)
    time.sleep(delay)
    alone = number == signal.SIGTERM or rng.random() < 1 / 3
    hit = [rng.choice(run.children)] if alone else run.children
    for child in hit:
        child.send(number)
    statuses = run.wait()
    logs = run.logs()
    assert "Traceback" not in logs, logs
    if statuses == [0] * len(statuses):
        return "over before it came"
    if number == signal.SIGTERM and all(s == 128 + number for s in statuses):
        assert "is saved, run the same command to go on" in logs, logs
        return "saved and ended"
    # Before the loop nothing is there to be saved, and SIGTERM ends it at once.
    assert all(s in (-number, 128 + number, 1) for s in statuses), (statuses, logs)
    return "ended"


def campaign(
    folder: pathlib.Path,
    *,
    runs: int,
    kills: int,
    terms: int,
    devices: int = 1,
    processes: int = 1,
    seed: int = 0,
    log: Callable[[str], None] = print,
) -> dict[str, int]:
    """Disturbs `runs` runs, each `kills` + `terms` times; all must end the same.

    Returns:
      how often each signal met what: "SIGKILL ended", "SIGTERM saved and ended", ...
    """
    # Imported once, for all children; what names the cache is read then.
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    import abe_jax.evaluate
    import abe_jax.train  # noqa: F401

    rng = random.Random(seed)
    undisturbed = Run(folder / "undisturbed", devices, processes)
    for _ in range(2):  # the first compiles
        shutil.rmtree(folder / "undisturbed", ignore_errors=True)
        (folder / "undisturbed").mkdir(parents=True)
        began = time.monotonic()
        undisturbed.start()
        assert undisturbed.wait() == [0] * processes, undisturbed.logs()
        seconds = time.monotonic() - began
    want = fingerprint(undisturbed)
    log(f"an undisturbed run takes {seconds:.0f} s")
    outcomes: dict[str, int] = {}
    signals = [signal.SIGKILL] * kills + [signal.SIGTERM] * terms
    for number in range(runs):
        place = folder / f"run{number}"
        place.mkdir()
        run = Run(place, devices, processes)
        rng.shuffle(signals)
        # In the order of a run's life: after the end nothing can be disturbed.
        moments = sorted(
            (MOMENTS[(number + i) % len(MOMENTS)] for i in range(len(signals))),
            key=lambda moment: (moment != "start") + (moment == "end"),
        )
        for sent, moment in zip(signals, moments, strict=True):
            outcome = disturb(run, sent, moment, rng, seconds / 2)
            name = f"{signal.Signals(sent).name} {outcome}"
            outcomes[name] = outcomes.get(name, 0) + 1
            log(f"run {number}: {signal.Signals(sent).name} at {moment}: {outcome}")
        run.start()
        assert run.wait() == [0] * processes, run.logs()
        assert fingerprint(run) == want, f"run {number} ended otherwise"
        log(f"run {number} ended bit for bit as the undisturbed one")
        shutil.rmtree(place)
    return outcomes


def main() -> None:
    host_memory.use_large_pages()  # before abe_jax.main does, in each child
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--kills", type=int, default=3, help="SIGKILLs a run")
    parser.add_argument("--terms", type=int, default=2, help="SIGTERMs a run")
    parser.add_argument("--devices", type=int, default=1, help="fake ones, a process")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args())
    with tempfile.TemporaryDirectory(prefix="abe_jax-faults-") as folder:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{folder}/compiled")
        outcomes = campaign(
            pathlib.Path(folder), log=lambda text: print(text, flush=True), **options
        )
    found = ", ".join(f"{count} {name}" for name, count in sorted(outcomes.items()))
    where = f"{options['processes']} process(es), {options['devices']} device(s) each"
    print(f"| {where} | {options['runs']} of {options['runs']} | {found} |")


if __name__ == "__main__":
    main()
