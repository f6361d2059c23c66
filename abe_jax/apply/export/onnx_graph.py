"""An ONNX graph in the making, from a JAX program."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx
from jax.extend import core
from onnx import helper, numpy_helper

from abe_jax.errors import UserError

# An array that is known, or the name of one that the graph computes.
Value: TypeAlias = np.ndarray | str

Rule: TypeAlias = Callable[["Graph", Any, list[Value]], "Value | list[Value]"]


@dataclasses.dataclass
class Graph:
    """The nodes so far.

    Attributes:
      batch: the symbol of the batch's size.
      input_name: of the input, whose first dimension is the batch.
      rules: what nodes each of JAX's operations becomes.
    """

    batch: Any
    input_name: str
    rules: Mapping[str, Rule]
    nodes: list[onnx.NodeProto] = dataclasses.field(default_factory=list)
    constants: list[onnx.TensorProto] = dataclasses.field(default_factory=list)

    def run(
        self, jaxpr: core.Jaxpr, consts: Sequence[Any], inputs: Sequence[Value]
    ) -> list[Value]:
        """Adds a program's nodes; returns what it computes."""
        known: dict[Any, Value] = {}
        known |= zip(jaxpr.constvars, map(np.asarray, consts), strict=True)
        known |= zip(jaxpr.invars, inputs, strict=True)

        def read(variable: Any) -> Value:
            if isinstance(variable, core.Literal):
                return np.asarray(variable.val, getattr(variable.aval, "dtype", None))
            return known[variable]

        for eqn in jaxpr.eqns:
            operands = [read(v) for v in eqn.invars]
            results = self._equation(eqn, operands)
            known |= zip(eqn.outvars, results, strict=True)
        return [read(v) for v in jaxpr.outvars]

    def _equation(self, eqn: Any, operands: list[Value]) -> list[Value]:
        name = eqn.primitive.name
        inner = eqn.params.get("call_jaxpr") or eqn.params.get("jaxpr")
        # Of jit, custom_jvp_call, remat and the like: what they compute.
        if inner is not None and name != "scan":
            closed = isinstance(inner, core.ClosedJaxpr)
            jaxpr = inner.jaxpr if closed else inner
            return self.run(jaxpr, inner.consts if closed else (), operands)
        fixed = all(isinstance(d, int) for v in eqn.outvars for d in v.aval.shape)
        if fixed and not any(isinstance(x, str) for x in operands):
            values = eqn.primitive.bind(*operands, **eqn.params)
            values = values if eqn.primitive.multiple_results else [values]
            return [np.asarray(value) for value in values]
        if name not in self.rules:
            raise UserError(
                f"ONNX: there is no rule for JAX's operation {name!r}; add one to "
                "abe_jax/apply/export/onnx_rules.py, or export .stablehlo."
            )
        result = self.rules[name](self, eqn, operands)
        return result if isinstance(result, list) else [result]

    def node(
        self,
        kind: str,
        inputs: Sequence[Value],
        outputs: Sequence[str] = (),
        number: int = 1,
        **attributes: Any,
    ) -> Any:
        """Adds one node; returns its output, or a list where there are several."""
        names = [x if isinstance(x, str) else self._constant(x) for x in inputs]
        first = len(self.nodes)
        outputs = outputs or [f"{kind.lower()}_{first}_{i}" for i in range(number)]
        self.nodes.append(helper.make_node(kind, names, list(outputs), **attributes))
        return outputs[0] if number == 1 else list(outputs)

    def _constant(self, value: np.ndarray) -> str:
        name = f"constant_{len(self.constants)}"
        tensor = numpy_helper.from_array(np.ascontiguousarray(value), name)
        tensor.dims[:] = value.shape  # of a scalar, ascontiguousarray makes a vector
        self.constants.append(tensor)
        return name

    def transposed(self, x: Value, order: Sequence[int]) -> Value:
        """x with its dimensions in another order."""
        if list(order) == sorted(order):
            return x
        if isinstance(x, np.ndarray):
            return x.transpose(order)
        return self.node("Transpose", [x], perm=list(order))

    def reshaped(self, x: Value, shape: Sequence[Any]) -> Value:
        """x in another shape, of which one dimension may depend on the batch."""
        if isinstance(x, np.ndarray):
            return x.reshape(tuple(shape))
        fixed = [d if isinstance(d, int) else -1 for d in shape]
        if fixed.count(-1) < 2:
            return self.node("Reshape", [x, np.array(fixed, np.int64)])
        return self.node("Reshape", [x, self._shape(shape)])

    def broadcast(self, x: Value, shape: Sequence[Any]) -> Value:
        """x repeated along dimensions of size 1."""
        return self.node("Expand", [x, self._shape(shape)])

    def _shape(self, shape: Sequence[Any]) -> Value:
        if all(isinstance(d, int) for d in shape):
            return np.array(shape, np.int64)
        size = self.node("Shape", [self.input_name], start=0, end=1)
        parts: list[Value] = []
        for d in shape:
            if isinstance(d, int):
                parts.append(np.array([d], np.int64))
            else:
                times = np.array([int(d // self.batch)], np.int64)
                parts.append(self.node("Mul", [size, times]))
        return self.node("Concat", parts, axis=0)
