"""What XLA makes of our programs for TPUs, compiled here without a TPU.

    pip install -e '.[tpu]'
    python benchmarks/tpu_compile.py --topology=v5e:2x2 --programs=embed,step
    python benchmarks/tpu_compile.py --batch=64 --dtype=bfloat16 --largest=20

Nothing is run. Of each program: seconds to compile, the memory it needs on a device and
whether that has as much, operations and bytes moved on a device by XLA's count, the
times that these would take at the chip's peaks, and collectives with their bytes. XLA's
bytes include what stays on the chip: read them as ratios between versions. A training
step at 224 x 224 compiles for minutes.
"""

import argparse
import collections
import dataclasses
import os
import pathlib
import re
import time
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # libtpu would look for a TPU

import abe_cases
import jax
import numpy as np
import scaling
import side_by_side
from flax import nnx
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from abe_jax import models, optimizer, parallel, train_step
from abe_jax.models.cpu import lowering
from abe_jax.retrieval import search

# Bytes/s of a chip's memory, from docs.cloud.google.com/tpu/docs/v5e, /v5p and /v6e.
BANDWIDTH = {"v5e": 819e9, "v5p": 2765e9, "v6e": 1640e9}
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2}
_BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
_COLLECTIVES = (
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all"),
    "collective-permute",
)
_SHAPE = re.compile(r"\b(\w+)\[([\d,]*)\]")
_INSTRUCTION = re.compile(
    r"^\s+(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<shape>\(.*?\)|\S+) (?P<op>[\w-]+)\("
)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One of an optimised program: its results' shapes and bytes, and its source."""

    name: str
    op: str
    shapes: tuple[str, ...]
    size: int
    where: str
    chain: str


def instructions(text: str, *, entry: bool = True) -> Iterator[Instruction]:
    """What an optimised HLO module does.

    Args:
      text: as `compiled.as_text()` gives it.
      entry: whether only what its entry computation does, in its order; or also what
        it calls, such as loops and fusions.
    """
    frames = _frames(text)
    start = text.index("\nENTRY ") if entry else 0
    for line in text[start:].splitlines()[1:]:
        found = _INSTRUCTION.match(line)
        if not found:
            continue
        shapes = _SHAPE.findall(found["shape"])
        sizes = [
            _BYTES.get(dtype, 0) * int(np.prod([int(n) for n in dims.split(",") if n]))
            for dtype, dims in shapes
        ]
        frame = re.search(r"stack_frame_id=(\d+)", line)
        chain = re.search(r'chain_id="(\d+)"', line)
        yield Instruction(
            name=found["name"],
            op=found["op"],
            shapes=tuple(f"{dtype}[{dims}]" for dtype, dims in shapes),
            # Of what starts a collective the shape is (operands, results).
            size=sum(sizes[len(sizes) // 2 :])
            if found["op"].endswith("-start")
            else sum(sizes),
            where=frames.get(frame[1], "") if frame else "",
            chain=chain[1] if chain else found["name"],
        )


def collectives(text: str) -> dict[str, tuple[int, int]]:
    """{operation: (how many, bytes of their results on a device)} of a module.

    For TPUs XLA cuts some into a chain of steps that run beside other work, and repeats
    the operation in each: a chain is one.
    """
    found: dict[str, tuple[int, int]] = {}
    chains = set()
    for each in instructions(text, entry=False):
        op = each.op.removesuffix("-start")
        if op in _COLLECTIVES and (op, each.chain) not in chains:
            chains.add((op, each.chain))
            count, size = found.get(op, (0, 0))
            found[op] = (count + 1, size + each.size)
    return found


def _frames(text: str) -> dict[str, str]:
    """{id of a stack frame: "file:line"} from the tables at the module's head."""
    tables: dict[str, dict[str, str]] = collections.defaultdict(dict)
    current = ""
    for line in text[: text.index("\nENTRY ")].splitlines():
        if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
            current = line
        elif found := re.match(r"(\d+) (.*)", line):
            tables[current][found[1]] = found[2]
    where = {}
    for frame, content in tables["StackFrames"].items():
        place = re.search(r"file_location_id=(\d+)", content)
        location = tables["FileLocations"].get(place[1], "") if place else ""
        file = re.search(r"file_name_id=(\d+)", location)
        line = re.search(r"\bline=(\d+)", location)
        if file and line:
            name = tables["FileNames"].get(file[1], "").strip('"')
            where[frame] = f"{name.split('abe_jax/')[-1]}:{line[1]}"
    return where


def _program(name: str, args: argparse.Namespace, devices: Any) -> tuple[Any, tuple]:
    """A jitted program, and the shapes of its arguments on these devices."""
    mesh = parallel.make_mesh(devices)
    if name == "retrieval":
        return _retrieval(tuple(mesh.devices.flat))
    number = args.batch * len(devices)
    fields = (args.learners, args.size, number, args.dtype, args.rematerialize)
    config = abe_cases.Case(*fields, args.trunk).config()
    model = models.create(config.model, rngs=nnx.Rngs(0))
    rows = NamedSharding(mesh, PartitionSpec(parallel.DATA_AXIS))
    shape = (number, args.size, args.size, 3)
    images = jax.ShapeDtypeStruct(shape, np.uint8, sharding=rows)
    if name == "embed":
        _, params, others = train_step.split_model(model)
        program = parallel.map_over_devices(
            train_step.make_embed_step(model, args.size), mesh, rows_out=True
        )
        return program, (parallel.abstract_replicated((params, others), mesh), images)
    optimiser, learning_rate = optimizer.create(config.train)
    program = parallel.map_over_devices(
        train_step.make_train_step(model, optimiser, learning_rate, config),
        mesh,
        donate_state=True,
    )
    state = train_step.initial_state(model, optimiser)
    labels = jax.ShapeDtypeStruct((number,), np.int32, sharding=rows)
    batch = {"image": images, "label": labels}
    return program, (parallel.abstract_replicated(state, mesh), batch)


def _retrieval(devices: tuple[Any, ...]) -> tuple[Any, tuple]:
    """A block of 2,048 queries against 131,072 rows a device, 11 nearest."""
    queries, rows, k = 2048, 131_072, 11
    mesh = jax.sharding.Mesh(np.asarray(devices), (search.AXIS,))
    same = NamedSharding(mesh, PartitionSpec())
    shards = NamedSharding(mesh, PartitionSpec(search.AXIS))

    def of(shape: tuple[int, ...], dtype: Any, sharding: Any = same) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    program = search._searcher(devices, 8192, k, jax.lax.Precision.HIGHEST)
    return program, (
        of((2,), np.int32),
        of((queries, abe_cases.EMBEDDING_DIM), np.float32),
        of((queries,), np.int32),
        of((queries, k), np.float32),
        of((queries, k), np.int32),
        of((rows * len(devices), abe_cases.EMBEDDING_DIM), np.float32, shards),
    )


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Compiles a program for a topology and reads what XLA says of it."""
    chip, shape = args.topology.split(":")
    topology = topologies.get_topology_desc(
        platform="tpu", topology_name=f"{chip}:{shape}"
    )
    program, arguments = _program(name, args, topology.devices)
    start = time.perf_counter()
    with lowering.plain_operations():
        lowered = program.lower(*arguments)
    traced = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - traced
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes
    kept += memory.temp_size_in_bytes - memory.alias_size_in_bytes
    machine = next(m for m in scaling.MACHINES if m.name == chip)
    text = compiled.as_text()
    found = collectives(text)
    if args.text:
        pathlib.Path(args.text).write_text(text)
    if args.largest:
        _show_largest(text, args.largest)
    return {
        "program": name,
        "model": "" if name == "retrieval" else f"ABE-{args.learners}, {args.trunk}",
        "topology": f"{args.topology}, {len(topology.devices)} chips",
        "images a device": "" if name == "retrieval" else args.batch,
        "size": "" if name == "retrieval" else args.size,
        "dtype": "float32" if name == "retrieval" else args.dtype,
        "trace s": traced - start,
        "compile s": seconds,
        "GiB": kept / 2**30,
        "fits": kept <= machine.memory,
        "GFLOP": cost["flops"] / 1e9,
        "GB": cost["bytes accessed"] / 1e9,
        "ms by FLOP": 1e3 * cost["flops"] / machine.peak,
        "ms by bytes": 1e3 * cost["bytes accessed"] / BANDWIDTH[chip],
        "collectives": ", ".join(
            f"{count} {op} ({size / 1e6:.2f} MB)" for op, (count, size) in found.items()
        ),
    }


def _show_largest(text: str, number: int) -> None:
    """Prints the largest results of the program, and copies and transposes by size."""
    lines = [i for i in instructions(text) if i.op not in ("parameter", "tuple")]
    lines.sort(key=lambda each: -each.size)
    moves = [i for i in lines if i.op in ("copy", "transpose", "copy-start")]
    for title, chosen in (("largest", lines), ("copies and transposes", moves)):
        print(f"{title}:")
        for each in chosen[:number]:
            shapes = ", ".join(each.shapes)
            print(f"  {each.size / 1e6:9.1f} MB  {each.op}  {shapes}  {each.where}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--topology", default="v5e:2x2", help="as v5p:2x2x1, v6e:16x16")
    parser.add_argument("--programs", default="step,embed,retrieval")
    parser.add_argument("--batch", type=int, default=16, help="images a device")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--learners", type=int, default=8)
    parser.add_argument("--trunk", default="googlenet")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rematerialize", action="store_true")
    parser.add_argument("--largest", type=int, default=0, help="results to list")
    parser.add_argument("--text", help="file for the last optimised program")
    parser.add_argument("--json", help="file to append the rows to")
    args = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    rows = [measure(name, args) for name in args.programs.split(",")]
    side_by_side.show(rows, args.json)


if __name__ == "__main__":
    main()
