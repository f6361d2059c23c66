"""What XLA makes of our programs for TPUs and GPUs: what must not creep back into them.

By benchmarks/tpu_compile.py, in a small form: ABE-2 at 64 x 64, 4 images a device.
"""

import contextlib
import json
import os
import re
import subprocess
import sys

import pytest
from benchmark import load
from command_line import ROOT

BENCHMARKS = ROOT / "benchmarks"
hlo_text = load("hlo_text")

PARAMETERS = 9_844_800
EMBEDDING_DIM = 512

pytestmark = pytest.mark.tpu_compile


def start(folder, topology, programs, *options):
    """Has the programs compiled for a topology, in a process of its own."""
    # The CPU's flags of the other tests mean nothing here.
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # no chip is there to be shared
    command = [sys.executable, str(BENCHMARKS / "tpu_compile.py")]
    command += [f"--topology={topology}", f"--programs={','.join(programs)}"]
    command += ["--learners=2", "--size=64", "--batch=4", f"--text={folder}", *options]
    return subprocess.Popen([*command, f"--json={folder}/rows.jsonl"], env=environment)


def compiled(process, folder):
    """({program: its row}, {program: its text}) of what was started."""
    assert process.wait() == 0
    rows = map(json.loads, (folder / "rows.jsonl").read_text().splitlines())
    texts = {path.stem: path.read_text() for path in folder.glob("*.txt")}
    return {row["program"]: row for row in rows}, texts


@pytest.fixture(scope="module")
def all_compiled(tmp_path_factory):
    """What `compiled` gives, by name; side by side, as each keeps one core busy."""
    asked = {
        "four chips": ("v5e:2x2", ("step", "embed", "retrieval")),
        "256 chips": ("v5e:16x16", ("step",)),
        "in turn": ("v5e:2x2", ("step",), "--in_turn"),
        "GPUs": ("h100:1x1x8", ("step", "embed", "retrieval")),
        "GPUs, bfloat16": ("h100:1x1x8", ("step",), "--dtype=bfloat16"),
    }
    folders = {name: tmp_path_factory.mktemp("compiled") for name in asked}
    with contextlib.ExitStack() as stack:
        processes = {
            name: stack.enter_context(start(folders[name], *options))
            for name, options in asked.items()
        }
        return {name: compiled(processes[name], folders[name]) for name in asked}


@pytest.fixture(scope="module")
def four_chips(all_compiled):
    return all_compiled["four chips"]


def check_collectives_of_a_step(text, chips):
    *others, gradients = sorted(sum(hlo_text.collectives(text).values(), []))
    # All gradients are one sum. Embeddings are gathered once, and their cotangents
    # summed where they came from; labels and metrics are next to nothing.
    assert 4 * PARAMETERS <= gradients <= 4 * PARAMETERS + 1e4
    assert len(others) <= 4
    embeddings = 4 * chips * EMBEDDING_DIM * 4
    assert sum(others) <= 2 * embeddings + 1e4


@pytest.mark.parametrize("program", ["step", "embed", "retrieval"])
def test_neither_float64_nor_calls_of_the_host(four_chips, program):
    text = four_chips[1][program]
    assert not re.search(r"\bf64\[", text)
    assert not re.search(r"callback|infeed|outfeed|send\(|recv\(", text)


@pytest.mark.parametrize("name", ["four chips", "GPUs"])
def test_embedding_asks_nothing_of_other_chips(all_compiled, name):
    assert hlo_text.collectives(all_compiled[name][1]["embed"]) == {}


def test_retrieval_gathers_the_nearest_of_each_chip(four_chips):
    """Scores and indices of 11 rows for each of 2,048 queries, from four chips."""
    nearest = 2048 * 11 * 4 * 4
    assert hlo_text.collectives(four_chips[1]["retrieval"]) == {
        "all-gather": [nearest] * 2
    }


def test_what_a_step_says_to_other_chips(four_chips):
    check_collectives_of_a_step(four_chips[1]["step"], 4)


def test_a_step_of_256_chips(all_compiled):
    rows, texts = all_compiled["256 chips"]
    assert rows["step"]["topology"] == "v5e:16x16, 256 chips"
    check_collectives_of_a_step(texts["step"], 256)


def test_a_step_with_learners_in_turn(all_compiled):
    """A loop over learners forward, one backward; gradients are still one sum."""
    rows, texts = all_compiled["in turn"]
    text = texts["step"]
    check_collectives_of_a_step(text, 4)
    loops = [i for i in hlo_text.instructions(text) if i.op == "while"]
    assert len(loops) == 2
    check_bytes(rows["step"], "GB of main memory")


@pytest.mark.parametrize("name", ["GPUs", "GPUs, bfloat16"])
def test_what_eight_gpus_do(all_compiled, name):
    """XLA sums 30 MB of gradients at a time there; embeddings go with the labels."""
    rows, texts = all_compiled[name]
    sent = hlo_text.collectives(texts["step"])
    assert len(sent["all-reduce"]) == 2
    assert 4 * PARAMETERS <= sum(sent.pop("all-reduce")) <= 4 * PARAMETERS + 1e4
    embeddings, labels = 4 * 8 * EMBEDDING_DIM * 4, 4 * 8 * 4
    own = embeddings // 8
    assert sent == {"all-gather": [embeddings + labels], "reduce-scatter": [own]}
    # Pooling's gradient gathers: nothing is summed by atomic operations, in any order.
    assert not re.search(r" (select-and-)?scatter\(", texts["step"])
    for text in texts.values():
        assert not re.search(r"\bf64\[|callback|infeed|outfeed|send\(|recv\(", text)
    for row in rows.values():
        check_bytes(row, "GB of main memory")


@pytest.mark.parametrize("program", ["step", "embed", "retrieval"])
@pytest.mark.parametrize("count", ["GB", "GB of main memory"])
def test_bytes_are_those_of_the_committed_line(four_chips, program, count):
    check_bytes(four_chips[0][program], count)


def check_bytes(row, count):
    named = ("benchmark", "program", "model", "topology", "size", "dtype", "jax")
    named += ("images a device",)
    lines = map(json.loads, (BENCHMARKS / "tpu_compile.jsonl").read_text().splitlines())
    same = [
        line
        for line in lines
        if count in line and all(line.get(key) == row[key] for key in named)
    ]
    assert same, f"measure it for JAX {row['jax']} and commit the line"
    assert row[count] == pytest.approx(same[-1][count], rel=0.05)
