"""The scripts of launch/, run for real with stand-ins for Python and gcloud."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLAGS = ("--config=configs/quickstart.py", "--workdir=runs/my run")

# Stands in for Python: says what it was told, and behaves as the environment asks.
STAND_IN = f"""#!{sys.executable}
import os, signal, sys, time
process = sys.argv[-1].removeprefix("--process_id=")
roles = os.environ.get("ROLES", ",,").split(",")
role = roles[int(process) if process.isdigit() else 0]

def save(number, _):
    print("saved on", signal.Signals(number).name, flush=True)
    time.sleep(0.5)  # in which a second signal would show
    if role != "stubborn":
        sys.exit(128 + number)

signal.signal(signal.SIGINT, save)
signal.signal(signal.SIGTERM, save)
ready = os.path.join(os.path.dirname(__file__), "ready")
if process.isdigit():
    open(ready + process, "w").close()
names = "JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES", "CUDA_VISIBLE_DEVICES"
print(*[name + "=" + os.environ[name] for name in names if name in os.environ])
print(*sys.argv[1:], flush=True)
if role == "fail":
    for other in range(len(roles) if process.isdigit() else 0):
        while not os.path.exists(ready + str(other)):
            time.sleep(0.01)
    print("no luck", file=sys.stderr)
    sys.exit(7)
if role in ("wait", "stubborn"):
    time.sleep(600)
print("the last line")
"""


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    """Without what this machine may have set, and with the stand-in as $PYTHON."""
    stand_in = tmp_path / "python"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    names = ("CUDA_", "JAX_", "SLURM_", "XLA_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(names)}
    return {**kept, "PYTHON": str(stand_in)}


def call(script, *arguments, env) -> subprocess.CompletedProcess:
    return subprocess.run(
        [ROOT / "launch" / script, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
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


def test_who_does_not_end_after_a_failure_is_killed(environment):
    done = subprocess.run(
        local_processes(2, "--grace_seconds=1"),
        env={**environment, "ROLES": "fail,stubborn"},
        capture_output=True,
        text=True,
        timeout=300,  # the stubborn one sleeps for 600
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


# Stands in for gcloud: what ssh would do on the TPU VM happens in $HOME.
GCLOUD = """#!/usr/bin/env bash
for word in "$@"; do
  if [[ $word == --command=* ]]; then cd && exec bash -c "${word#*=}"; fi
done
exit 1
"""


def test_a_run_on_a_tpu_vm_outlives_the_connection(environment, tmp_path):
    home = tmp_path / "home"
    binaries = home / "abe_jax" / ".venv" / "bin"
    binaries.mkdir(parents=True)
    shutil.copy(environment["PYTHON"], binaries / "python")
    gcloud = tmp_path / "gcloud"
    gcloud.write_text(GCLOUD)
    gcloud.chmod(0o755)
    env = {**environment, "HOME": str(home), "ROLES": "wait"}
    env["PATH"] = f"{tmp_path}:{env['PATH']}"
    where = ("--name=my-tpu", "--zone=us-east5-a")

    def verb(name, *arguments):
        return call("tpu_vm.sh", name, *where, *arguments, env=env)

    assert verb("run", "--", *FLAGS).returncode == 0  # and has returned
    log = home / "abe_jax" / "run.log"
    until = time.monotonic() + 60
    while not (log.exists() and "abe_jax.main" in log.read_text()):
        assert time.monotonic() < until
        time.sleep(0.05)
    again = verb("run", "--", *FLAGS)
    assert again.returncode == 1
    assert "a run is going on; stop it first." in again.stderr
    assert "costs money" not in again.stderr
    stopped = verb("stop")
    assert stopped.returncode == 0
    assert "costs money until you delete it" in stopped.stderr
    assert log.read_text().splitlines() == [
        "JAX_PLATFORMS=tpu,cpu",
        "-m abe_jax.main --distributed --config=configs/quickstart.py "
        "--workdir=runs/my run",
        "saved on SIGTERM",
    ]
    assert verb("stop").returncode == 1  # there is none any more
