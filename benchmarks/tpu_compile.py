"""What XLA makes of our programs for TPUs, compiled here without a TPU.

    pip install -e '.[tpu-compile]'
    python benchmarks/tpu_compile.py --topology=v5e:2x2 --programs=embed,step
    python benchmarks/tpu_compile.py --batch=64 --dtype=bfloat16 --largest=20

Nothing is run. Of each program: seconds to compile, the memory it needs on a device and
whether that has as much, operations and bytes moved on a device, the times that these
would take at the chip's peaks, and collectives with their bytes. "GB" is XLA's count,
which includes what stays on the chip and what is copied there ahead of its use: read it
as a ratio between versions; "GB of main memory" is ours, from the program's text
(`hlo_text`). Both take a loop's body as run once. A training step at 224 x 224 compiles
for minutes.
"""

import argparse
import math
import os
import pathlib
import re
import time
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # libtpu would look for a TPU

import abe_cases
import hlo_text
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
_MEASURED = (
    *("trace s", "compile s", "GiB", "fits", "GFLOP", "GB", "GB of main memory"),
    *("ms by FLOP", "ms by GB", "ms by main memory", "collectives"),
)
# The parts of a training step, by the named scopes of its program.
_PARTS = ("augment", "spatial", "attention", "learners", "losses", "update")


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
    of_model = name != "retrieval"
    row = {
        "program": name,
        "model": f"ABE-{args.learners}, {args.trunk}" if of_model else "",
        "topology": f"{args.topology}, {len(topology.devices)} chips",
        "images a device": args.batch if of_model else "",
        "size": args.size if of_model else "",
        "dtype": args.dtype if of_model else "float32",
    }
    program, arguments = _program(name, args, topology.devices)
    start = time.perf_counter()
    with lowering.plain_operations():
        lowered = program.lower(*arguments)
    traced = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(f"{row}: {str(error).splitlines()[0]}")
        return row | dict.fromkeys(_MEASURED, math.nan) | {"fits": False}
    seconds = time.perf_counter() - traced
    text = compiled.as_text()
    if args.text:
        (pathlib.Path(args.text) / f"{name}.txt").write_text(text)
    if args.largest:
        _show_largest(text, args.largest)
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    needed = memory.argument_size_in_bytes + memory.output_size_in_bytes
    needed += memory.temp_size_in_bytes - memory.alias_size_in_bytes
    machine = next(m for m in scaling.MACHINES if m.name == chip)
    flop, by_xla = cost["flops"], cost["bytes accessed"]
    moved = sum(each.moved for each in hlo_text.instructions(text))
    found = hlo_text.collectives(text)
    measured = (
        *(traced - start, seconds, needed / 2**30, needed <= machine.memory),
        *(flop / 1e9, by_xla / 1e9, moved / 1e9),
        1e3 * flop / machine.peak,
        *(1e3 * size / BANDWIDTH[chip] for size in (by_xla, moved)),
        ", ".join(
            f"{len(sizes)} {op} ({sum(sizes) / 1e6:.2f} MB)"
            for op, sizes in found.items()
        ),
    )
    return row | dict(zip(_MEASURED, measured, strict=True))


def _show_largest(text: str, number: int) -> None:
    """Prints where bytes are moved, and the largest results, copies and transposes."""
    for title, key in (
        ("moved by part", _part),
        ("moved by source line", lambda each: f"{each.op}  {each.where}"),
    ):
        print(f"{title}:")
        for name, size in list(hlo_text.bytes_by(text, key).items())[:number]:
            print(f"  {size / 1e6:9.1f} MB  {name}")
    lines = [i for i in hlo_text.instructions(text) if i.moved]
    lines.sort(key=lambda each: -each.size)
    moves = [i for i in lines if i.op in ("copy", "transpose", "copy-start")]
    for title, chosen in (("largest", lines), ("copies and transposes", moves)):
        print(f"{title}:")
        for each in chosen[:number]:
            shapes = ", ".join(each.shapes)
            print(f"  {each.size / 1e6:9.1f} MB  {each.op}  {shapes}  {each.where}")


def _part(each: hlo_text.Instruction) -> str:
    found = re.search("|".join(_PARTS), each.scope)
    backward = ", backward" if "transpose(" in each.scope else ""
    return found[0] + backward if found else f"other: {each.op}"


def largest_batch(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of ever closer batches, a device's, around the largest that fits.

    The first is `args.batch`; then it is doubled while it fits, and halved between
    what fits and what does not, in steps of eight images.
    """
    rows, fits, too_large, batch = [], 0, 0, args.batch
    while True:
        rows.append(measure(name, argparse.Namespace(**{**vars(args), "batch": batch})))
        print(f"{batch} images: {rows[-1]['GiB']:.2f} GiB", flush=True)
        if rows[-1]["fits"]:
            fits = batch
        else:
            too_large = batch
        if too_large and too_large - fits <= 8:
            return rows
        batch = (fits + too_large) // 16 * 8 if too_large else 2 * fits


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
    parser.add_argument("--fit", action="store_true", help="find the largest batch")
    parser.add_argument("--largest", type=int, default=0, help="results to list")
    parser.add_argument("--text", help="folder for the optimised programs")
    parser.add_argument("--json", help="file to append the rows to")
    args = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    rows = []
    for name in args.programs.split(","):
        rows += largest_batch(name, args) if args.fit else [measure(name, args)]
    side_by_side.show(rows, args.json)


if __name__ == "__main__":
    main()
