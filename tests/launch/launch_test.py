"""The scripts of launch/: checked, and what they would run or refuse to."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = ("command.sh", "gpu.sh", "local_processes.sh", "slurm.sbatch", "tpu_vm.sh")
FLAGS = ("--config=configs/quickstart.py", "--workdir=runs/my run")
MAIN = "-m abe_jax.main --config=configs/quickstart.py '--workdir=runs/my run'"
TPU = ("--name=my-tpu", "--zone=us-east5-a", "--dry_run")
DELETE = (
    "launch: my-tpu costs money until you delete it: "
    "launch/tpu_vm.sh delete --name=my-tpu --zone=us-east5-a"
)


@pytest.fixture
def environment() -> dict[str, str]:
    """Without what this machine may have set."""
    names = ("CUDA_", "JAX_", "PYTHON", "SLURM_", "XLA_")
    return {k: v for k, v in os.environ.items() if not k.startswith(names)}


def call(script, *arguments, env=None, cwd=ROOT) -> subprocess.CompletedProcess:
    return subprocess.run(
        [ROOT / "launch" / script, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=cwd,
        env=env,
    )


def test_all_scripts_are_tested():
    found = {p.name for p in (ROOT / "launch").iterdir() if p.suffix != ".md"}
    assert found == set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_bash_and_shellcheck_find_nothing(script):
    path = ROOT / "launch" / script
    assert path.read_text().startswith("#!/usr/bin/env bash\n")
    beside = Path(sys.executable).parent
    shellcheck = shutil.which("shellcheck", path=f"{beside}:{os.environ['PATH']}")
    assert shellcheck, "shellcheck is missing: pip install -e '.[test]'"
    for command in (["bash", "-n"], [shellcheck, "--external-sources"]):
        checked = subprocess.run(
            [*command, path], cwd=ROOT, capture_output=True, text=True
        )
        assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


@pytest.mark.parametrize("script", [s for s in SCRIPTS if s != "command.sh"])
def test_help_names_every_option(script):
    done = call(script, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    text = (ROOT / "launch" / script).read_text()
    options = re.findall(r"^    (--\w+).*;;$", text, re.M)
    assert {"--dry_run", "--help"} <= set(options)
    assert [option for option in options if option not in done.stdout] == []
    assert "abe_jax.main" in done.stdout
    assert "SBATCH --" not in done.stdout


@pytest.mark.parametrize("script", ["gpu.sh", "local_processes.sh", "tpu_vm.sh"])
def test_help_of_a_script_called_by_a_relative_path(script):
    done = subprocess.run(
        [f"./{script}", "--help"], cwd=ROOT / "launch", capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == call(script, "--help").stdout


CREATED = {
    ("--type=v6e-8",): (
        "tpu-vm create my-tpu --accelerator-type=v6e-8 --version=v2-alpha-tpuv6e"
    ),
    ("--type=v5litepod-64", "--spot", "--project=p", "--", "--tags=a"): (
        "tpu-vm create my-tpu --project=p --accelerator-type=v5litepod-64 --spot "
        "--version=v2-alpha-tpuv5-lite --tags=a"
    ),
    ("--type=v5p-16", "--queued"): (
        "queued-resources create my-tpu --node-id=my-tpu --accelerator-type=v5p-16 "
        "--runtime-version=v2-alpha-tpuv5"
    ),
    ("--type=v9-8", "--runtime_version=new"): (
        "tpu-vm create my-tpu --accelerator-type=v9-8 --version=new"
    ),
}


@pytest.mark.parametrize("arguments", CREATED, ids=" ".join)
def test_a_tpu_is_created_as_it_was_asked_for(arguments):
    done = call("tpu_vm.sh", "create", *TPU, *arguments)
    assert done.returncode == 0
    wanted = {"gcloud", "compute", "tpus", "--zone=us-east5-a"}
    assert set(done.stdout.split()) == wanted | set(CREATED[arguments].split())
    queued = "--queued" in arguments
    assert ("its state is ACTIVE" in done.stderr) == queued
    assert ("--queued" in done.stderr.splitlines()[-1]) == queued


@pytest.mark.parametrize("verb", ["create", "setup", "run", "logs", "stop", "delete"])
@pytest.mark.parametrize("queued", [False, True])
def test_every_verb_that_leaves_a_tpu_says_how_to_delete_it(verb, queued):
    options = {"create": ["--type=v6e-8"], "run": ["--", *FLAGS]}.get(verb, [])
    options = [*(["--queued"] if queued else []), *options]
    done = call("tpu_vm.sh", verb, *TPU, *options)
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert lines and all("my-tpu" in line for line in lines if "gcloud" in line)
    reminded = verb in ("create", "run", "stop")
    assert (DELETE in done.stderr) == reminded
    if verb == "delete":
        kind = "queued-resources delete" if queued else "tpu-vm delete"
        assert kind in lines[0]


def test_gpu_dry_run(environment):
    done = call("gpu.sh", "--dry_run", "--", *FLAGS, env=environment)
    assert done.stdout == f"env JAX_PLATFORMS=cuda,cpu python {MAIN}\n"
    done = call("gpu.sh", "--gpus=0,1", "--dry_run", "--", *FLAGS, env=environment)
    assert done.stdout == (
        f"env JAX_PLATFORMS=cuda,cpu CUDA_VISIBLE_DEVICES=0,1 python {MAIN}\n"
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("job", "cpus", "devices"),
    [
        ({}, 8, "JAX_PLATFORMS=cuda,cpu "),
        (
            {"SLURM_GPUS_ON_NODE": "4", "SLURM_NTASKS_PER_NODE": "4"},
            8,
            "JAX_PLATFORMS=cuda,cpu ",
        ),
        (
            {"SLURM_GPUS_ON_NODE": "4", "SLURM_NTASKS_PER_NODE": "1"},
            8,
            "JAX_PLATFORMS=cuda,cpu JAX_LOCAL_DEVICE_IDS=0,1,2,3 ",
        ),
        ({"SLURM_NTASKS_PER_NODE": "1", "SLURM_CPUS_PER_TASK": "64"}, 64, ""),
    ],
)
def test_slurm_dry_run(job, cpus, devices, environment):
    job = {"SLURM_JOB_ID": "1", **job} if job else {}
    env = {**environment, **job, "PYTHON": "python3"}
    done = call("slurm.sbatch", "--dry_run", "--", *FLAGS, env=env)
    main = MAIN.replace("main ", "main --distributed ")
    assert done.stdout == (
        f"srun --kill-on-bad-exit=1 --label --cpus-per-task={cpus} "
        f"env PYTHONUNBUFFERED=1 {devices}python3 {main}\n"
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("options", "shares"),
    [
        ((), ["JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=1"] * 2),
        (("--devices=4",), ["JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=4"] * 2),
        (
            ("--platform=gpu",),
            [
                "JAX_PLATFORMS=cuda,cpu CUDA_VISIBLE_DEVICES=2,3",
                "JAX_PLATFORMS=cuda,cpu CUDA_VISIBLE_DEVICES=4,5",
            ],
        ),
        (
            ("--platform=gpu", "--devices=1"),
            [
                "JAX_PLATFORMS=cuda,cpu CUDA_VISIBLE_DEVICES=2",
                "JAX_PLATFORMS=cuda,cpu CUDA_VISIBLE_DEVICES=3",
            ],
        ),
    ],
)
def test_local_processes_dry_run(options, shares, environment):
    env = {**environment, "CUDA_VISIBLE_DEVICES": "2,3,4,5"}
    options = ("--processes=2", "--port=29500", "--dry_run", *options)
    done = call("local_processes.sh", *options, "--", *FLAGS, env=env)
    assert done.stdout.splitlines() == [
        f"env PYTHONUNBUFFERED=1 {share} python {MAIN} "
        "--coordinator_address=127.0.0.1:29500 --num_processes=2 "
        f"--process_id={process}"
        for process, share in enumerate(shares)
    ]
    assert (done.returncode, done.stderr) == (0, "")


VERBS = "create, setup, run, logs, stop or delete"
NO_FLAGS = "no flags for abe_jax.main; they come after --."
UNKNOWN = (
    "--config=a.py is not an option here; --help lists them, and flags of "
    "abe_jax.main come after --."
)
MISTAKES = {
    ("tpu_vm.sh",): f"which verb? {VERBS}; --help tells more.",
    ("tpu_vm.sh", "make"): f"there is no verb make; use {VERBS}.",
    ("tpu_vm.sh", "logs", "--zone=z"): "logs needs --name=NAME, of the TPU.",
    ("tpu_vm.sh", "logs", "--name=n"): "logs needs --zone=ZONE, as us-east5-a.",
    ("tpu_vm.sh", "logs", "--name="): "--name needs a value: --name=VALUE.",
    ("tpu_vm.sh", "create", *TPU): "create needs --type=TYPE, as v6e-8.",
    ("tpu_vm.sh", "create", *TPU, "--type=v9-8"): (
        "no usual software is known for v9-8; give --runtime_version=NAME."
    ),
    ("tpu_vm.sh", "run", *TPU): NO_FLAGS,
    ("tpu_vm.sh", "run", *TPU, "--config=a.py"): UNKNOWN,
    ("tpu_vm.sh", "stop", *TPU, "--", "now"): "stop takes no flags after --.",
    ("gpu.sh", "--config=a.py"): UNKNOWN,
    ("gpu.sh", "--dry_run"): NO_FLAGS,
    ("gpu.sh", "--gpus", "--", "a"): (
        "--gpus is not an option here; --help lists them, and flags of abe_jax.main "
        "come after --."
    ),
    ("slurm.sbatch", "--config=a.py"): UNKNOWN,
    ("slurm.sbatch", "--dry_run", "--"): NO_FLAGS,
    ("slurm.sbatch", "--", "a"): (
        "not in a SLURM job; submit it: sbatch launch/slurm.sbatch -- FLAGS."
    ),
    ("local_processes.sh", "--", "a"): (
        "--processes is missing; say how many: --processes=2."
    ),
    ("local_processes.sh", "--processes=0", "--", "a"): (
        "--processes=0: it must be a whole number, 1 or more."
    ),
    ("local_processes.sh", "--processes=2"): NO_FLAGS,
    ("local_processes.sh", "--processes=2", "--platform=tpu"): (
        "--platform=tpu: it must be cpu or gpu."
    ),
    ("local_processes.sh", "--processes=3", "--platform=gpu", "--", "a"): (
        "2 GPUs are too few for 3 processes."
    ),
    (
        "local_processes.sh",
        "--processes=1",
        "--platform=gpu",
        "--devices=3",
        "--",
        "a",
    ): ("2 GPUs are too few for 1 processes."),
}


@pytest.mark.parametrize("arguments", MISTAKES, ids=" ".join)
def test_a_mistake_is_one_line(arguments, environment):
    done = call(*arguments, env={**environment, "CUDA_VISIBLE_DEVICES": "0,1"})
    assert done.stderr == f"launch: {MISTAKES[arguments]}\n"
    assert (done.returncode, done.stdout) == (2, "")


def test_slurm_refuses_what_jax_would_misread(environment, tmp_path):
    job = {"SLURM_JOB_ID": "1", "SLURM_GPUS_ON_NODE": "8", "SLURM_NTASKS_PER_NODE": "2"}
    done = call("slurm.sbatch", "--", "a", env={**environment, **job})
    assert (done.returncode, done.stderr) == (
        2,
        "launch: 2 processes for the 8 GPUs of a node; "
        "--ntasks-per-node must be 1 or 8.\n",
    )
    done = call("slurm.sbatch", "--dry_run", "--", "a", env=environment, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (
        2,
        "launch: call it from the root of the clone.\n",
    )


def test_the_readme_shows_commands_that_the_scripts_understand(environment):
    text = (ROOT / "launch" / "README.md").read_text().replace("\\\n", "")
    understood = []
    for line in re.findall(r"^    (.*)$", text, re.M):
        command = line.replace("PYTHON=.venv/bin/python ", "").split("  #")[0]
        if command.startswith("sbatch"):  # whose options SLURM reads
            command = command[command.index("launch/") :]
        elif command.startswith("tpu "):
            _, verb, *rest = command.split()
            command = " ".join(["launch/tpu_vm.sh", verb, *TPU, *rest])
        if command.startswith("launch/"):
            script, *arguments = command.removeprefix("launch/").split()
            arguments.insert(1 if script == "tpu_vm.sh" else 0, "--dry_run")
            done = call(script, *arguments, env=environment)
            assert done.returncode == 0, (command, done.stderr)
            assert done.stdout
            understood.append(script)
    assert sorted(set(understood)) == sorted(set(SCRIPTS) - {"command.sh"})
    assert understood.count("tpu_vm.sh") == 6
