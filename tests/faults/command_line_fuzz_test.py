"""Any command line is a clean success or one line that says what is wrong."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from abe_jax.workdir import fields
from configs import default

ROOT = pathlib.Path(__file__).parents[2]
NAMES = sorted(fields.flat(default.get_config()))


@pytest.fixture(scope="module")
def end_of(tmp_path_factory):
    """Gives exit status and standard error of a command line."""
    folder = tmp_path_factory.mktemp("lines")
    (folder / "typo.py").write_text(
        "from configs import quickstart\n"
        "def get_config():\n"
        "  c = quickstart.get_config()\n"
        "  with c.unlocked():\n"
        "    c.train.stepz = 5\n"
        "  return c\n"
    )
    (folder / "dict.py").write_text("def get_config():\n  return {'seed': 1}\n")
    (folder / "none.py").write_text("def get_config():\n  return None\n")
    (folder / "empty.py").write_text("")
    (folder / "broken.py").write_text("def get_config(:\n")
    (folder / "raises.py").write_text("def get_config():\n  return 1 / 0\n")
    (folder / "value.py").write_text("def get_config():\n  return float('x')\n")
    (folder / "folder.py").mkdir()
    (folder / "own.py").write_text(
        "from configs import quickstart\nget_config = quickstart.get_config\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, ROOT / "tests" / "faults" / "command_lines.py"],
        cwd=folder,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None

    def end(arguments):
        print(json.dumps(arguments), file=process.stdin, flush=True)
        return json.loads(process.stdout.readline())

    yield end
    process.stdin.close()
    process.wait()
    process.stdout.close()


def assert_clean(arguments, status, errors):
    lines = errors.splitlines()
    assert "Traceback" not in errors, (arguments, errors)
    assert status in (0, 1), (arguments, status, errors)
    if status:
        assert lines[-1].startswith("abe_jax: "), (arguments, errors)
        assert sum(line.startswith("abe_jax: ") for line in lines) == 1
        assert 20 < len(lines[-1]) < 600, (arguments, lines[-1])


REGRESSIONS = {
    "a folder": (["--config=folder.py", "--workdir=W"], "--config"),
    "a folder by name": (["--config=.", "--workdir=W"], "there is no file '.'"),
    "a typo": (["--config=typo.py", "--workdir=W"], "did you mean 'train.steps'"),
    "a dict": (["--config=dict.py", "--workdir=W"], "ConfigDict"),
    "no config": (["--config=none.py", "--workdir=W"], "ConfigDict"),
    "an empty file": (["--config=empty.py", "--workdir=W"], "get_config"),
    "no Python": (["--config=broken.py", "--workdir=W"], "invalid syntax"),
    "an error in it": (["--config=raises.py", "--workdir=W"], "division by zero"),
    "an argument it has no use for": (
        ["--config=own.py:argument", "--workdir=W"],
        "the file fails with TypeError: get_config() takes 0 positional arguments",
    ),
    "a value that is wrong in it": (
        ["--config=value.py", "--workdir=W"],
        "the file fails with ValueError: could not convert string to float: 'x'",
    ),
    "one K of a list": (
        ["--config=own.py", "--workdir=W", "--config.eval.recall_at[0]=5"],
        "eval.recall_at",
    ),
    "a section": (["--config=own.py", "--workdir=W", "--config.train=5"], "train"),
    "below a field": (["--config=own.py", "--workdir=W", "--config.seed.x=5"], "seed"),
    "no name": (["--config=own.py", "--workdir=W", "--config.=5"], "Could not parse"),
    "a huge seed": (
        ["--config=own.py", "--workdir=W", f"--config.seed={2**64}"],
        "seed is 18446744073709551616; it must be a whole number from 0",
    ),
    "a bucket": (["--config=own.py", "--workdir=gs://b/run"], "is a remote path"),
    "batch of 0": (
        ["--config=own.py", "--workdir=W", "--config.train.batch_size=0"],
        "train.batch_size is 0; it must be a whole number from 2",
    ),
    "never log": (
        ["--config=own.py", "--workdir=W", "--config.train.log_every=0"],
        "train.log_every is 0",
    ),
}


@pytest.mark.parametrize("name", REGRESSIONS)
def test_found_before(name, end_of):
    arguments, message = REGRESSIONS[name]
    status, errors = end_of(arguments)
    assert status == 1, errors
    assert_clean(arguments, status, errors)
    assert message in errors.splitlines()[-1]


def test_an_own_config_passes_in_any_order(end_of):
    arguments = ["--config.train.steps=3", "--workdir=W", "--config=own.py"]
    status, errors = end_of(arguments)
    assert status == 0, errors


NUMBERS = st.one_of(
    st.integers(-3, 70),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from([0, 1, 2, 4, 8, 16, 32, 0.5, 1e-3, 1e30]),
).map(str)
WORDS = st.one_of(
    st.sampled_from(
        "abe one_head googlenet googlenet_bn sgd adamw cosine step constant pairs "
        "classes birds image_folder sop shard_map pmap centre pad True False None "
        "true 1e5 (1,2) (1,) () [1,2] {} 0x10 1_000 / . .. ~ ~nobody/x".split()
    ),
    st.text(
        st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"),
        max_size=20,
    ),
)
FIELD = st.one_of(
    st.sampled_from(NAMES),
    st.sampled_from(NAMES).map(lambda name: name[:-1]),
    st.sampled_from(["train", "model", "", "train.", "eval.recall_at[0]", "a.b.c"]),
)
OVERRIDE = st.builds("--config.{}={}".format, FIELD, st.one_of(NUMBERS, WORDS))
OTHER = st.one_of(
    st.sampled_from(
        [
            *("--mode=train", "--mode=evaluate", "--mode=nothing", "--step=3", "--"),
            *("--step=x", "--workdir", "--config", "-config.seed=1", "--nodistributed"),
            *("--config=quickstart", "--config=quickstrat", "--config=typo.py"),
            *("--config=dict.py", "--workdir=/proc/x", "--workdir=~/x", "-v=1"),
            *("--process_id=1", "--config=own.py:argument", "--flagfile=none"),
        ]
    ),
    WORDS,
    WORDS.map(lambda word: f"--{word}"),
)
LINES = st.tuples(
    st.sampled_from([["--config=own.py", "--workdir=W"], ["--config=own.py"], []]),
    st.lists(OVERRIDE, max_size=3),
    st.lists(OTHER, max_size=1),
).map(lambda parts: [word for part in parts for word in part])


def fuzz(end_of, examples):
    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(LINES)
    def check(arguments):
        assert_clean(arguments, *end_of(arguments))

    check()


def test_any_command_line_ends_well(end_of):
    fuzz(end_of, 100)


@pytest.mark.campaign
def test_very_many_command_lines_end_well(end_of):
    fuzz(end_of, 1500)
