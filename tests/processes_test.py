"""Two real processes on this machine: the same numbers, one death, a restart."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
from command_line import ROOT, SMALL, lines_of, run, start, without_times
from PIL import Image

from abe_jax import processes
from abe_jax.errors import UserError

# The quickstart's own size, for 20 steps.
STEPS = [
    "--config=configs/quickstart.py",
    "--config.train.steps=20",
    "--config.train.log_every=2",
    "--config.train.eval_every=10",
    "--config.train.checkpoint_every=4",
]


def run_on(devices, *arguments):
    """One process with so many fake devices."""
    process = start(*arguments, env={**os.environ, "JAX_NUM_CPU_DEVICES": str(devices)})
    output, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors
    return output


def run_two(*arguments):
    """Two processes with one device each, through the script that users have."""
    command = ["launch/local_processes.sh", "--processes=2", "--", *arguments]
    ended = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "PYTHON": sys.executable},
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def losses_of(workdir):
    """What training logged, which is the same to the last digit."""
    lines = without_times(lines_of(workdir))
    return [line for line in lines if "train/loss" in line]


def wait_for_step(workdir, step, running):
    until = time.monotonic() + 400
    while not (
        (workdir / "metrics.jsonl").exists()
        and any(line["step"] >= step for line in lines_of(workdir))
    ):
        assert all(process.poll() is None for process in running)
        assert time.monotonic() < until
        time.sleep(0.1)


@contextlib.contextmanager
def two_processes(*arguments):
    """Both of them, started by hand; none is left behind."""
    address = f"--coordinator_address=127.0.0.1:{free_port()}"
    two = [
        start(*arguments, address, "--num_processes=2", f"--process_id={index}")
        for index in range(2)
    ]
    try:
        yield two
    finally:
        for process in two:
            process.kill()
            process.communicate()


@pytest.mark.slow
def test_two_processes_are_as_one_through_death_and_restart(tmp_path):
    alone, pair = tmp_path / "alone", tmp_path / "pair"
    run_on(2, *STEPS, f"--workdir={alone}")
    expected = losses_of(alone)
    assert [line["step"] for line in expected] == [1, *range(2, 21, 2)]

    with two_processes(*STEPS, f"--workdir={pair}") as two:
        wait_for_step(pair, 10, two)
        two[1].kill()
        died = time.monotonic()
        _, errors = two[0].communicate(timeout=60)
        assert time.monotonic() - died < 60
        assert two[0].returncode == 1
    assert "another process of this run ended" in errors.splitlines()[-1]
    assert "Traceback" not in errors

    # The checkpoint of two processes is also that of one.
    joined = shutil.copytree(pair, tmp_path / "joined")
    output = run_two(*STEPS, f"--workdir={pair}")
    assert output.count("ensemble") == 1  # only the first process talks
    assert losses_of(pair) == expected
    run_on(2, *STEPS, f"--workdir={joined}")
    assert losses_of(joined) == expected


@pytest.mark.slow
def test_a_signal_to_one_process_ends_both_at_the_same_step(tmp_path):
    long = [*SMALL, f"--workdir={tmp_path}", "--config.train.steps=1000"]
    long += ["--config.train.eval_every=1000", "--config.train.checkpoint_every=1000"]
    with two_processes(*long) as two:
        wait_for_step(tmp_path, 2, two)
        two[1].send_signal(signal.SIGTERM)
        last = [process.communicate(timeout=60)[1].splitlines()[-1] for process in two]
        assert [process.returncode for process in two] == [128 + signal.SIGTERM] * 2
    assert last[0] == last[1]
    assert "is saved, run the same command to go on" in last[0]


@pytest.mark.slow
def test_evaluation_finds_the_same_on_any_devices_and_processes(tmp_path):
    folder = tmp_path / "patterns"
    rng = np.random.default_rng(0)
    for number in range(32):
        (folder / f"class{number:02}").mkdir(parents=True)
        pattern = rng.normal(128, 60, (32, 32, 3))
        for i in range(9 if number == 31 else 8):  # 129 test images divide by no number
            pixels = np.clip(pattern + rng.normal(0, 40, (32, 32, 3)), 0, 255)
            image = Image.fromarray(pixels.astype(np.uint8))
            image.save(folder / f"class{number:02}" / f"{i}.png")
    arguments = [
        *SMALL,
        "--config.data.name=image_folder",
        f"--config.data.path={folder}",
        # Enough that embeddings lie apart by far more than rounding.
        *("--config.model.width=0.1", "--config.train.learning_rate=0.002"),
        *("--config.train.steps=40", "--config.train.eval_every=40"),
        "--config.train.checkpoint_every=40",
    ]
    run_on(1, *arguments, f"--workdir={tmp_path / 'run'}")
    found = []
    for evaluate in (partial(run_on, 1), partial(run_on, 8), run_two):
        workdir = shutil.copytree(tmp_path / "run", tmp_path / f"run{len(found)}")
        evaluate(*arguments, f"--workdir={workdir}", "--mode=evaluate")
        found.append(json.loads((workdir / "evaluation.json").read_text()))
    assert found[0]["num_gallery"] == 129
    for other in found[1:]:
        assert other["num_queries"] == found[0]["num_queries"]
        assert other["recall"] == found[0]["recall"]
        np.testing.assert_allclose(other["map_at_r"], found[0]["map_at_r"], rtol=1e-12)
        for learner, same in zip(other["learners"], found[0]["learners"], strict=True):
            assert learner["recall"] == same["recall"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_processes=2"], "belong together; give all three, or --distributed"),
        (
            [
                "--coordinator_address=localhost:1",
                "--num_processes=2",
                "--process_id=2",
            ],
            "--process_id=2 is not one of 2 processes; they count from 0",
        ),
    ],
)
def test_mistakes(arguments, message, tmp_path):
    status, _, errors = run(*SMALL, f"--workdir={tmp_path}", *arguments)
    assert status == 1
    assert message in errors.splitlines()[-1]
    assert "Traceback" not in errors


def test_no_cluster_is_told(monkeypatch):
    def initialize(*arguments, **options):
        raise ValueError("coordinator_address should be defined.\nMore.")

    monkeypatch.setattr("jax.distributed.initialize", initialize)
    with pytest.raises(UserError, match="did not find each other: coordinator_address"):
        processes.join(None, None, None)


def test_gathering_keeps_every_bit():
    values = np.array([0.1, 1e300])
    assert processes.gather(values).tolist() == [[0.1, 1e300]]
