"""launch/tpu_vm.sh, run for real with stand-ins for gcloud and the VM's Python."""

import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLAGS = ("--", "--config=configs/quickstart.py", "--workdir=runs/my run")
REMINDER = "costs money until you delete it: launch/tpu_vm.sh delete --name=my-tpu"

# Stands in for gcloud: what ssh would do on the TPU VM happens in $HOME, scp copies to
# or from there, and the rest ends with $GCLOUD_STATUS.
GCLOUD = """#!/usr/bin/env bash
words=()
for word in "${@:5}"; do
  if [[ $word == --command=* ]]; then cd && exec bash -c "${word#*=}"; fi
  [[ $word == --* ]] || words+=("${word/#*:/$HOME/}")
done
[[ $4 != scp ]] || exec cp -r "${words[@]}"
exit "${GCLOUD_STATUS-1}"
"""

# Stands in for the VM's own Python: notes what it was told, and fails at $FAIL_AT.
PYTHON3 = """#!/usr/bin/env bash
echo "${PWD##*/}: $*" >>"$HOME/calls"
[[ ! ${FAIL_AT-} || $* != *"$FAIL_AT"* ]] || { echo 'no such package' >&2; exit 9; }
"""

# Of a run that will go on one second, in place of five, shows it; nor does `stop` wait
# for ten minutes.
TIMEOUT = """#!/usr/bin/env bash
seconds=${1/#5/${SHOWN_AFTER-5}}
exec "$REAL_TIMEOUT" "${seconds/#600/${WAITED-600}}" "${@:2}"
"""


class Vm:
    """A TPU VM on which a run of the clone's stand-in waits until it is stopped."""

    def __init__(self, clone: Path, home: Path, env: dict[str, str]):
        self.clone, self.home, self.env = clone, home, env
        self.python = home / "abe_jax/.venv/bin/python"

    def command(self, verb: str, *arguments: str) -> list[str]:
        script = str(self.clone / "launch/tpu_vm.sh")
        return [script, verb, "--name=my-tpu", "--zone=z", *arguments]

    def call(self, verb: str, *arguments: str, **env: str):
        return subprocess.run(
            self.command(verb, *arguments),
            capture_output=True,
            text=True,
            timeout=60,
            env={**self.env, **env},
        )

    def start(self, **env: str) -> None:
        done = self.call("run", *FLAGS, SHOWN_AFTER="1", **env)
        assert done.returncode == 0, done.stderr  # and has returned
        assert REMINDER in done.stderr
        wait_until(lambda: any("abe_jax.main" in line for line in self.log()))

    def log(self) -> list[str]:
        log = self.home / "abe_jax/run.log"
        return log.read_text().splitlines() if log.exists() else []


def wait_until(holds: Callable[[], object]) -> None:
    until = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.05)


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def vm(environment, tmp_path) -> Iterator[Vm]:
    """As `setup` leaves it."""
    shutil.copytree(ROOT / "launch", tmp_path / "clone/launch")
    executable(tmp_path / "bin/gcloud", GCLOUD)
    executable(tmp_path / "bin/python3", PYTHON3)
    executable(tmp_path / "bin/timeout", TIMEOUT)
    home = tmp_path / "home"
    env = {**environment, "HOME": str(home), "ROLES": "wait"}
    env["REAL_TIMEOUT"] = str(shutil.which("timeout"))
    env["PATH"] = f"{tmp_path}/bin:{env['PATH']}"
    vm = Vm(tmp_path / "clone", home, env)
    executable(vm.python, Path(environment["PYTHON"]).read_text())
    yield vm
    pid = home / "abe_jax/run.pid"
    if pid.exists():  # a test that failed may leave it
        subprocess.run(["kill", "-KILL", pid.read_text().strip()], capture_output=True)


def test_a_run_on_a_tpu_vm_outlives_the_connection(vm):
    earlier = vm.home / "abe_jax/stopped.pid"
    earlier.write_text("a number that may come again\n")
    vm.start()
    assert not earlier.exists()
    again = vm.call("run", *FLAGS)
    assert again.returncode == 1
    assert "a run is going on; stop it first." in again.stderr
    assert REMINDER in again.stderr
    stopped = vm.call("stop")
    assert stopped.returncode == 0
    assert REMINDER in stopped.stderr
    assert vm.log() == [
        "JAX_PLATFORMS=tpu,cpu",
        "-m abe_jax.main --distributed --config=configs/quickstart.py "
        "--workdir=runs/my run",
        "saved on SIGTERM",
    ]


def test_stop_without_a_run_says_so_and_is_no_failure(vm):
    for _ in "never run", "ended by itself":
        done = vm.call("stop")
        assert (done.returncode, done.stdout) == (0, "")
        said, reminder = done.stderr.splitlines()
        assert said == "launch: no run is going on."
        assert REMINDER in reminder
        assert vm.call("run", *FLAGS, ROLES="").returncode == 0


def test_stop_of_a_run_that_saves_for_long_says_so(vm):
    vm.start(SAVE_SECONDS="2")
    waited = vm.call("stop", WAITED="0.1")
    assert waited.returncode == 1
    assert "still saving; give stop again before delete." in waited.stderr
    assert vm.call("stop").returncode == 0
    assert vm.log()[-1] == "saved on SIGTERM"


@pytest.mark.slow
def test_stop_given_twice_signals_once(vm):
    """As gcloud does when the connection breaks; a second signal ends a save."""
    vm.start(SAVE_SECONDS="2")
    with subprocess.Popen(
        vm.command("stop"), env=vm.env, stderr=subprocess.DEVNULL
    ) as first:
        wait_until(lambda: vm.log()[-1] == "saved on SIGTERM")
        second = vm.call("stop")
        assert (second.returncode, first.wait(timeout=60)) == (0, 0)
    assert "no run is going on" not in second.stderr  # it waited
    assert vm.log().count("saved on SIGTERM") == 1


def test_a_run_that_ends_at_once_is_a_failure_with_its_log(vm):
    done = vm.call("run", *FLAGS, ROLES="fail")
    assert done.returncode == 7
    assert "the run has ended already; its log ends in:" in done.stderr
    assert done.stderr.splitlines()[-2] == "no luck"
    assert REMINDER in done.stderr.splitlines()[-1]
    assert vm.call("run", *FLAGS, ROLES="").returncode == 0  # done, and well


def test_a_run_needs_setup(vm):
    vm.python.unlink()
    done = vm.call("run", *FLAGS)
    assert done.returncode == 1
    said, reminder = done.stderr.splitlines()
    assert said == "launch: run setup first."
    assert REMINDER in reminder
    assert vm.log() == []


@pytest.mark.parametrize("status", ["0", "5"])
def test_create_reminds_of_the_costs_whatever_happens(vm, status):
    done = vm.call("create", "--type=v6e-8", GCLOUD_STATUS=status)
    assert done.returncode == int(status)
    made = "" if status == "0" else ", if it was made,"
    assert f"launch: my-tpu{made} {REMINDER}" in done.stderr


@pytest.fixture
def committed(vm) -> Vm:
    """Its clone has a commit, and a file that is not in it."""
    for name in ("abe_jax/new.py", "configs/new.py", "setup.py"):
        path = vm.clone / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("")
    git = ["git", "-c", "user.name=n", "-c", "user.email=e", "-C", str(vm.clone)]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *words], check=True, env=vm.env)
    (vm.clone / "abe_jax/uncommitted.py").write_text("")
    for name in ("abe_jax/old.py", "configs/old.py", "runs/kept"):
        path = vm.home / "abe_jax" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    return vm


def unpacked(vm: Vm) -> list[str]:
    folder = vm.home / "abe_jax"
    found = [str(path.relative_to(folder)) for path in folder.rglob("*.py")]
    return sorted(found)


OLD = ["abe_jax/old.py", "configs/old.py"]
NEW = ["abe_jax/new.py", "configs/new.py", "setup.py"]
CALLS = [
    "abe_jax: -m pip install --quiet --user uv",
    "abe_jax: -m uv venv --quiet --allow-existing --python=3.12 .venv",
    "abe_jax: -m uv pip install --quiet -e .[tpu]",
]


def test_setup_installs_the_last_commit_in_the_place_of_an_older_one(committed):
    done = committed.call("setup")
    assert (done.returncode, done.stderr) == (0, "")
    assert unpacked(committed) == NEW
    assert (committed.home / "abe_jax/runs/kept").exists()
    assert (committed.home / "calls").read_text().splitlines() == CALLS


@pytest.mark.parametrize("failing", range(len(CALLS)))
def test_setup_fails_with_what_fails_in_it(committed, failing):
    done = committed.call("setup", FAIL_AT=CALLS[failing].removeprefix("abe_jax: "))
    assert (done.returncode, done.stderr) == (9, "no such package\n")
    assert (committed.home / "calls").read_text().splitlines() == CALLS[: failing + 1]


@pytest.mark.slow
def test_setup_leaves_a_run_alone(committed):
    committed.start()
    refused = committed.call("setup")
    assert refused.returncode == 1
    assert refused.stderr == "launch: a run is going on; stop it first.\n"
    assert unpacked(committed) == OLD
    assert not (committed.home / "calls").exists()
    assert committed.call("stop").returncode == 0
    assert committed.call("setup").returncode == 0


def test_the_readme_s_copy_of_a_run_lands_where_it_says(vm, tmp_path):
    text = (ROOT / "launch/README.md").read_text().replace("\\\n", "")
    (command,) = re.findall(r"^    (.*tpu-vm scp .*)$", text, re.M)
    run = vm.home / "abe_jax/runs/tpu"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text("{}")
    here = tmp_path / "here"  # without a folder `runs`
    here.mkdir()
    for _ in "first", "again":
        subprocess.run(["bash", "-c", command], cwd=here, env=vm.env, check=True)
        files = [str(p.relative_to(here)) for p in here.rglob("*") if p.is_file()]
        assert files == ["runs/tpu/metrics.jsonl"]
