"""Scripts for GPUs, SLURM and one machine, run with stand-ins for what they start."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLAGS = ("--config=configs/quickstart.py", "--workdir=runs/my run")


def call(script, *arguments, env) -> subprocess.CompletedProcess:
    return subprocess.run(
        [ROOT / "launch" / script, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        env=env,
    )


def test_gpu_runs(environment, tmp_path):
    listing = tmp_path / "nvidia-smi"
    listing.write_text("#!/usr/bin/env bash\necho 'GPU 0: of a test'\n")
    listing.chmod(0o755)
    env = {**environment, "PATH": f"{tmp_path}:{environment['PATH']}"}
    done = call("gpu.sh", "--gpus=0", "--", *FLAGS, env={**env, "ROLES": "fail"})
    assert done.stdout.splitlines() == [
        "GPU 0: of a test",
        "JAX_PLATFORMS=cuda,cpu CUDA_VISIBLE_DEVICES=0",
        "-m abe_jax.main --config=configs/quickstart.py --workdir=runs/my run",
    ]
    assert "costs money" in done.stderr
    assert done.returncode == 7


def test_a_slurm_job_ends_as_the_run_did(environment, tmp_path):
    """By that status SLURM knows a failure; of a preemption it knows by itself."""
    srun = tmp_path / "srun"
    srun.write_text(
        '#!/bin/sh\nwhile [ "${1#--}" != "$1" ]; do shift; done\nexec "$@"\n'
    )
    srun.chmod(0o755)
    job = {"SLURM_JOB_ID": "1", "SLURM_GPUS_ON_NODE": "2", "ROLES": "fail"}
    env = {**environment, **job, "PATH": f"{tmp_path}:{environment['PATH']}"}
    done = call("slurm.sbatch", "--", *FLAGS, env=env)
    assert done.stdout.splitlines() == [
        "JAX_PLATFORMS=cuda,cpu",
        "-m abe_jax.main --distributed --config=configs/quickstart.py "
        "--workdir=runs/my run",
    ]
    assert (done.returncode, done.stderr) == (7, "no luck\n")


def local_processes(count: int, *options: str) -> list[str]:
    script = str(ROOT / "launch" / "local_processes.sh")
    return [script, f"--processes={count}", *options, "--", *FLAGS]


def by_process(output: str) -> dict[str, list[str]]:
    lines = [line.split(" ", 1) for line in output.splitlines()]
    return {p: [rest for q, rest in lines if q == p] for p, _ in lines}


def test_every_line_names_its_process(environment):
    done = subprocess.run(
        local_processes(3, "--devices=4"),
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    told = by_process(done.stdout)
    assert sorted(told) == ["[0]", "[1]", "[2]"]
    addresses = set()
    for process, lines in told.items():
        assert lines[0] == "JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=4"
        assert lines[2] == "the last line"
        match = re.fullmatch(
            r"-m abe_jax\.main --config=configs/quickstart\.py --workdir=runs/my run "
            r"--coordinator_address=127\.0\.0\.1:(\d+) --num_processes=3 "
            r"--process_id=(\d)",
            lines[1],
        )
        assert match and f"[{match[2]}]" == process
        addresses.add(match[1])
    assert len(addresses) == 1


def test_a_failure_stops_the_others_and_is_the_status(environment):
    done = subprocess.run(
        local_processes(3),
        env={**environment, "ROLES": "wait,fail,wait"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 7
    told = by_process(done.stdout)
    assert told["[1]"][-1] == "no luck"
    assert told["[0]"][-1] == told["[2]"][-1] == "saved on SIGTERM"
    assert done.stderr == "launch: process 1 ended with status 7; stopping all\n"


@pytest.mark.parametrize("role", ["stubborn", "parent"])
def test_who_does_not_end_after_a_failure_is_killed_with_its_children(
    role, environment
):
    done = subprocess.run(
        local_processes(2, "--grace_seconds=1"),
        env={**environment, "ROLES": f"fail,{role}"},
        capture_output=True,
        text=True,
        timeout=300,  # the stubborn one sleeps for 600, and so do the children
    )
    assert done.returncode == 7
    assert by_process(done.stdout)["[1]"][-1] == "saved on SIGTERM"


def read_until(stream, wanted: int) -> list[str]:
    """Lines up to the `wanted`-th that shows that a process has begun to wait."""
    lines = []
    while sum("abe_jax.main" in line for line in lines) < wanted:
        line = stream.readline()
        assert line, lines
        lines.append(line)
    return lines


def test_sigterm_is_passed_on(environment):
    with subprocess.Popen(
        local_processes(2),
        env={**environment, "ROLES": "wait,wait"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as started:
        read_until(started.stdout, 2)
        started.send_signal(signal.SIGTERM)
        rest, _ = started.communicate(timeout=60)
    assert sorted(rest.splitlines()) == ["[0] saved on SIGTERM", "[1] saved on SIGTERM"]
    assert started.returncode == 128 + signal.SIGTERM


def test_a_lost_connection_is_told_once(environment):
    """It may send SIGHUP twice; a second SIGTERM would end the runs at once."""
    with subprocess.Popen(
        local_processes(2),
        env={**environment, "ROLES": "wait,wait", "SAVE_SECONDS": "3"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as started:
        read_until(started.stdout, 2)
        for _ in range(2):
            started.send_signal(signal.SIGHUP)
            time.sleep(1)
        rest, _ = started.communicate(timeout=60)
    assert sorted(rest.splitlines()) == ["[0] saved on SIGTERM", "[1] saved on SIGTERM"]
    assert started.returncode == 128 + signal.SIGTERM


def test_ctrl_c_reaches_each_process_once(environment):
    # On a terminal of its own, as for a person: the key signals a whole group.
    terminal, its_end = os.openpty()
    with subprocess.Popen(
        ["setsid", "--ctty", "--wait", *local_processes(2)],
        env={**environment, "ROLES": "wait,wait"},
        stdin=its_end,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as started:
        os.close(its_end)
        read_until(started.stdout, 2)
        os.write(terminal, b"\x03")
        rest, _ = started.communicate(timeout=60)
        os.close(terminal)
    assert sorted(rest.splitlines()) == ["[0] saved on SIGINT", "[1] saved on SIGINT"]
    assert started.returncode == 128 + signal.SIGINT
