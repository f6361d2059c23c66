"""Two real processes on this machine: the same numbers, one death, a restart."""

import concurrent.futures
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


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(SMALL, marks=pytest.mark.slow),
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
        died = time.monotonic()
        _, errors = two[0].communicate(timeout=60)
        assert time.monotonic() - died < 60
        assert two[0].returncode == 1
    assert "another process of this run ended" in errors.splitlines()[-1]
    assert "Traceback" not in errors

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
def test_two_processes_keep_the_outputs_of_a_frozen_s(tmp_path):
    found = []
    for name, run_it in {"alone": partial(run_on, 2), "pair": run_two}.items():
        run_it(
            *SMALL,
            *("--config.train.steps=4", "--config.model.train=heads"),
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


@pytest.mark.campaign
def test_death_of_the_coordinator_ends_the_others_in_one_line(tmp_path):
    alone, pair = tmp_path / "alone", tmp_path / "pair"
    small = (*SMALL, "--config.train.steps=100", "--config.train.eval_every=100")
    run_on(2, *small, f"--workdir={alone}")
    with two_processes(*small, f"--workdir={pair}") as two:
        wait_for_step(pair, 10, two)
        two[0].kill()
        died = time.monotonic()
        _, errors = two[1].communicate(timeout=60)
        assert time.monotonic() - died < 60
        assert two[1].returncode == 1
    assert "another process of this run ended" in errors.splitlines()[-1]
    assert "Traceback" not in errors
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
            process.communicate(timeout=20)
        assert two[0].returncode == -signal.SIGTERM
        assert two[1].returncode in (-signal.SIGTERM, 1)  # or lost the other first


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
        assert joined[1].wait(timeout=20) == -signal.SIGTERM
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
    print(processes.explain(error), file=sys.stderr, flush=True)
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
    assert "another process of this run ended" in errors.splitlines()[-1]


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
    assert "lower train.batch_size" in str(processes.explain(MemoryError()))


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
    monkeypatch.setenv("no_grpc_proxy", "")
    with pytest.raises(UserError, match="did not find each other: coordinator_address"):
        processes.join(None, None, None)


def test_gathering_keeps_every_bit():
    values = np.array([0.1, 1e300])
    assert processes.gather(values).tolist() == [[0.1, 1e300]]
