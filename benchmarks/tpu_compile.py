"""What XLA makes of our programs for TPUs and GPUs, compiled here without them.

    pip install -e '.[tpu-compile]'
    python benchmarks/tpu_compile.py --topology=v5e:2x2 --programs=embed,step
    python benchmarks/tpu_compile.py --batch=64 --dtype=bfloat16 --largest=20
    python benchmarks/tpu_compile.py --programs=step --batch=64 --in_turn
    python benchmarks/tpu_compile.py --topology=h100:1x1x8 --programs=step --batch=64

Nothing is run. Of each program: seconds to compile, the memory it needs on a device and
whether that has as much, operations and bytes moved on a device, the times that these
would take at the chip's peaks, and collectives with their bytes. "GB" is XLA's count,
which includes what stays on the chip and what is copied there ahead of its use: read it
as a ratio between versions; "GB of main memory" is ours, from the program's text
(`hlo_text`). XLA's counts take a loop's body, as of learners in turn, as run once; ours
do not: "GFLOP of products" are those of convolutions and matrix products as traced, as
XLA without those with padding. A training step at 224 x 224 compiles for minutes.

Topologies of H100s are slices x hosts x GPUs. For them XLA counts nothing, and tries no
algorithms out, as it would on a GPU: cuDNN's memory is unknown, and matrix products are
left to cuBLAS.
"""

import argparse
import math
import os
import pathlib
import re
import time
from importlib import metadata
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # libtpu would look for a TPU

import abe_cases
import hlo_text
import jax
import model_sizes
import numpy as np
import scaling
import side_by_side
from flax import nnx
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from abe_jax import models, parallel, train_step
from abe_jax.models import lowering
from abe_jax.retrieval import search

_MACHINES = {machine.name.lower(): machine for machine in scaling.MACHINES}
_WITHOUT_A_GPU = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
_RETRIEVAL = "retrieval"  # the program that is of no model
# The parts of a training step, by the named scopes of its program.
_PARTS = ("augment", "spatial", "attention", "learners", "losses", "update")


def _program(name: str, args: argparse.Namespace, devices: Any) -> tuple[Any, tuple]:
    """A jitted program, and the shapes of its arguments on these devices."""
    mesh = parallel.make_mesh(devices)
    if name == _RETRIEVAL:
        return _retrieval(tuple(mesh.devices.flat))
    number = args.batch * len(devices)
    fields = (args.learners, args.size, number, args.dtype, args.rematerialize)
    config = abe_cases.Case(*fields, args.trunk, args.in_turn).config()
    rows = NamedSharding(mesh, PartitionSpec(parallel.DATA_AXIS))
    shape = (number, args.size, args.size, 3)
    images = jax.ShapeDtypeStruct(shape, np.uint8, sharding=rows)
    if name == "embed":
        model = models.create(config.model, rngs=nnx.Rngs(0))
        _, params, others = train_step.split_model(model)
        program = parallel.map_over_devices(
            train_step.make_embed_step(model, args.size), mesh, rows_out=True
        )
        return program, (parallel.abstract_replicated((params, others), mesh), images)
    program, state = abe_cases.training(config, mesh)
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
    chip = args.topology.partition(":")[0]
    on_gpus = chip == "h100"
    topology = _topology(args.topology)
    program, arguments = _program(name, args, topology.devices)
    start = time.perf_counter()
    with lowering.operations_of("gpu" if on_gpus else "tpu"):
        trace = program.trace(*arguments)
        lowered = trace.lower()
    traced = time.perf_counter()
    compiled = lowered.compile(_WITHOUT_A_GPU if on_gpus else None)
    seconds = time.perf_counter() - traced
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    flops, accessed = cost.get("flops", math.nan), cost.get("bytes accessed", math.nan)
    needed = memory.argument_size_in_bytes + memory.output_size_in_bytes
    needed += memory.temp_size_in_bytes - memory.alias_size_in_bytes
    machine = _MACHINES[chip]
    # TPUs multiply in bfloat16 whatever the dtype; GPUs in TF32, at half the speed.
    peak = machine.peak / (2 if on_gpus and args.dtype == "float32" else 1)
    text = compiled.as_text()
    instructions = list(hlo_text.instructions(text))
    moved = sum(each.moved for each in instructions)
    padded = sum(each.moved_padded for each in instructions)
    products = 2 * model_sizes.multiply_adds(trace.jaxpr.jaxpr, padding=False)
    if args.text:
        (pathlib.Path(args.text) / f"{name}.txt").write_text(text)
    if args.largest:
        _show_largest(text, args.largest)
    of_model = name != _RETRIEVAL
    row = {
        "program": name,
        "model": _model(args) if of_model else "",
        "topology": f"{args.topology}, {len(topology.devices)} chips",
        "images a device": args.batch if of_model else "",
        "size": args.size if of_model else "",
        "dtype": args.dtype if of_model else "float32",
        "trace s": traced - start,
        "compile s": seconds,
        "GiB": needed / 2**30,
        "fits": needed <= machine.memory,
        "GFLOP": flops / 1e9,
        "GFLOP of products": products / 1e9,
        "GB": accessed / 1e9,
        "GB of main memory": moved / 1e9,
        "GB of main memory, padded": padded / 1e9,
        "ms by FLOP": 1e3 * flops / peak,
        "ms by products": 1e3 * products / peak,
        "ms by GB": 1e3 * accessed / machine.bandwidth,
        "ms by main memory": 1e3 * moved / machine.bandwidth,
        "collectives": ", ".join(
            f"{len(sizes)} {op} ({sum(sizes) / 1e6:.2f} MB)"
            for op, sizes in hlo_text.collectives(text).items()
        ),
        "libtpu": "" if on_gpus else metadata.version("libtpu"),
    }
    for key, value in row.items():
        if isinstance(value, float) and math.isnan(value):  # XLA does not tell
            row[key] = ""
    return row


def _topology(name: str) -> Any:
    chip, _, shape = name.partition(":")
    if chip != "h100":
        return topologies.get_topology_desc(platform="tpu", topology_name=name)
    config = pathlib.Path(__file__).with_name("h100.textproto").read_text()
    return topologies.get_topology_desc(
        platform="cuda", topology=shape, target_config=config
    )


def _model(args: argparse.Namespace) -> str:
    name = f"ABE-{args.learners}, {args.trunk}"
    name += ", rematerialized" if args.rematerialize else ""
    return f"{name}, learners in turn" if args.in_turn else name


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
    """Rows of batches (images a device) ever closer to the largest that fits.

    The first is `args.batch`; it is doubled while it fits, then bisected between what
    fits and what does not, until these are at most eight images apart.
    """
    rows, fits, too_large, batch = [], 0, None, args.batch
    while too_large is None or too_large - fits > 8:
        try:
            own = argparse.Namespace(**{**vars(args), "batch": batch})
            rows.append(measure(name, own))
            enough = rows[-1]["fits"]
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            enough = False
        print(f"{batch} images: {'fit' if enough else 'too many'}", flush=True)
        fits, too_large = (batch, too_large) if enough else (fits, batch)
        batch = 2 * fits if too_large is None else (fits + too_large) // 2
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--topology", default="v5e:2x2", help="as v6e:16x16, h100:1x1x8"
    )
    parser.add_argument("--programs", default="step,embed,retrieval")
    parser.add_argument("--batch", type=int, default=16, help="images a device")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--learners", type=int, default=8)
    parser.add_argument("--trunk", default="googlenet")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rematerialize", action="store_true")
    parser.add_argument("--in_turn", action="store_true", help="learners in turn")
    parser.add_argument("--fit", action="store_true", help="find the largest batch")
    parser.add_argument("--largest", type=int, default=0, help="results to list")
    parser.add_argument("--text", help="folder for the optimised programs")
    parser.add_argument("--json", help="file to append the rows to")
    args = parser.parse_args()
    unknown = set(args.programs.split(",")) - {"step", "embed", _RETRIEVAL}
    if unknown:
        parser.error(f"--programs has {min(unknown)!r}; known are step,embed,retrieval")
    if args.in_turn and args.batch == args.learners:
        # `hlo_text` takes an array with as many rows as trips for one row a trip.
        parser.error("--in_turn needs a --batch other than --learners")
    jax.config.update("jax_enable_compilation_cache", False)
    rows = []
    for name in args.programs.split(","):
        bisected = args.fit and name != _RETRIEVAL
        rows += largest_batch(name, args) if bisected else [measure(name, args)]
    if not rows:
        parser.error("no batch was small enough; lower --batch.")
    side_by_side.show(rows, args.json)


if __name__ == "__main__":
    main()
