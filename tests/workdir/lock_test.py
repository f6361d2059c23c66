"""One run at a time in a workdir; death lets go of it."""

import subprocess
import sys

import pytest

from abe_jax.errors import UserError
from abe_jax.workdir import lock

# Holds the folder that it is given, in another process, until it is killed.
HOLD = """
import multiprocessing, pathlib, sys, time
from abe_jax.workdir import lock

def work():
    time.sleep(60)

with lock.hold(pathlib.Path(sys.argv[1])):
    worker = multiprocessing.get_context("fork").Process(target=work)
    worker.start()
    print(worker.pid, flush=True)
    time.sleep(60)
"""


def test_a_second_run_is_refused_until_the_first_is_dead(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    worker = None
    try:
        worker = int(holder.stdout.readline())
        with pytest.raises(
            UserError, match=f"another run is training.*{holder.pid} on"
        ):
            with lock.hold(tmp_path):
                pass
        holder.kill()
        holder.wait()
        # Its worker is still there, and keeps nobody out.
        with lock.hold(tmp_path):
            pass
    finally:
        holder.stdout.close()
        holder.kill()
        holder.wait()
        if worker is not None:
            subprocess.run(["kill", "-9", str(worker)], check=False)


def test_the_folder_is_made_and_free_again_after_use(tmp_path):
    for _ in range(2):
        with lock.hold(tmp_path / "runs" / "one"):
            assert (tmp_path / "runs" / "one" / "lock").exists()


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, caplog):
    def no_locks(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.lockf", no_locks)
    with lock.hold(tmp_path):
        assert "cannot be locked" in caplog.text
