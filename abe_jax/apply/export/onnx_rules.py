"""What each operation of JAX is in ONNX; the models use some thirty.

A rule takes the graph, the equation and its operands, and gives its result, or a list
of them. What depends on constants only never comes here.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from onnx import helper

from abe_jax.apply.export.onnx_graph import Graph, Rule, Value
from abe_jax.errors import UserError

RULES: dict[str, Rule] = {}


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        for name in names:
            RULES[name] = rule
        return rule

    return register


def _same_as(kind: str) -> Rule:
    return lambda graph, eqn, operands: graph.node(kind, operands)


RULES |= {
    name: _same_as(kind)
    for name, kind in {
        "abs": "Abs",
        "add": "Add",
        "copy": "Identity",
        "cos": "Cos",
        "div": "Div",
        "erf": "Erf",
        "exp": "Exp",
        "log": "Log",
        "logistic": "Sigmoid",
        "max": "Max",
        "min": "Min",
        "mul": "Mul",
        "name": "Identity",
        "neg": "Neg",
        "pow": "Pow",
        "sin": "Sin",
        "sqrt": "Sqrt",
        "stop_gradient": "Identity",
        "sub": "Sub",
        "tanh": "Tanh",
    }.items()
}


@_rule("erfc")
def _erfc(graph: Graph, eqn: Any, operands: list[Value]) -> Value:
    one = np.ones((), eqn.invars[0].aval.dtype)
    return graph.node("Sub", [one, graph.node("Erf", operands)])


@_rule("square")
def _square(graph: Graph, eqn: Any, operands: list[Value]) -> Value:
    return graph.node("Mul", [operands[0], operands[0]])


@_rule("rsqrt")
def _rsqrt(graph: Graph, eqn: Any, operands: list[Value]) -> Value:
    return graph.node("Reciprocal", [graph.node("Sqrt", operands)])


@_rule("integer_pow")
def _integer_pow(graph: Graph, eqn: Any, operands: list[Value]) -> Value:
    exponent = np.asarray(eqn.params["y"], eqn.invars[0].aval.dtype)
    return graph.node("Pow", [operands[0], exponent])


@_rule("convert_element_type")
def _cast(graph: Graph, eqn: Any, operands: list[Value]) -> Value:
    return graph.node(
        "Cast", operands, to=helper.np_dtype_to_tensor_dtype(eqn.params["new_dtype"])
    )


@_rule("transpose")
def _transpose(graph: Graph, eqn: Any, operands: list[Value]) -> Value:
    return graph.transposed(operands[0], eqn.params["permutation"])


@_rule("reshape", "squeeze")
def _reshape(graph: Graph, eqn: Any, operands: list[Value]) -> Value:
    x, order = operands[0], eqn.params.get("dimensions")
    if eqn.primitive.name == "reshape" and order is not None:
        x = graph.transposed(x, order)
    return graph.reshaped(x, eqn.outvars[0].aval.shape)


@_rule("broadcast_in_dim")
def _broadcast_in_dim(graph: Graph, eqn: Any, operands: list[Value]) -> Value:
    shape = eqn.outvars[0].aval.shape
    own = eqn.invars[0].aval.shape
    with_ones: list[Any] = [1] * len(shape)
    for size, place in zip(own, eqn.params["broadcast_dimensions"], strict=True):
        with_ones[place] = size
    x = graph.reshaped(operands[0], with_ones)
    return x if with_ones == list(shape) else graph.broadcast(x, shape)


@_rule("concatenate")
def _concatenate(graph: Graph, eqn: Any, operands: list[Value]) -> Value:
    return graph.node("Concat", operands, axis=eqn.params["dimension"])


@_rule("split")
def _split(graph: Graph, eqn: Any, operands: list[Value]) -> list[Value]:
    sizes = np.array(eqn.params["sizes"], np.int64)
    axis = eqn.params["axis"]
    parts = graph.node("Split", [operands[0], sizes], number=len(sizes), axis=axis)
    return parts if len(sizes) > 1 else [parts]


@_rule("slice")
def _slice(graph: Graph, eqn: Any, operands: list[Value]) -> Value:
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    steps = eqn.params["strides"] or [1] * len(starts)
    return _sliced(graph, operands[0], starts, limits, steps)


def _sliced(graph: Graph, x: Value, starts: Any, limits: Any, steps: Any) -> Value:
    """A limit that depends on the batch is the end."""
    end = np.iinfo(np.int64).max
    limits = [d if isinstance(d, int) else end for d in limits]
    axes = range(len(limits))
    arguments = [np.array(list(a), np.int64) for a in (starts, limits, axes, steps)]
    return graph.node("Slice", [x, *arguments])


@_rule("rev")
def _rev(graph: Graph, eqn: Any, operands: list[Value]) -> Value:
    axes = np.array(eqn.params["dimensions"], np.int64)
    last, before_first = np.full_like(axes, -1), np.full_like(axes, -(2**62))
    return graph.node("Slice", [operands[0], last, before_first, axes, last])


@_rule("gather")
def _gather(graph: Graph, eqn: Any, operands: list[Value]) -> Value:
    """The two kinds that indexing makes: a window, and rows along one axis."""
    x, indices = operands
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    shape = eqn.invars[0].aval.shape
    if isinstance(indices, np.ndarray):
        axes = numbers.start_index_map
        if indices.ndim == 1 and not numbers.collapsed_slice_dims:
            starts = [0] * len(shape)
            for axis, start in zip(axes, indices.tolist(), strict=True):
                starts[axis] = int(np.clip(start, 0, shape[axis] - sizes[axis]))
            pairs = zip(starts, sizes, strict=True)
            limits = [s + n if isinstance(n, int) else n for s, n in pairs]
            return _sliced(graph, x, starts, limits, [1] * len(shape))
        if numbers.collapsed_slice_dims == axes and len(axes) == 1:
            (axis,) = axes
            rows = np.clip(indices[..., 0], 0, shape[axis] - 1).astype(np.int64)
            others = [d for d in range(len(shape)) if d != axis]
            whole = all(sizes[d] == shape[d] for d in others)
            rank = len(eqn.outvars[0].aval.shape)
            in_place = [d for d in range(rank) if not axis <= d < axis + rows.ndim]
            if whole and list(numbers.offset_dims) == in_place:
                return graph.node("Gather", [x, rows], axis=axis)
    raise UserError("ONNX: the model indexes in a way that has no rule here.")


@_rule("pad")
def _pad(graph: Graph, eqn: Any, operands: list[Value]) -> Value:
    low, high, inner = zip(*eqn.params["padding_config"], strict=True)
    if any(inner):
        raise UserError("ONNX: there is no rule for padding between elements.")
    pads = np.array([*low, *high], np.int64)
    return graph.node("Pad", [operands[0], pads, operands[1]])


@_rule("select_n")
def _select(graph: Graph, eqn: Any, operands: list[Value]) -> Value:
    which, if_false, if_true = operands
    return graph.node("Where", [which, if_true, if_false])


@_rule("reduce_sum", "reduce_max", "reduce_min")
def _reduce(graph: Graph, eqn: Any, operands: list[Value]) -> Value:
    axes = [int(axis) for axis in eqn.params["axes"]]
    if eqn.primitive.name == "reduce_sum":  # takes its axes another way
        return graph.node("ReduceSum", [operands[0], np.array(axes)], keepdims=0)
    kind = {"reduce_max": "ReduceMax", "reduce_min": "ReduceMin"}[eqn.primitive.name]
    return graph.node(kind, operands, axes=axes, keepdims=0)


@_rule("dot_general")
def _dot_general(graph: Graph, eqn: Any, operands: list[Value]) -> Value:
    """As the letters of an Einsum: batch, rows of the left, rows of the right."""
    (left_sum, right_sum), (left_batch, right_batch) = eqn.params["dimension_numbers"]
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    ranks = [len(v.aval.shape) for v in eqn.invars]
    left, right = ([""] * rank for rank in ranks)
    for i, j in (*zip(left_batch, right_batch), *zip(left_sum, right_sum)):  # noqa: B905
        left[i] = right[j] = next(letters)
    left_rows = [i for i, letter in enumerate(left) if not letter]
    right_rows = [j for j, letter in enumerate(right) if not letter]
    for i in left_rows:
        left[i] = next(letters)
    for j in right_rows:
        right[j] = next(letters)
    out = [left[i] for i in (*left_batch, *left_rows)] + [right[j] for j in right_rows]
    equation = f"{''.join(left)},{''.join(right)}->{''.join(out)}"
    return graph.node("Einsum", operands, equation=equation)


@_rule("conv_general_dilated")
def _convolution(graph: Graph, eqn: Any, operands: list[Value]) -> Value:
    params = eqn.params
    if any(d != 1 for d in params["lhs_dilation"]) or params["batch_group_count"] != 1:
        raise UserError("ONNX: there is no rule for such a transposed convolution.")
    layout = params["dimension_numbers"]
    y = graph.node(
        "Conv",
        [
            graph.transposed(operands[0], layout.lhs_spec),
            graph.transposed(operands[1], layout.rhs_spec),
        ],
        strides=[int(s) for s in params["window_strides"]],
        pads=_ends(params["padding"]),
        dilations=[int(d) for d in params["rhs_dilation"]],
        group=int(params["feature_group_count"]),
    )
    return graph.transposed(y, np.argsort(layout.out_spec).tolist())


@_rule("reduce_window_max")
def _max_pool(graph: Graph, eqn: Any, operands: list[Value]) -> Value:
    params = eqn.params
    windows, strides = params["window_dimensions"], params["window_strides"]
    plain = {*params["base_dilation"], *params["window_dilation"]} == {1}
    inner = [d for d, size in enumerate(windows) if size > 1]
    outer = [d for d in range(len(windows)) if d not in inner]
    if not plain or len(outer) < 2 or len(inner) != 2:
        raise UserError("ONNX: there is no rule for such a pooling.")
    order = [*outer, *inner]
    shape = [eqn.invars[0].aval.shape[d] for d in order]
    x = graph.transposed(operands[0], order)
    if len(outer) > 2:  # as vmap makes them: images, channels, height, width
        x = graph.reshaped(x, [math.prod(shape[:-3]), *shape[-3:]])
    y = graph.node(
        "MaxPool",
        [x],
        kernel_shape=[windows[d] for d in inner],
        strides=[strides[d] for d in inner],
        pads=_ends([params["padding"][d] for d in inner]),
    )
    if len(outer) > 2:
        y = graph.reshaped(y, [eqn.outvars[0].aval.shape[d] for d in order])
    return graph.transposed(y, np.argsort(order).tolist())


def _ends(pads: Sequence[tuple[int, int]]) -> list[int]:
    low, high = zip(*pads, strict=True)
    return [int(p) for p in (*low, *high)]
