"""Prints the paper's table of model sizes, counted from the models themselves.

    python benchmarks/model_sizes.py
    python benchmarks/model_sizes.py --trunks  # ours: all trunks, for docs/models.md

Parameters are those of BVLC's GoogLeNet with biases. Multiply-adds are those of the
convolutions and matrix products on one 224 x 224 image, padding included. Nothing is
computed: the models are traced.
"""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from abe_jax import models
from abe_jax.models.cpu import lowering
from abe_jax.models.googlenet import NEIGHBOURS
from abe_jax.models.trunks import TRUNKS

# (name in config.model.name, learners M, dimensions D), in the order of the paper.
ROWS = (
    ("one_head", 1, 512),
    ("m_heads", 2, 512),
    ("m_heads", 4, 512),
    ("m_heads", 8, 512),
    ("abe", 1, 512),
    ("abe", 2, 512),
    ("abe", 4, 512),
    ("abe", 8, 512),
    ("abe", 1, 64),
    ("abe", 2, 128),
    ("abe", 4, 256),
)


def size(
    name: str,
    num_learners: int,
    embedding_dim: int,
    image_size: int = 224,
    trunk: str = "googlenet",
) -> tuple[int, int]:
    """Number of parameters, and of multiply-adds for one image."""
    config = ConfigDict(
        {
            "name": name,
            "trunk": trunk,
            "num_learners": num_learners,
            "embedding_dim": embedding_dim,
            "width": 1.0,
        }
    )
    model = nnx.eval_shape(lambda: models.create(config, rngs=nnx.Rngs(0)))
    # In training batch norm would ask for the axis of the devices.
    frozen = nnx.view(model, use_running_average=True, raise_if_not_found=False)
    graphdef, state = nnx.split(frozen)
    image = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    program = traced(lambda s, x: nnx.merge(graphdef, s, copy=True)(x), state, image)
    parameters = sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param)))
    return parameters, multiply_adds(program)


def traced(function: Callable[..., Any], *operands: Any) -> Any:
    """The jaxpr of a function, with convolutions and not what CPUs make of them."""
    with lowering.plain_operations():
        return jax.make_jaxpr(function)(*operands).jaxpr


def multiply_adds(jaxpr: Any) -> int:
    """Multiply-adds of the convolutions and matrix products of a program."""
    total = 0
    for equation in equations(jaxpr):
        name, params = equation.primitive.name, equation.params
        if NEIGHBOURS in str(equation.source_info.name_stack):
            continue
        if name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            outputs = params["dimension_numbers"].rhs_spec[0]
            per_output = math.prod(kernel) // kernel[outputs]
            total += equation.outvars[0].aval.size * per_output
        elif name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            per_output = math.prod(left[axis] for axis in contracted)
            total += equation.outvars[0].aval.size * per_output
    return total


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations of a program that hold no program themselves."""
    for equation in jaxpr.eqns:
        values = (getattr(v, "jaxpr", v) for v in equation.params.values())
        inner = [value for value in values if hasattr(value, "eqns")]
        for program in inner:
            yield from equations(program)
        if not inner:
            yield equation


def title(name: str, num_learners: int, embedding_dim: int) -> str:
    """A row's name as the paper writes it."""
    forms = {
        "one_head": "1-head",
        "m_heads": f"{num_learners}-heads",
        "abe": f"ABE-{num_learners}",
    }
    return f"{forms[name]}^{embedding_dim}"


def trunk_table() -> str:
    """Every trunk with one head, with eight, and with ABE-8, all ^512, as Markdown."""
    models_of = (("one_head", 1), ("m_heads", 8), ("abe", 8))
    titles = (title(name, learners, 512) for name, learners in models_of)
    lines = [f"| `model.trunk` | {' | '.join(titles)} |", f"|---|{'---|' * 3}"]
    for trunk in TRUNKS:
        cells = []
        for name, learners in models_of:
            parameters, operations = size(name, learners, 512, trunk=trunk)
            cells.append(f"{parameters / 1e6:.1f} M, {operations / 1e9:.1f} G")
        lines.append(f"| {trunk} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] = ()) -> None:
    if "--trunks" in arguments:
        print(trunk_table())
        return
    print(f"{'model':<14} {'parameters / 10^7':>18} {'multiply-adds / 10^9':>21}")
    for row in ROWS:
        parameters, operations = size(*row)
        print(f"{title(*row):<14} {parameters / 1e7:>18.2f} {operations / 1e9:>21.2f}")


if __name__ == "__main__":
    main(sys.argv[1:])
