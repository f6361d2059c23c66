"""The formulas behind docs/scaling.md."""

import json
import math

import jax
import pytest
from benchmark import load
from command_line import ROOT
from flax import nnx
from ml_collections import ConfigDict

from abe_jax import models
from abe_jax.models.shapes import without_values

scaling = load("scaling")
V5E = scaling.MACHINES[0]


def abstract_model(trunk):
    config = ConfigDict(
        {
            "name": "abe",
            "trunk": trunk,
            "num_learners": scaling.LEARNERS,
            "embedding_dim": scaling.EMBEDDING_DIM,
            "width": 1.0,
        }
    )
    return without_values(lambda rngs: models.create(config, rngs=rngs))


def test_the_documentation_holds_what_the_script_prints(capsys):
    scaling.main([])
    assert (ROOT / "docs" / "scaling.md").read_text().endswith(capsys.readouterr().out)


def test_the_page_of_measurements_holds_what_the_script_prints():
    history = load("history")
    text = (ROOT / "docs" / "performance.md").read_text()
    assert text.endswith(history.page())
    assert len(text.splitlines()) - len(history.read()) < 80  # a page, and one table


def test_the_compiled_steps_are_the_committed_lines():
    text = (ROOT / "benchmarks" / "tpu_compile.jsonl").read_text()
    lines = list(map(json.loads, text.splitlines()))
    page = (ROOT / "docs" / "scaling.md").read_text()
    table = page[page.index("| program | images |") :].split("\n\n")[0]
    for row in table.splitlines()[2:]:
        program, images, memory, arithmetic, moved, main, *_ = row[2:].split(" | ")
        (line,) = (
            line
            for line in lines
            if line["commit"] in program.replace("*", "").split(", ")
            and program.replace("*", "").startswith(line["dtype"])
            and (line["program"], line["images a device"]) == ("step", int(images))
        )
        assert memory == f"{line['GiB']:.1f} GiB"
        assert main == f"{line['GB of main memory']:.1f} GB"
        # XLA counts the body of a loop, as of learners in turn, once.
        loop = "in turn" in program
        counted = line.get("GFLOP of products" if loop else "GFLOP")
        if counted is not None:  # not in the oldest line of learners in turn
            three_digits = float(format(counted, ".3g"))
            assert arithmetic == f"{three_digits:,.0f} GFLOP"
        if not loop:
            assert moved == f"{line['GB']:.1f} GB"


def test_the_steps_compiled_for_gpus_are_the_committed_lines():
    text = (ROOT / "benchmarks" / "tpu_compile.jsonl").read_text()
    lines = [line for line in map(json.loads, text.splitlines()) if not line["libtpu"]]
    page = (ROOT / "docs" / "scaling.md").read_text()
    _, section = page.split("## Compiled for GPUs, not run")
    table = section[section.index("| program | images |") :].split("\n\n")[0]
    rows = [row[2:].replace("*", "").split(" | ") for row in table.splitlines()[2:]]
    kept = [row for row in rows if "pooling's own gradient" not in row[0]]
    for program, images, memory, arithmetic, main, *times in kept:
        (line,) = (
            line
            for line in lines
            if program.split(", ")[-1] == line["commit"]
            and program.startswith(line["dtype"])
            and ("in turn" in program) == ("in turn" in line["model"])
            and (line["program"], line["size"]) == ("step", 224)
            and line["images a device"] == int(images)
        )
        products = float(format(line["GFLOP of products"], ".3g"))
        assert memory == f"{line['GiB']:.1f} GiB"
        assert arithmetic == f"{products:,.0f} GFLOP"
        assert main == f"{line['GB of main memory']:.1f} GB"
        of_memory = line["ms by main memory"]
        assert times == [
            f"{line['ms by products']:.1f} ms",
            f"{of_memory:.{1 if of_memory < 10 else 0}f} ms |",
        ]


def test_the_newest_of_each_benchmark_counts():
    history = load("history")
    run = {"benchmark": "train_step", "model": "ABE-8", "size": 64, "batch": 32}
    run |= {"dtype": "float32", "date": "d", "commit": None, "device": "c", "jax": "j"}
    lines = [
        run | {"images/s": 1.0},
        run | {"dtype": "bfloat16"},
        run | {"images/s": 2},
    ]
    newest = history.newest(lines)
    assert newest == lines[:0:-1]
    assert history.table(newest[:1]).splitlines()[2] == (
        "| train_step | ABE-8, 64 x 64, batch 32 | 2 images/s | d |  | c, j |"
    )


def test_constants_are_those_of_the_model():
    parameters = nnx.state(abstract_model("googlenet"), nnx.Param)
    assert scaling.PARAMETERS == sum(p.size for p in jax.tree.leaves(parameters))
    nodes = [node for _, node in nnx.iter_graph(abstract_model("googlenet_bn"))]
    layers = [node for node in nodes if isinstance(node, nnx.BatchNorm)]
    assert scaling.BATCH_NORM_LAYERS == len(layers)
    assert scaling.BATCH_NORM_CHANNELS == sum(layer.num_features for layer in layers)


@pytest.mark.parametrize("devices", [1, 2, 3, 8])
def test_ring_all_reduce_by_playing_it(devices):
    # Device d holds `devices` chunks; reduce-scatter, then all-gather, one hop a time.
    held = [[{d} for _ in range(devices)] for d in range(devices)]
    sent = [0] * devices
    for step in range(2 * (devices - 1)):
        moves = []
        for d in range(devices):
            chunk = (d - step) % devices
            moves.append(((d + 1) % devices, chunk, held[d][chunk]))
            sent[d] += 1
        for to, chunk, terms in moves:
            held[to][chunk] = held[to][chunk] | terms
    everything = set(range(devices))
    assert all(terms == everything for chunks in held for terms in chunks)
    size = 1200.0
    for chunks in sent:
        assert scaling.ring_all_reduce_bytes(size, devices) == pytest.approx(
            chunks * size / devices
        )
    assert scaling.ring_all_reduce_bytes(size, devices) == pytest.approx(
        2 * (devices - 1) / devices * size
    )


def test_all_reduce_time_by_hand():
    assert scaling.all_reduce_seconds(1e9, 1, V5E) == 0
    in_one_domain = scaling.all_reduce_seconds(1e9, 256, V5E)
    assert in_one_domain == pytest.approx(2 * 255 / 256 * 1e9 / 50e9 + 16 * 1e-6)
    across_four = scaling.all_reduce_seconds(1e9, 1024, V5E)
    own_share = 1e9 / 256
    assert across_four - in_one_domain == pytest.approx(
        2 * 3 / 4 * own_share / 3.125e9 + 4 * 1e-5
    )


def test_sizes_by_hand():
    assert scaling.gradient_bytes() == 48_188_160
    assert scaling.embedding_bytes(64) == 64 * 512 * 4
    assert scaling.label_bytes(64) == 256
    assert scaling.batch_norm_bytes(8) == 8 * 2 * 10_944 * 4
    # Rows of 8 learners' pair matrices, float32, on one of four devices.
    assert scaling.pair_bytes(256, 4) == scaling.PAIR_COPIES * 8 * 64 * 256 * 4


def test_a_step_is_the_sum_of_its_parts():
    operations, moved = scaling.compiled_image(*V5E.compiled)
    assert operations == pytest.approx(47.4e9, rel=1e-3)
    assert moved == pytest.approx(0.1995e9, rel=1e-3)
    rate = 0.15 * 819e9 / moved  # memory takes longer: 0.244 ms, arithmetic 0.241
    assert V5E.images_per_second(0.15) == pytest.approx(rate)
    batch, devices = 512, 8
    images = 64 / rate
    pairs = 6 * 64 * 512 * 512 * 6 / (197e12 * 0.15)
    summed = 48_188_160 + 512 * 512 * 4 + 512 * 4 / 2
    links = 2 * 7 / 8 * summed / 50e9 + (6 + 6 + 3) * 1e-6
    step = scaling.step_seconds(batch, devices, V5E, 0.15)
    assert step == pytest.approx(images + pairs + links)
    assert scaling.efficiency(batch, devices, V5E, 0.15) == pytest.approx(images / step)


@pytest.mark.parametrize("machine", scaling.MACHINES, ids=lambda machine: machine.name)
def test_more_devices_are_never_more_efficient(machine):
    for batch_of in (lambda n: 64 * n, lambda n: 4096):
        shares = [
            scaling.efficiency(batch_of(n), n, machine, 1.0) for n in scaling.DEVICES
        ]
        assert shares == sorted(shares, reverse=True)
        assert 0 < shares[-1] <= shares[0] <= 1


def test_what_the_documentation_concludes():
    accelerators = scaling.MACHINES[:-1]

    def shares(batch, devices):
        each = [scaling.efficiency(batch, devices, m, 1.0) for m in accelerators]
        return round(min(each), 2), round(max(each), 2)

    assert shares(65_536, 1024) == (0.63, 0.80)
    assert shares(64, 64) == (0.10, 0.19)
    assert shares(4096, 256) == (0.59, 0.74)
    assert scaling.gradient_bytes() / scaling.embedding_bytes(1) == pytest.approx(
        23_500, rel=0.002
    )
    h100 = accelerators[-1]
    step = scaling.step_seconds(65_536, 1024, h100, 1.0)
    assert scaling.batch_norm_seconds(1024, h100) > step
    of_peak = [
        m.images_per_second(1.0) * scaling.compiled_image(*m.compiled)[0] / m.peak
        for m in (V5E, h100)
    ]
    assert of_peak == pytest.approx([0.99, 0.30], abs=0.005)
    assert 938 * 6 * 4.09e9 / 156e12 == pytest.approx(0.15, abs=0.005)


def test_a_measurement_replaces_the_prediction(capsys):
    scaling.main(["--measured=v5e=64", "--measured=CPU=2"])
    printed = capsys.readouterr().out
    one_device = next(
        line for line in printed.splitlines() if line.startswith("| 1 | 1")
    )
    assert one_device.split(" | ")[1].startswith("1,000")  # ms for 64 images
    with pytest.raises(SystemExit, match="2"):
        scaling.main(["--measured=v9=1"])
    assert "'v9' is none of v5e, v5p, v6e" in capsys.readouterr().err


def test_digits():
    assert [scaling._digits(x) for x in (0, 0.00123, 0.5, 12.3, 1234.5)] == [
        "0",
        "0.00123",
        "0.500",
        "12.3",
        "1,234",
    ]
    assert scaling._digits(math.nan) == "-"


def test_collectives_of_a_compiled_program_are_counted():
    """By benchmarks/hlo_text.py, of a program for CPUs, whose form is alike."""
    hlo_text = load("hlo_text")
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.PartitionSpec("data")

    def program(x):
        gathered = jax.lax.all_gather(x, "data", tiled=True)  # [8, 16] float32
        return jax.lax.psum(x @ gathered.T, "data")  # [2, 8]

    mapped = jax.shard_map(program, mesh=mesh, in_specs=rows, out_specs=rows)
    compiled = jax.jit(mapped).lower(jax.numpy.ones((8, 16))).compile()
    found = hlo_text.collectives(compiled.as_text())
    assert found["all-gather"] == [8 * 16 * 4]
    assert found["all-reduce"] == [2 * 8 * 4]
    places = {each.where for each in hlo_text.instructions(compiled.as_text())}
    assert any("scaling_test.py:" in place for place in places)
