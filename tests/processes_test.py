"""Two real processes on this machine: the same numbers, one death, a restart."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import jax
import numpy as np
import pytest
from command_line import (
    ROOT,
    SMALL,
    assert_left_alone,
    free_port,
    lines_of,
    run,
    start,
    without_times,
)
from PIL import Image

from abe_jax import processes
from abe_jax.errors import UserError


def run_on(devices, *arguments):
    """One process with so many fake devices."""
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices)}
    status, output, errors = run(*arguments, env=environment)
    assert status == 0, errors
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


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(
            ["--config=tests/short.py", *SMALL[1:], "--config.model.trunk=short_bn"],
            marks=pytest.mark.slow,
        ),
        pytest.param(["--config=configs/quickstart.py"], marks=pytest.mark.campaign),
    ],
    ids=["small", "quickstart"],
)
def test_two_processes_are_as_one_through_death_and_restart(model, tmp_path):
    alone, pair = tmp_path / "alone", tmp_path / "pair"
    steps = [*model, "--config.train.steps=20", "--config.train.log_every=2"]
    steps += ["--config.train.eval_every=10", "--config.train.checkpoint_every=4"]
    run_on(2, *steps, f"--workdir={alone}")
    expected = losses_of(alone)
    assert [line["step"] for line in expected] == [1, *range(2, 21, 2)]

    with two_processes(*steps, f"--workdir={pair}") as two:
        wait_for_step(pair, 10, two)
        two[1].kill()
        _, errors = two[0].communicate(timeout=60)
        assert two[0].returncode == 1
    assert_left_alone(errors)

    # The checkpoint of two processes is also that of one.
    joined = shutil.copytree(pair, tmp_path / "joined")
    output = run_two(*steps, f"--workdir={pair}")
    assert output.count("ensemble   ") == 1  # only the first process talks
    assert losses_of(pair) == expected
    run_on(2, *steps, f"--workdir={joined}")
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
def test_two_processes_keep_the_outputs_of_the_frozen_s_of_a_run(tmp_path):
    small, trained = (*SMALL, "--config.train.steps=4"), tmp_path / "one_head"
    run_on(2, *small, "--config.model.name=one_head", f"--workdir={trained}")
    found = []
    for name, run_it in {"alone": partial(run_on, 2), "pair": run_two}.items():
        run_it(
            *small,
            *("--config.model.train=heads", f"--config.model.pretrained={trained}"),
            *("--config.augment.crop=centre", "--config.augment.flip=0"),
            *("--config.augment.brightness=0", "--config.augment.contrast=0"),
            f"--config.data.feature_cache={tmp_path / name / 'cache'}",
            f"--workdir={tmp_path / name / 'run'}",
        )
        found.append(losses_of(tmp_path / name / "run"))
        assert len(list((tmp_path / name / "cache").iterdir())) == 1
    assert found[0] == found[1] and len(found[0]) == 3


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
        for name in ("mask_correlation", "self_cosine", "shared_errors"):
            np.testing.assert_allclose(
                *(
                    np.array(jax.tree.leaves(e["diversity"][name]))
                    for e in (other, found[0])
                ),
                atol=1e-4,
            )


@pytest.mark.campaign
def test_death_of_the_coordinator_ends_the_others_in_one_line(tmp_path):
    alone, pair = tmp_path / "alone", tmp_path / "pair"
    small = (*SMALL, "--config.train.steps=100", "--config.train.eval_every=100")
    run_on(2, *small, f"--workdir={alone}")
    with two_processes(*small, f"--workdir={pair}") as two:
        wait_for_step(pair, 10, two)
        two[0].kill()
        _, errors = two[1].communicate(timeout=60)
        assert two[1].returncode == 1
    assert_left_alone(errors)
    run_two(*small, f"--workdir={pair}")
    assert losses_of(pair) == losses_of(alone)


@pytest.mark.campaign
def test_sigterm_ends_an_evaluation_of_several_processes_at_once(tmp_path):
    """JAX's own handler only takes note of it."""
    arguments = (*SMALL, "--config.train.steps=4", f"--workdir={tmp_path}")
    run_on(2, *arguments)
    with two_processes(*arguments, "--mode=evaluate") as two:
        begun = "evaluate on 2 cpu devices, 2 processes"
        assert any(begun in line for line in two[0].stderr)
        for process in two:
            process.send_signal(signal.SIGTERM)
        for process in two:
            process.communicate(timeout=120)
        assert two[0].returncode == -signal.SIGTERM
        assert two[1].returncode in (-signal.SIGTERM, 1)  # or lost the other first


@pytest.mark.parametrize(
    "address", ["localhost", "localhost:", ":12345", "h:abc", "127.0.0.1:99999"]
)
def test_what_is_no_address_is_told(address):
    with pytest.raises(UserError, match=f"={address} is no address; give HOST:PORT"):
        processes.join(address, 1, 0)
