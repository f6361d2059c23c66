"""Floor and measured time of each part of an ABE-8 training step.

    python benchmarks/roofline.py
    python benchmarks/roofline.py --case=64:32

The floor of a part is the longer of two times: its floating-point operations at the
rate of a square matrix product, and its bytes at the rate of a large addition, both
measured here. Both are counted in the part's program, forward and backward: the
operations of convolutions and matrix products, and the bytes of these and of poolings,
as if each read its operands and wrote its result once; everything else is free. It is
the floor of direct convolutions: Winograd's, which CPUs take for wide 3 x 3 ones,
multiply 16 times for 36. A part is timed alone, forward and backward; the last row is
the whole step, whose sum also has augmentation and losses.
"""

import argparse
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import abe_cases
import jax
import jax.numpy as jnp
import model_sizes
import side_by_side
import train_step as train_step_benchmark
from flax import nnx

from abe_jax import host_memory, losses, models, optimizer, parallel, train_step

# Equations that move their operands through memory at least once.
_MOVES = (
    *("conv_general_dilated", "dot_general"),
    *("reduce_window", "select_and_scatter_add"),  # pooling and its gradient
)


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the step.

    Attributes:
      name: shown in the table.
      run: does it once, and waits.
      operations: floating-point operations.
      bytes: moved at least.
    """

    name: str
    run: Callable[[int], None]
    operations: float
    bytes: float


def parts(case: abe_cases.Case) -> list[Part]:
    """Those of ABE-M in the order of the step."""
    model = models.create(case.config().model, rngs=nnx.Rngs(0))
    assert isinstance(model, models.ABE)
    features, branch = model.global_features, model.attention_branch
    dtype = jnp.dtype(case.dtype)
    images = jnp.ones((case.batch, case.size, case.size, 3), jnp.float32)
    maps = jax.eval_shape(lambda m, x: m(x), model.spatial, images)
    spread = (case.batch * case.learners, *maps.shape[1:])
    common = jax.eval_shape(lambda m, x: m(x), branch.common, maps)
    deep = (spread[0], *(-(-side // 2) for side in common.shape[1:3]), 832)
    dim = abe_cases.EMBEDDING_DIM // case.learners
    vectors = jnp.ones((case.batch, case.learners, dim), jnp.float32)

    def stages(*names: str) -> Callable[[Any, jax.Array], jax.Array]:
        def run(features: Any, x: jax.Array) -> jax.Array:
            for name in names:
                x = getattr(features, f"inception_{name}")(x)
            return x

        return run

    return [
        _part("S: conv1 to 3b, pool3", model.spatial, images, first=True),
        _part("attention: 4a to 4e", branch.common, jnp.ones(maps.shape, dtype)),
        _part(
            "attention: masks",
            branch,
            jnp.ones(common.shape, dtype),
            call=lambda b, x: b.masks(x),
        ),
        _part(
            "G: 4a to 4e",
            features,
            jnp.ones(spread, dtype),
            call=stages("4a", "4b", "4c", "4d", "4e"),
        ),
        _part("G: 5a, 5b", features, jnp.ones(deep, dtype), call=stages("5a", "5b")),
        _losses(vectors, jnp.asarray(case.labels())),
        _update(model, case),
    ]


def _part(
    name: str,
    module: nnx.Module,
    x: jax.Array,
    *,
    call: Callable[[Any, jax.Array], jax.Array] = lambda module, x: module(x),
    first: bool = False,
) -> Part:
    """A module forward and backward; `first`: nothing asks for the input's gradient."""
    graphdef, params, others = train_step.split_model(module)

    def forward(params: Any, x: jax.Array) -> jax.Array:
        net = nnx.merge(graphdef, nnx.State(params), nnx.State(others), copy=True)
        return call(net, x)

    def both(params: Any, x: jax.Array) -> Any:
        if first:
            y, pull_back = jax.vjp(lambda params: forward(params, x), params)
        else:
            y, pull_back = jax.vjp(forward, params, x)
        return pull_back(jnp.ones_like(y))

    return _counted(name, both, params, x)


def _losses(embeddings: jax.Array, labels: jax.Array) -> Part:
    def cotangent(labels: jax.Array, embeddings: jax.Array) -> jax.Array:
        def loss(embeddings: jax.Array) -> jax.Array:
            return losses.contrastive_loss(embeddings, labels) + losses.divergence_loss(
                embeddings
            )

        return jax.grad(loss)(embeddings)

    return _counted("losses", cotangent, labels, embeddings)


def _counted(
    name: str, program: Callable[[Any, Any], Any], state: Any, rows: Any
) -> Part:
    jaxpr = model_sizes.traced(program, state, rows)
    operations = 2.0 * model_sizes.multiply_adds(jaxpr)
    return Part(name, _timed(program, state, rows), operations, bytes_moved(jaxpr))


def _update(model: nnx.Module, case: abe_cases.Case) -> Part:
    optimiser, _ = optimizer.create(case.config().train)
    state = train_step.initial_state(model, optimiser)

    def update(state: train_step.TrainState, gradients: Any) -> Any:
        return optimiser.update(gradients, state.opt_state, state.params)

    gradients = jax.tree.map(jnp.ones_like, state.params)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(gradients))
    # Reads gradient, momentum and parameter, writes the last two.
    return Part("optimiser", _timed(update, state, gradients), 0.0, 5.0 * size)


def _timed(
    program: Callable[[Any, Any], Any], state: Any, rows: Any
) -> Callable[[int], None]:
    mesh = parallel.make_mesh(jax.devices()[:1])
    compiled = parallel.map_over_devices(program, mesh)
    state = parallel.replicate(state, mesh)
    rows = parallel.replicate(rows, mesh)

    def run(count: int) -> None:
        for _ in range(count):
            jax.block_until_ready(compiled(state, rows))

    return run


def bytes_moved(jaxpr: Any) -> float:
    """Operands and results of convolutions, products and poolings, each once."""
    total = 0
    for equation in model_sizes.equations(jaxpr):
        name = equation.primitive.name
        if name.startswith(_MOVES):
            values = (*equation.invars, *equation.outvars)
            shaped = (value.aval for value in values)
            total += sum(math.prod(s.shape) * s.dtype.itemsize for s in shaped)
    return float(total)


def memory_rate() -> float:
    """Bytes a second that adding one to a large array reads and writes."""
    x = jnp.ones(2**27, jnp.float32)
    add = jax.jit(lambda x: x + 1)

    def run(count: int) -> None:
        for _ in range(count):
            add(x).block_until_ready()

    method = side_by_side.Method("addition", run)
    side_by_side.take_turns([method], turns=3, seconds=0.5)
    return 2 * x.nbytes / method.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", default="224:16", help="side of the images and batch")
    parser.add_argument("--learners", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="of a turn, about")
    parser.add_argument("--json", help="file to append the whole step to")
    args = parser.parse_args()
    host_memory.use_large_pages()  # as abe_jax.main does
    size, batch = map(int, args.case.split(":"))
    case = abe_cases.Case(args.learners, size, batch, args.dtype)
    rate = side_by_side.matrix_rate(jnp.dtype(case.dtype))
    bandwidth = memory_rate()
    print(f"{case}: {rate / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.1f} GB/s", flush=True)
    work = parts(case)
    whole = Part(
        "whole step",
        train_step_benchmark.ours(case),
        sum(part.operations for part in work),
        sum(part.bytes for part in work),
    )
    work.append(whole)
    methods = [side_by_side.Method(part.name, part.run) for part in work]
    side_by_side.take_turns(methods, turns=args.turns, seconds=args.seconds)
    rows = []
    for part, method in zip(work, methods, strict=True):
        by_operations, by_bytes = part.operations / rate, part.bytes / bandwidth
        floor = max(by_operations, by_bytes)
        rows.append(
            {
                "part": part.name,
                "GFLOP": part.operations / 1e9,
                "GB": part.bytes / 1e9,
                "bound by": "FLOP" if by_operations > by_bytes else "bytes",
                "floor s": floor,
                "measured s": method.seconds,
                "floor / measured": floor / method.seconds,
                "of the step": method.seconds / methods[-1].seconds,
            }
        )
    whole_step = {
        "what": f"training step of ABE-{case.learners}, {case.size} x {case.size}, "
        f"batch {case.batch}",
        "seconds": methods[-1].seconds,
        "share": rows[-1]["floor / measured"],
    }
    side_by_side.show(rows, args.json, [whole_step])


if __name__ == "__main__":
    main()
