"""Prints the paper's table of model sizes, counted from the models themselves.

    python benchmarks/model_sizes.py
    python benchmarks/model_sizes.py --trunks  # ours: all trunks, for docs/models.md
    python benchmarks/model_sizes.py --config=quickstart  # ours: of configs/NAME.py

Parameters are those of BVLC's GoogLeNet with biases. Multiply-adds are those of the
convolutions and matrix products on one image, padding included: 224 x 224, or of the
config's size. Nothing is computed: the models are traced.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import side_by_side
from flax import nnx
from ml_collections import ConfigDict

from abe_jax import models
from abe_jax.models import lowering
from abe_jax.models.googlenet import NEIGHBOURS
from abe_jax.models.shapes import without_values
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
    width: float = 1.0,
) -> tuple[int, int]:
    """Number of parameters, and of multiply-adds for one image."""
    config = ConfigDict(
        {
            "name": name,
            "trunk": trunk,
            "num_learners": num_learners,
            "embedding_dim": embedding_dim,
            "width": width,
        }
    )
    model = without_values(lambda rngs: models.create(config, rngs=rngs))
    graphdef, state = nnx.split(model)
    image = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    program = traced(lambda s, x: nnx.merge(graphdef, s, copy=True)(x), state, image)
    parameters = sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param)))
    return parameters, multiply_adds(program)


def traced(function: Callable[..., Any], *operands: Any) -> Any:
    """The jaxpr of a function, with convolutions and not what CPUs make of them."""
    with lowering.plain_operations():
        return jax.make_jaxpr(function)(*operands).jaxpr


def multiply_adds(jaxpr: Any, *, padding: bool = True) -> int:
    """Multiply-adds of the convolutions and matrix products of a program.

    Args:
      jaxpr: the program.
      padding: whether those with zeros around maps, and in gradients between their
        rows, count; XLA's count has them not.
    """
    total = 0
    for equation in equations(jaxpr):
        name, params = equation.primitive.name, equation.params
        if NEIGHBOURS in str(equation.source_info.name_stack):
            continue
        if name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            outputs = params["dimension_numbers"].rhs_spec[0]
            per_output = math.prod(kernel) // kernel[outputs]
            each = equation.outvars[0].aval.size * per_output
            total += each if padding else round(each * _share_of_maps(equation))
        elif name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            per_output = math.prod(left[axis] for axis in contracted)
            total += equation.outvars[0].aval.size * per_output
    return total


def _share_of_maps(convolution: Any) -> float:
    """The share of a convolution's multiply-adds that are not with zeros put in."""
    params = convolution.params
    of_maps, of_kernel, of_outputs = params["dimension_numbers"]
    maps, kernel = (operand.aval.shape for operand in convolution.invars)
    outputs = convolution.outvars[0].aval.shape
    share = 1.0
    for axis, (before, _) in enumerate(params["padding"]):
        apart, dilation = params["lhs_dilation"][axis], params["rhs_dilation"][axis]
        starts = np.arange(outputs[of_outputs[axis + 2]])[:, None]
        steps = np.arange(kernel[of_kernel[axis + 2]]) * dilation
        places = starts * params["window_strides"][axis] + steps - before
        end = (maps[of_maps[axis + 2]] - 1) * apart
        share *= np.mean((places >= 0) & (places <= end) & (places % apart == 0))
    return share


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations that hold no program themselves; a scan's once for each trip."""
    for equation in jaxpr.eqns:
        values = (getattr(v, "jaxpr", v) for v in equation.params.values())
        inner = [value for value in values if hasattr(value, "eqns")]
        trips = equation.params["length"] if equation.primitive.name == "scan" else 1
        for program in trips * inner:
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


def table(
    rows: Iterable[tuple[str, int, int]], exponents: tuple[int, int], **fields: Any
) -> str:
    """Parameters and multiply-adds of models, in powers of ten; `fields` as `size`."""
    p, m = exponents
    lines = [f"model {f'parameters / 10^{p}':>27} {f'multiply-adds / 10^{m}':>21}"]
    for row in rows:
        parameters, operations = size(*row, **fields)
        counts = f"{parameters / 10**p:>18.2f} {operations / 10**m:>21.2f}"
        lines.append(f"{title(*row):<14} {counts}")
    return "\n".join(lines)


def config_table(name: str) -> str:
    """One head, M heads and ABE-M, with a config's M, D, trunk, width and images."""
    config = side_by_side.config(name)
    model = config.model
    names = ("one_head", "m_heads", "abe")
    return table(
        [(name, model.num_learners, model.embedding_dim) for name in names],
        (6, 6),
        image_size=config.data.image_size,
        trunk=model.trunk,
        width=model.width,
    )


def main(arguments: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trunks", action="store_true", help="ours: all trunks")
    parser.add_argument("--config", help="ours: the models of configs/NAME.py")
    args = parser.parse_args(arguments)
    if args.config:
        print(config_table(args.config))
    else:
        print(trunk_table() if args.trunks else table(ROWS, (7, 9)))


if __name__ == "__main__":
    main(sys.argv[1:])
