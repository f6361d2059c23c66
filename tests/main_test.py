"""The command line as users meet it: real processes, their output and exit status."""

import fcntl
import io
import json
import os
import pathlib
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest
from command_line import ROOT, SMALL, lines_of, run, start, without_times

import abe_jax
from abe_jax.command_line import print_line


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of eight steps that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    status, output, errors = run(
        *SMALL, f"--workdir={workdir}", "--config.train.steps=8"
    )
    assert status == 0, errors
    return workdir, output, errors


def test_training_prints_a_table_and_leaves_its_files(finished):
    workdir, output, errors = finished
    assert "untrained" in output and "step 8" in output
    for row in ("learner 0", "learner 1", "mean learner", "ensemble"):
        assert sum(line.startswith(row) for line in output.splitlines()) == 1
    assert "abe_jax: train on 1 cpu device\n" in errors
    assert re.search(r"all \d+ parameters of the model are new", errors)
    assert "step 8 of 8: loss" in errors and "images/s" in errors
    for name in ("config.json", "metrics.jsonl", "evaluation.json", "report.html"):
        assert (workdir / name).stat().st_size > 0
    assert list(workdir.glob("events.out.tfevents.*"))
    assert {p.name for p in (workdir / "checkpoints").iterdir()} >= {"4", "8"}
    assert "Traceback" not in errors and "Warning" not in errors


def test_metrics_are_those_promised(finished):
    workdir, _, _ = finished
    lines = lines_of(workdir)
    trained = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in trained] == [1, 2, 4, 6, 8]
    for line in trained:
        assert {"train/contrastive", "train/divergence"} <= set(line)
        assert line["train/images_per_second"] > 0
    evaluated = [line for line in lines if "eval/recall@1" in line]
    assert [line["step"] for line in evaluated] == [0, 4, 8]
    assert {"eval/learner_0/recall@1", "eval/learner_1/recall@8"} <= set(evaluated[0])


def test_evaluation_has_the_promised_fields(finished):
    workdir, _, _ = finished
    evaluation = json.loads((workdir / "evaluation.json").read_text())
    assert evaluation["step"] == 8
    assert evaluation["num_queries"] == evaluation["num_gallery"] == 4 * 8
    assert set(evaluation["recall"]) == {"1", "2", "4", "8"}
    assert len(evaluation["learners"]) == 2
    assert evaluation["protocol"]["split"] == "test"
    protocol = evaluation["protocol"]
    assert protocol["zero_shot"] is True
    assert protocol["version"] == abe_jax.__version__
    assert (protocol["model"], protocol["trunk"]) == ("abe", "vit_small_patch16")
    assert (protocol["pretrained"], protocol["dtype"]) == (None, "float32")
    assert protocol["freeze_batch_norm"] is False and protocol["num_learners"] == 2
    assert 0 <= evaluation["map_at_r"] <= 1


@pytest.mark.slow
def test_a_second_start_compiles_nothing(tmp_path):
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",  # as where users start it
        # JAX tells then which programs it compiles and which it finds.
        **{"JAX_EXPLAIN_CACHE_MISSES": "1", "JAX_LOG_COMPILES": "1"},
    }
    found = []
    for name in ("first", "second"):
        arguments = (f"--workdir={tmp_path / name}", "--config.train.steps=2")
        status, _, errors = run(*SMALL, *arguments, env=environment)
        assert status == 0, errors
        found.append(
            (
                errors.count("PERSISTENT COMPILATION CACHE MISS"),
                errors.count("Persistent compilation cache hit"),
            )
        )
    (compiled, _), (compiled_again, loaded) = found
    assert compiled > 10
    assert compiled_again == 0
    assert loaded >= compiled


def ensemble_row(output):
    return next(
        row for row in map(str.split, output.splitlines()) if row[:1] == ["ensemble"]
    )


@pytest.mark.slow
def test_evaluate_prints_what_training_printed(finished, tmp_path):
    finished_workdir, trained_output, _ = finished
    workdir = shutil.copytree(finished_workdir, tmp_path / "copy")
    before = json.loads((workdir / "evaluation.json").read_text())
    (workdir / "evaluation.json").unlink()
    arguments = (*SMALL, "--config.train.steps=8", f"--workdir={workdir}")
    status, output, errors = run(*arguments, "--mode=evaluate")
    assert status == 0, errors
    assert json.loads((workdir / "evaluation.json").read_text()) == before
    assert ensemble_row(trained_output)[-5:] == ensemble_row(output)[-5:]
    at_4 = [line for line in lines_of(workdir) if line["step"] == 4][-1]
    status, output, errors = run(*arguments, "--mode=evaluate", "--step=4")
    assert status == 0, errors
    assert f"{at_4['eval/recall@1']:.3f}" == ensemble_row(output)[1]
    # The workdir alone is enough, whatever its run was started with.
    alone = (f"--workdir={workdir}", "--mode=evaluate")
    status, output, errors = run(*alone, "--config.eval.recall_at=(1,3)")
    assert status == 0, errors
    assert [x for x in output.splitlines()[1].split() if "R@" in x] == ["R@1", "R@3"]
    status, _, errors = run(*arguments, "--mode=evaluate", "--step=5")
    assert status == 1
    assert "no checkpoint of step 5" in errors.splitlines()[-1]


@pytest.mark.slow
def test_a_finished_run_says_so_again(finished, tmp_path):
    finished_workdir, output, _ = finished
    workdir = shutil.copytree(finished_workdir, tmp_path / "copy")
    before = (workdir / "metrics.jsonl").read_text()
    for config in ([*SMALL, "--config.train.steps=8"], []):  # its own, too
        status, again, errors = run(*config, f"--workdir={workdir}", "--quiet")
        assert (status, errors) == (0, "")
        assert again.splitlines()[:6] == output.splitlines()[:6]
    assert (workdir / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, marks=pytest.mark.campaign),
        pytest.param(signal.SIGHUP, marks=pytest.mark.campaign),
    ],
)
def test_interrupted_run_goes_on_as_if_nothing_happened(finished, tmp_path, number):
    workdir = tmp_path / "run"
    arguments = (*SMALL, "--config.train.steps=8", f"--workdir={workdir}")
    process = start(*arguments)
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline:
        path = workdir / "metrics.jsonl"
        # The step is traced next, which takes far longer than a look at the file.
        if path.exists() and '"eval/map_at_r"' in path.read_text():
            break
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=400)
    assert process.returncode == 128 + number, errors
    assert "run the same command to go on" in errors.splitlines()[-1]
    assert "Traceback" not in errors
    status, output, errors = run(*arguments)
    assert status == 0, errors
    assert without_times(lines_of(workdir)) == without_times(lines_of(finished[0]))
    assert output.splitlines()[:6] == finished[1].splitlines()[:6]


@pytest.mark.slow
def test_killed_run_goes_on_from_the_last_checkpoint(finished, tmp_path):
    """As after a power cut: later checkpoints are gone, a metrics line is cut short."""
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints" / "8")
    text = (workdir / "metrics.jsonl").read_text()
    (workdir / "metrics.jsonl").write_text(text[:-20])
    status, output, errors = run(f"--workdir={workdir}", "--mode=dry_run")
    assert status == 0 and "8 steps from the first" in output, errors
    status, _, errors = run(f"--workdir={workdir}")
    assert status == 0, errors
    assert "resuming from the checkpoint of step 4" in errors
    assert without_times(lines_of(workdir)) == without_times(lines_of(finished[0]))


@pytest.mark.parametrize("command", [[sys.executable, "-m", "abe_jax.main"], None])
def test_help_lists_flags_and_modes(command):
    entry = pathlib.Path(sys.executable).parent / "abe-jax"
    if command is None and not entry.exists():
        pytest.fail("abe-jax is not installed beside this Python")
    result = subprocess.run(
        [*(command or [entry]), "--help"], capture_output=True, text=True, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
    for word in ("--config", "--workdir", "--mode", "--step", "train ", "evaluate "):
        assert sum(x.strip().startswith(word) for x in result.stdout.splitlines()) == 1


BAD = {
    "no workdir": (
        ["--config=configs/quickstart.py"],
        "--workdir is required; see --help",
    ),
    "no config": (["--workdir=W"], "holds no run to resume."),
    "no such config": (["--config=configs/no.py", "--workdir=W"], "configs/no.py"),
    "no config of this name": (
        ["--config=quickstrat", "--workdir=W"],
        "there is no file 'quickstrat'; did you mean --config=quickstart?",
    ),
    "override before it": (
        ["--config.train.stepz=3", *SMALL, "--workdir=W"],
        "the config has no field 'stepz'",
    ),
    "flag of another mode": (
        [*SMALL, "--workdir=W", "--step=3"],
        "--step is not for --mode=train",
    ),
    "no run, no config": (["--workdir=W", "--mode=evaluate"], "holds no run"),
    "unknown field": (
        [*SMALL, "--config.train.stepz=3", "--workdir=W"],
        "the config has no field 'stepz'. Did you mean \"steps\"",
    ),
    "wrong type": ([*SMALL, "--config.train.steps=many", "--workdir=W"], "many"),
    "unknown flag": ([*SMALL, "--wrokdir=W"], "wrokdir"),
    "unknown mode": ([*SMALL, "--workdir=W", "--mode=trian"], "trian"),
    "loose word": ([*SMALL, "--workdir=W", "train"], "unknown argument 'train'"),
    "no run": ([*SMALL, "--workdir=W", "--mode=evaluate"], "holds no run"),
    "D by M": (
        [*SMALL, "--workdir=W", "--config.model.embedding_dim=9"],
        "embedding_dim = 9 is not divisible by model.num_learners = 2",
    ),
    "K too large": (
        [
            *SMALL,
            "--workdir=W",
            "--config.data.sampler=classes",
            "--config.data.images_per_class=16",
            "--config.train.batch_size=32",
        ],
        "more than any class has; the largest has 8",
    ),
    "no folder": (
        [
            *SMALL,
            "--workdir=W",
            "--config.data.name=image_folder",
            "--config.data.path=/no/such/folder",
        ],
        "'/no/such/folder' does not exist",
    ),
    "optimizer": (
        [*SMALL, "--workdir=W", "--config.train.optimizer=adma"],
        "known are 'sgd', 'adamw'",
    ),
    "mapping": (
        [*SMALL, "--workdir=W", "--config.parallel.mapping=vmap"],
        "known are 'shard_map', 'pmap'",
    ),
}


# Those for which JAX is imported take seconds each; what they call is tested beside it.
LATE = ("no run", "D by M", "K too large", "no folder", "mapping")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(*BAD[name], id=name, marks=[pytest.mark.slow] * (name in LATE))
        for name in BAD
    ],
)
def test_mistakes_end_in_one_clear_line(tmp_path, arguments, message):
    arguments = [a.replace("=W", f"={tmp_path / 'run'}") for a in arguments]
    status, _, errors = run(*arguments)
    assert status == 1, errors
    assert message in errors.splitlines()[-1]
    assert "Traceback" not in errors
    assert not (tmp_path / "run" / "config.json").exists()  # it may be corrected


@pytest.mark.slow
def test_workdir_of_another_config_is_left_alone(finished, tmp_path):
    workdir = shutil.copytree(finished[0], tmp_path / "copy")
    before = (workdir / "metrics.jsonl").read_text()
    for mode, config in ("train", (*SMALL, "--config.train.steps=8")), ("evaluate", ()):
        status, _, errors = run(
            *config,
            f"--workdir={workdir}",
            "--config.loss.margin=0.5",
            f"--mode={mode}",
        )
        assert status == 1
        assert "loss.margin (there 1.0, now 0.5)" in errors.splitlines()[-1]
    assert (workdir / "metrics.jsonl").read_text() == before


def folder_config(photos, workdir):
    return [
        *SMALL,
        "--config.data.name=image_folder",
        f"--config.data.path={photos}",
        "--config.train.steps=2",
        f"--workdir={workdir}",
    ]


@pytest.mark.slow
def test_unreadable_image_is_named_and_nothing_is_lost(photos, tmp_path):
    folder = shutil.copytree(photos, tmp_path / "photos")
    # A test class: training must not fall over it before it is looked at.
    (folder / "class31" / "7.png").write_bytes(b"not an image")
    status, _, errors = run(*folder_config(folder, tmp_path / "run"))
    assert status == 1
    assert "class31/7.png as an image" in errors.splitlines()[-1]
    assert "Traceback" not in errors
    shutil.copy(folder / "class31" / "6.png", folder / "class31" / "7.png")
    status, output, errors = run(*folder_config(folder, tmp_path / "run"))
    assert status == 0, errors
    assert "ensemble" in output


@pytest.mark.slow
def test_diverging_loss_ends_the_run(tmp_path):
    status, _, errors = run(
        *SMALL[1:],
        "--config=tests/short.py",
        "--config.model.trunk=short",
        "--config.train.optimizer=sgd",
        "--config.train.learning_rate=1e30",
        "--config.train.warmup_steps=0",
        "--config.train.steps=8",
        f"--workdir={tmp_path / 'run'}",
    )
    assert status == 1
    assert "lower train.learning_rate" in errors.splitlines()[-1]


@pytest.mark.slow
def test_runs_where_stderr_is_a_terminal(tmp_path):
    """The bar shows images/s and the time left."""
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    process = subprocess.Popen(
        [
            sys.executable,
            *("-m", "abe_jax.main", *SMALL),
            *("--config.train.steps=2", f"--workdir={tmp_path / 'run'}"),
        ],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=child,
    )
    os.close(child)
    shown = b""
    while True:
        try:
            shown += os.read(parent, 4096)
        except OSError:
            break
    assert process.wait(timeout=60) == 0, shown.decode()
    assert "100%" in shown.decode() and "images/s" in shown.decode()


def test_the_help_of_prepare_is_short():
    status, output, _ = run("--help", module="abe_jax.prepare")
    assert status == 0 and len(output.splitlines()) < 20
    for name in ("dataset", "source", "data_dir", "size", "keep_original", "skip_bad"):
        assert f"--{name} " in output


def test_a_line_is_one_write_where_python_does_not_buffer(monkeypatch):
    """As in containers with PYTHONUNBUFFERED, where other threads write between two."""
    written = []

    class Raw(io.RawIOBase):
        def writable(self):
            return True

        def write(self, data):
            written.append(bytes(data))
            return len(data)

    unbuffered = io.TextIOWrapper(Raw(), write_through=True)  # type: ignore[arg-type]
    monkeypatch.setattr(sys, "stderr", unbuffered)
    print_line("one\nline")
    assert written == [b"abe_jax: one line\n"]
