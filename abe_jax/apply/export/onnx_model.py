"""JAX programs as ONNX models.

jax2onnx would do this, but its version for JAX 0.10 (0.17.1, tried in November 2026)
writes poolings that ONNX Runtime refuses, cannot trace the `vmap` of M-heads, and holds
Orbax below the version that is used here.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import onnx
from onnx import helper

from abe_jax.apply.export.onnx_graph import Graph
from abe_jax.apply.export.onnx_rules import RULES

# 17 has all that is needed; newer ones shut older runtimes out.
_OPSET = 17
_IR_VERSION = 8


def convert(
    function: Callable[[jax.Array], jax.Array],
    shape: Sequence[int],
    *,
    input_name: str,
    output_name: str,
) -> onnx.ModelProto:
    """Writes a function of a batch of images as a graph.

    Args:
      function: from uint8 `[B, *shape]` to float32 `[B, ...]`, for every B.
      shape: of an image.
      input_name: of the graph's input.
      output_name: of its output.

    Returns:
      the model, whose batch is of any size.

    Raises:
      UserError: the function uses an operation without a rule here.
    """
    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *shape), np.uint8)
    program = jax.make_jaxpr(function)(images)
    graph = Graph(batch, input_name, RULES)
    (result,) = graph.run(program.jaxpr, program.consts, [input_name])
    graph.node("Identity", [result], outputs=[output_name])
    (aval,) = program.out_avals
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "abe_jax",
            [_info(input_name, images)],
            [_info(output_name, aval)],
            graph.constants,
        ),
        opset_imports=[helper.make_opsetid("", _OPSET)],
        ir_version=_IR_VERSION,
        producer_name="abe_jax",
    )
    onnx.checker.check_model(model)
    return model


def _info(name: str, aval: Any) -> onnx.ValueInfoProto:
    dims = [d if isinstance(d, int) else str(d) for d in aval.shape]
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(aval.dtype))
    return helper.make_tensor_value_info(name, kind, dims)
