"""Decoding processes end with the main one, and leave no shared memory behind."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from command_line import ROOT, SMALL, freeing_late, start

# Reads batches through two workers, until it is interrupted.
READS = """
import contextlib
import numpy as np
from absl import flags
from abe_jax import data, interrupts
from abe_jax.data import pipeline, samplers

class Source:
    labels = np.repeat(np.arange(8, dtype=np.int32), 8)
    class_names = tuple("abcdefgh")

    def __len__(self):
        return 64

    def __getitem__(self, index):
        return np.full((64, 64, 3), index, np.uint8)

def main():
    interrupts.wait_for_their_moment()  # as abe_jax.main does
    flags.FLAGS.mark_as_parsed()
    subset = pipeline.Subset(Source(), np.arange(64))
    sampler = samplers.create(
        subset.labels, name="classes", batch_size=16, images_per_class=4, seed=0
    )
    reading = data.Reading(num_workers=2)
    batches = data.train_batches(
        subset, sampler, start=0, stop=10**9, reading=reading
    )
    with contextlib.closing(batches), contextlib.suppress(KeyboardInterrupt):
        for _ in range(8):
            next(batches)
        print("reading", flush=True)
        while True:
            next(batches)

if __name__ == "__main__":
    main()
"""


@contextlib.contextmanager
def reading(tmp_path, text=READS):
    """The process above, in a session of its own, once both workers have given."""
    program = tmp_path / "program.py"
    program.write_text(text)
    process = subprocess.Popen(
        [sys.executable, str(program)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        assert process.stdout and process.stdout.readline() == "reading\n"
        assert len(members(process.pid)) == 4  # main, two workers, Python's tracker
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def members(session):
    """Numbers of the processes of a session that have not ended."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, of = path.read_text().rpartition(")")[2].split()[:4]
            if int(of) == session and state != "Z":
                found.append(int(path.parent.name))
    return found


def assert_all_end(session):
    """Within seconds: the last is Python's own, which clears away shared memory."""
    until = time.monotonic() + 120
    while members(session) and time.monotonic() < until:
        time.sleep(0.05)
    assert members(session) == []


def test_workers_end_with_a_main_process_that_is_killed(tmp_path):
    with reading(tmp_path) as process:
        process.kill()
        assert_all_end(process.pid)


@pytest.mark.parametrize("to_all", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_ctrl_c_leaves_nothing_behind(tmp_path, to_all):
    """To all processes, as a terminal sends it, and to the main process alone."""
    with reading(tmp_path) as process:
        (os.killpg if to_all else os.kill)(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=120)
        assert (process.returncode, errors) == (0, "")
        assert_all_end(process.pid)


def test_a_ctrl_c_leaves_no_memory_that_is_freed_late(tmp_path):
    with reading(tmp_path, freeing_late(0.05) + READS) as process:
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=120)
        assert (process.returncode, errors) == (0, "")


# Ctrl-C comes while memory is freed, where Python drops what is raised.
LOST = """
import gc, os, signal, sys, time
from abe_jax import interrupts

def _xla_gc_callback(*_):  # JAX's own is called so
    gc.callbacks.clear()
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(1)

class Freed:
    def __del__(self):
        _xla_gc_callback()

interrupts.wait_for_their_moment()
try:
    if sys.argv[1] == "callback":
        gc.callbacks.append(_xla_gc_callback)
        gc.collect()
    else:
        Freed()
    time.sleep(30)
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.parametrize("where", ["__del__", "callback"])
def test_a_ctrl_c_that_python_would_drop_comes_later(where):
    done = subprocess.run(
        [sys.executable, "-c", LOST, where], capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("interrupted\n", "")


@pytest.mark.slow
def test_training_with_workers_ends_without_a_word(tmp_path):
    own = ("--config.data.in_memory=False", "--config.data.num_workers=1")
    arguments = (*SMALL, *own, "--config.train.steps=2", f"--workdir={tmp_path}")
    process = start(*arguments, "--quiet", start_new_session=True)
    _, errors = process.communicate(timeout=300)
    assert (process.returncode, errors) == (0, "")


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, marks=pytest.mark.campaign),
        pytest.param(signal.SIGHUP, marks=pytest.mark.campaign),
    ],
)
def test_training_with_workers_is_interrupted_in_one_line(tmp_path, number):
    arguments = (*SMALL, "--config.train.steps=100000", "--config.data.num_workers=2")
    arguments += ("--config.data.in_memory=False",)
    arguments += ("--config.train.eval_every=100000", f"--workdir={tmp_path}")
    process = start(*arguments, start_new_session=True)
    try:
        metrics = tmp_path / "metrics.jsonl"
        until = time.monotonic() + 300
        while not (metrics.exists() and '"train/loss"' in metrics.read_text()):
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.05)
        os.killpg(process.pid, number)
        _, errors = process.communicate(timeout=120)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 128 + number
    assert "run the same command to go on" in errors.splitlines()[-1]
    for word in ("Traceback", "leaked", "Exception"):
        assert word not in errors
    assert_all_end(process.pid)
