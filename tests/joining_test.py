"""Processes that come together, wait, and lose each other; and what each may use."""

import concurrent.futures
import os
import shutil
import signal
import subprocess
import sys
import types

import numpy as np
import pytest
from command_line import (
    ROOT,
    SMALL,
    assert_left_alone,
    free_port,
    freeing_late,
    run,
)

from abe_jax import parallel, processes
from abe_jax.errors import UserError


def begin_alone(program, **environment):
    """Starts a few lines on this module: in a process of their own, as JAX is."""
    lines = "import os\nfrom abe_jax import processes\n" + program
    return subprocess.Popen(
        [sys.executable, "-c", lines],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "2", **environment},
    )


def called_alone(program, **environment):
    """Runs such lines to their end."""
    with begin_alone(program, **environment) as process:
        output, errors = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


JOIN = """
processes._START_SECONDS, processes._SILENT_SECONDS = {seconds}, 1
try:
    processes.join("127.0.0.1:{port}", 2, {index})
    print("joined", flush=True)
except processes.UserError as error:
    print(error, flush=True)
os._exit(0)
"""


@pytest.mark.parametrize("index", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_peers_that_never_come_are_one_line(index):
    """JAX ends such a process by abort(), with a page of C++."""
    port = free_port()
    ended = called_alone(JOIN.format(seconds=3, port=port, index=index))
    assert ended.returncode == 0, ended.stderr
    assert "the other processes did not come within 3 s; start all of" in ended.stdout
    assert f"each reaches 127.0.0.1:{port}" in ended.stdout
    assert f"other processes of the run, at 127.0.0.1:{port}" in ended.stderr


JOIN_AND_WAIT = """
import time
processes.join("127.0.0.1:{port}", 2, {index})
print("joined", flush=True)
time.sleep(60)
"""


def test_sigterm_is_the_systems_until_the_program_takes_it():
    """JAX takes it when processes join, and then nothing ends by it."""
    port = free_port()
    joined = [
        begin_alone(JOIN_AND_WAIT.format(port=port, index=index)) for index in range(2)
    ]
    try:
        assert [process.stdout.readline() for process in joined] == ["joined\n"] * 2
        joined[1].send_signal(signal.SIGTERM)
        assert joined[1].wait(timeout=120) == -signal.SIGTERM
    finally:
        for process in joined:
            process.kill()
            process.communicate()


GATHER = """
import sys
import numpy as np
processes.join("127.0.0.1:{port}", 2, {index})
try:
    while True:
        processes.gather(np.zeros(1))
        print("gathered", flush=True)
except Exception as error:
    sys.stderr.write(str(processes.explain(error)) + chr(10))
    sys.stderr.flush()
    os._exit(1)
"""


@pytest.mark.parametrize("dies", [0, 1])
def test_who_is_left_alone_says_so(dies):
    """JAX calls abort() where the coordinator is gone, which no exception tells."""
    port = free_port()
    two = [begin_alone(GATHER.format(port=port, index=index)) for index in range(2)]
    try:
        for process in two:
            assert "gathered\n" in process.stdout  # after what gloo prints
        two[dies].kill()
        _, errors = two[1 - dies].communicate(timeout=60)
    finally:
        for process in two:
            process.kill()
            process.communicate()
    assert two[1 - dies].returncode == 1
    assert_left_alone(errors)


ONE_FOLDER_FOR_ALL = """
import contextlib, pathlib
import jax.numpy as jnp
from abe_jax import parallel
from abe_jax.train import loop
processes.join("127.0.0.1:{port}", 2, {index})
state = parallel.replicate(jnp.ones(3), parallel.make_mesh())
print([shard.data.shape for shard in state.addressable_shards])
for name in ("shared", "own-{index}"):
    with contextlib.ExitStack() as stack:
        try:
            loop._lock_together(pathlib.Path("{folder}") / name, stack)
            print("locked")
        except processes.UserError as error:
            print(error)
"""


def test_state_and_workdir_of_two_processes_can_be_saved_together(tmp_path):
    """By processes of one device each; a workdir that is not shared is refused."""
    port = free_port()
    with concurrent.futures.ThreadPoolExecutor(2) as both:
        programs = [
            ONE_FOLDER_FOR_ALL.format(port=port, index=index, folder=tmp_path)
            for index in range(2)
        ]
        alone = {"JAX_NUM_CPU_DEVICES": "1"}
        ended = list(both.map(lambda program: called_alone(program, **alone), programs))
    for index, process in enumerate(ended):
        printed = process.stdout.splitlines()[-3:]  # after what gloo prints
        assert printed[:2] == ["[(3,)]", "locked"], process.stderr
        folder = f"--workdir={tmp_path / f'own-{index}'}"
        assert printed[2].startswith(f"{folder} is not one folder for all processes")
    assert [path.name for path in (tmp_path / "shared").iterdir()] == ["lock"]


ONE_RUN_FOR_ALL = """
import pytest
from tiny import replace_models
from abe_jax import train
from abe_jax.workdir import claim
from configs import quickstart
processes.join("127.0.0.1:{port}", 2, {index})
patch = pytest.MonkeyPatch()
replace_models(patch)
def go_on(*_):
    raise processes.UserError("the same for all")
patch.setattr(claim, "require_own", go_on)
own, other = "{index}", ("0", "other")[{index}]
for rate, data in (({index} + 1, own), (1, other), (1, own)):
    config = quickstart.get_config()
    config.data.update(name="image_folder", path="{folder}/" + data)
    config.data.update(images_per_class=4, num_threads={index} + 1)
    config.train.update(batch_size=16, learning_rate=float(rate))
    try:
        train.train_and_evaluate(config, "{folder}/run")
    except processes.UserError as error:
        print(error)
"""


def test_processes_of_other_configs_or_data_are_refused(photos, tmp_path):
    """But each may have the data in a place of its own, and read it as it likes."""
    for name in ("0", "1"):
        (tmp_path / name).symlink_to(photos)
    without_one = shutil.ignore_patterns("class00")
    shutil.copytree(photos, tmp_path / "other", ignore=without_one)
    port = free_port()
    with concurrent.futures.ThreadPoolExecutor(2) as both:
        programs = [
            ONE_RUN_FOR_ALL.format(port=port, index=index, folder=tmp_path)
            for index in range(2)
        ]
        tests = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
        ended = list(both.map(lambda program: called_alone(program, **tests), programs))
    for process in ended:
        assert process.stdout.splitlines()[-3:] == [  # after what gloo prints
            "processes 0 and 1 were started with different configs; give all of them "
            "the same.",
            "processes 0 and 1 see different data; give each the same at its "
            "data.path.",
            "the same for all",
        ], process.stderr
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock"]


def test_processes_of_unequal_numbers_of_devices_are_refused():
    places = [(0, 0), (1, 1), (1, 2)]
    devices = [types.SimpleNamespace(process_index=p, id=i) for p, i in places]
    with pytest.raises(UserError, match="but process 0 has 1, process 1 has 2; see"):
        parallel.make_mesh(devices)


def test_a_web_proxy_is_not_asked_for_the_other_processes():
    port = free_port()
    proxy = f"http://127.0.0.1:{free_port()}"
    environment = {"http_proxy": proxy, "https_proxy": proxy, "no_proxy": "a.example"}
    with concurrent.futures.ThreadPoolExecutor(2) as both:
        ended = list(
            both.map(
                lambda index: called_alone(
                    JOIN.format(seconds=60, port=port, index=index), **environment
                ),
                range(2),
            )
        )
    assert [process.stdout for process in ended] == ["joined\n"] * 2
    assert "proxy" not in ended[0].stderr + ended[1].stderr


@pytest.mark.parametrize(
    ("platforms", "reason"),
    [
        ("cuda", "JAX cannot use cuda here (no such plug-in); install its plug-in"),
        ("cuda,cpu", "JAX cannot use cuda here (it finds only cpu); install its"),
        ("gpu", "JAX cannot use gpu here (Unable to initialize backend"),
        ("tpu,cpu", "JAX cannot use tpu here (Unable to initialize backend 'tpu'"),
    ],
)
def test_a_device_that_is_not_there_is_one_line(platforms, reason, tmp_path):
    status, output, errors = run(
        *SMALL,
        f"--workdir={tmp_path / 'run'}",
        env={**os.environ, "JAX_PLATFORMS": platforms},
    )
    assert (status, output) == (1, "")
    assert reason in errors.splitlines()[-1]
    assert "Traceback" not in errors
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("--xla_cpu_use_fusion=1", "Unknown flag in XLA_FLAGS: --xla_cpu_use_fusion=1"),
        (
            "--xla_backend_optimization_level=many",
            "Couldn't interpret value many for flag xla_backend_optimization_level.",
        ),
    ],
)
def test_a_compiler_flag_that_is_none_is_one_line(flags, reason, tmp_path):
    environment = {**os.environ, "XLA_FLAGS": flags}
    status, _, errors = run(*SMALL, f"--workdir={tmp_path}", env=environment)
    assert status == 1
    assert errors == f"abe_jax: XLA does not take XLA_FLAGS={flags!r}: {reason}\n"


def test_the_devices_are_named():
    assert processes.describe_devices() == "8 cpu devices"
    ended = called_alone("print(processes.describe_devices())", JAX_NUM_CPU_DEVICES="1")
    assert ended.stdout == "1 cpu device\n"


def test_only_what_another_process_causes_is_put_down_to_it(monkeypatch):
    lost = ValueError("UNKNOWN: Gloo AllGather failed: Connection reset by peer")
    assert processes.explain(lost) is None  # there is no other
    monkeypatch.setattr("jax.distributed.is_initialized", lambda: True)
    assert "another process of this run ended" in str(processes.explain(lost))
    assert processes.explain(RuntimeError("INVALID_ARGUMENT: shapes")) is None
    memory = RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes.\nMore")
    assert str(processes.explain(memory)).startswith(
        "out of memory (RESOURCE_EXHAUSTED"
    )
    told = str(processes.explain(MemoryError()))
    assert "lower train.batch_size and give another --workdir" in told


ONE_OF_TWO = """
import atexit, builtins, sys
from absl import flags
from abe_jax import main
import jax
flags.FLAGS(["abe-jax", "--num_processes=2"])
jax.distributed.is_initialized = lambda: True
def fail(argv):
    raise getattr(builtins, sys.argv[2])(sys.argv[1])
atexit.register(print, "left Python's way")  # which waits for the other process
main._main = fail
main._guarded_main(["abe-jax"])
"""


@pytest.mark.parametrize(
    ("reason", "kind", "last"),
    [
        (
            "RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes.",
            "RuntimeError",
            "abe_jax: out of",
        ),
        (
            "INVALID_ARGUMENT: shapes",
            "RuntimeError",
            "RuntimeError: INVALID_ARGUMENT: shapes",
        ),
        (
            "Gloo AllGather failed: reset",
            "RuntimeError",
            "abe_jax: another process of this run",
        ),
        ("no such device", "OSError", "OSError: no such device"),
    ],
)
def test_an_error_of_one_of_several_processes_is_told_as_what_it_is(reason, kind, last):
    ended = subprocess.run(
        [sys.executable, "-c", ONE_OF_TWO, reason, kind],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith(last), ended.stderr
    assert ended.stdout == ""


HOLDS_SHARED_MEMORY = """
from absl import flags
from abe_jax import data, main
from abe_jax.errors import UserError
flags.FLAGS(["abe-jax", "--num_processes=2"])
SharedMemoryArray.enable_async_del()
def fail(argv):
    array = SharedMemoryArray((4,), "u1")
    array.unlink_on_del()
    raise UserError("a mistake")
main._main = fail
main._guarded_main(["abe-jax"])
"""


def test_one_of_several_processes_frees_shared_memory_when_it_fails():
    ended = called_alone(freeing_late(1) + HOLDS_SHARED_MEMORY)
    assert (ended.returncode, ended.stderr) == (1, "abe_jax: a mistake\n")


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
        (
            ["--num_processes=2", "--mode=embed", "--images=x", "--output=x.npz"],
            "--mode=embed is for one process, on all its devices",
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
    monkeypatch.setenv("no_grpc_proxy", "")
    with pytest.raises(UserError, match="did not find each other: coordinator_address"):
        processes.join(None, None, None)


def test_gathering_keeps_every_bit():
    values = np.array([0.1, 1e300])
    assert processes.gather(values).tolist() == [[0.1, 1e300]]
