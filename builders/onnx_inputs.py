"""Inputs of linears as ONNX nodes, rounded (llmc/rounding.py, lowered) or in another order.

    x ── [Sub input_shift] ── [Mul input_multiply] ── [Gather input_order] ──►
    int8, static     x ── QuantizeLinear ──► codes                                       scale is a constant
    int8, dynamic    x ─┬─ Abs ── ReduceMax ── Mul 1/127 ── Max ─► scale of each row
                        └─ Div ──────────── QuantizeLinear ──► codes
                     codes, weights ── MatMulIntegerToFloat ── [Mul scale] ── [Add bias] ──►
    fp8              x ── Div scale ── Clip ── Cast ── Cast ── Mul scale ──► x, to be multiplied in float32

Codes of inputs are unsigned around 128, those of weights are signed: with both signed or both unsigned the CPU's
kernels take two to twenty times as long (bench/int8_products.py). DynamicQuantizeLinear will not do: it has one scale
for all rows, so that a request's answer would depend on who else is in the batch.

What several linears read is rounded, or put in order, once.

Knows formats and operators. Does not know where in a decoder a linear stands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from llmc.builders.onnx_graph import MICROSOFT, Array, Graph
from llmc.recipe import ActivationFormat, QuantRecipe

_INT8_STEPS = np.float32(1 / 127)
_FP8_STEPS = np.float32(1 / 448)
_FP8_HIGHEST = np.float32(448)
_SMALLEST = np.float32(1e-20)  # a row of zeros has this scale, see llmc/rounding.py
_MIDDLE = np.uint8(128)

KINDS = ("input_shift", "input_multiply", "input_scale", "input_order")


class Inputs:
    """Rounds and orders inputs, each once for all that read it in the same way."""

    def __init__(self, graph: Graph, recipe: QuantRecipe | None, load: Callable[[str], Array]) -> None:
        self._graph = graph
        self._recipe = recipe
        self._load = load
        self._values: dict[str, dict[str, Array]] = {}
        self._made: dict[tuple[object, ...], tuple[ir.Value, ir.Value]] = {}

    def form(self, module: str) -> ActivationFormat | None:
        """The format of what a linear reads."""
        return self._recipe.inputs_of(module) if self._recipe else None

    def are_plain(self, module: str) -> bool:
        """Whether a linear reads its inputs as they come."""
        return self.form(module) is None and not (self._recipe and self._recipe.is_ordered(module))

    def key(self, module: str) -> tuple[object, ...]:
        """Equal for linears that treat their inputs alike."""
        return self.form(module), *((kind, values.tobytes()) for kind, values in self._vectors(module).items())

    def _vectors(self, module: str) -> dict[str, Array]:
        """What is stored for a linear's input: small, so that it may be read while the graph is drawn."""
        if module not in self._values:
            recipe, found, form = self._recipe, {}, self.form(module)
            if recipe:
                is_static = form is not None and not form.dynamic
                stored = recipe.is_shifted(module), recipe.is_multiplied(module), is_static, recipe.is_ordered(module)
                found = {
                    kind: self._load(f"{module}.{kind}")
                    for kind, is_there in zip(KINDS, stored, strict=True)
                    if is_there
                }
            self._values[module] = found
        return self._values[module]

    def prepared(self, x: ir.Value, module: str, name: str) -> ir.Value:
        """The input before it is rounded, or as the groups of the weights have it."""
        for kind, operator in (("input_shift", "Sub"), ("input_multiply", "Mul")):
            if kind in self._vectors(module):
                vector = self._constant(f"{name}/{kind}", self._vectors(module)[kind])
                x = self._graph.call(operator, [x, vector], f"{name}/{operator.lower()}")
        order = self._vectors(module).get("input_order")
        if order is not None:
            indices = self._graph.weight(f"{name}/input_order", order.dtype, order.shape, lambda: order)
            x = self._graph.call("Gather", [x, indices], f"{name}/ordered", axis=1)
        return x

    def codes(self, x: ir.Value, module: str, name: str) -> tuple[ir.Value, ir.Value]:
        """Codes uint8 [rows, in] of x [rows, in], and their scale: one, or float32 [rows, 1]."""
        return self._once(x, module, lambda: self._codes(self.prepared(x, module, name), module, name))

    def values(self, x: ir.Value, module: str, name: str) -> ir.Value:
        """x [rows, in] as fp8 has it, in float32."""
        return self._once(x, module, lambda: self._fp8(self.prepared(x, module, name), module, name))[0]

    def whole(self, x: ir.Value, module: str, name: str) -> ir.Value:
        """x [rows, in] for an operator that rounds it itself, or not at all."""
        return self._once(x, module, lambda: (self.prepared(x, module, name),) * 2)[0]

    def _once(
        self, x: ir.Value, module: str, make: Callable[[], tuple[ir.Value, ir.Value]]
    ) -> tuple[ir.Value, ir.Value]:
        key = (id(x), *self.key(module))
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def _codes(self, x: ir.Value, module: str, name: str) -> tuple[ir.Value, ir.Value]:
        middle, one = self._constant(f"{name}/middle", _MIDDLE), self._constant(f"{name}/one", np.float32(1))
        scale = self._scale(x, module, name, _INT8_STEPS)
        by = scale
        if "input_scale" not in self._vectors(module):
            x, by = self._graph.call("Div", [x, scale], f"{name}/scaled"), one
        return self._graph.call("QuantizeLinear", [x, by, middle], f"{name}/codes"), scale

    def _fp8(self, x: ir.Value, module: str, name: str) -> tuple[ir.Value, ir.Value]:
        graph, scale = self._graph, self._scale(x, module, name, _FP8_STEPS)
        low, high = (self._constant(f"{name}/{at}", sign * _FP8_HIGHEST) for at, sign in (("low", -1), ("high", 1)))
        scaled = graph.call("Div", [x, scale], f"{name}/scaled")
        clipped = graph.call("Clip", [scaled, low, high], f"{name}/clipped")
        codes = graph.call("Cast", [clipped], f"{name}/codes", to=ir.DataType.FLOAT8E4M3FN)
        wide = graph.call("Cast", [codes], f"{name}/wide", to=ir.DataType.FLOAT)
        return graph.call("Mul", [wide, scale], f"{name}/rounded"), scale

    def _scale(self, x: ir.Value, module: str, name: str, steps: np.float32) -> ir.Value:
        """The stored scale, or that of each row."""
        stored = self._vectors(module).get("input_scale")
        if stored is not None:
            return self._constant(f"{name}/scale", stored.reshape(()))
        graph = self._graph
        # Axis 1 and not -1: of no rows at all (an expert that nobody chose) the operator makes another shape by -1.
        sizes = graph.call("Abs", [x], f"{name}/sizes")
        reach = graph.call("ReduceMax", [sizes, self._constant(f"{name}/axis", np.array([1]))], f"{name}/reach")
        scale = graph.call("Mul", [reach, self._constant(f"{name}/steps", steps)], f"{name}/row_scale")
        return graph.call("Max", [scale, self._constant(f"{name}/smallest", _SMALLEST)], f"{name}/scale_of_rows")

    def _constant(self, name: str, values: Array | np.generic) -> ir.Value:
        return self._graph.constant(name, np.asarray(values))


def product(
    graph: Graph, codes: ir.Value, scale: ir.Value, weights: Sequence[ir.Value], bias: ir.Value | None, name: str
) -> ir.Value:
    """(codes - 128) weights, times scales, plus bias: float32 [rows, out].

    Args:
        codes: uint8 [rows, in].
        scale: Of the codes, one number or one for each row.
        weights: int8 [in, out] and the scale of each column, float32 [out].
    """
    middle = graph.constant(f"{name}/zero", np.asarray(_MIDDLE))
    is_static = scale.const_value is not None
    of_codes = scale if is_static else graph.constant(f"{name}/unit", np.asarray(np.float32(1)))
    inputs = [codes, weights[0], of_codes, weights[1], middle, None, bias if is_static else None]
    out = graph.call("MatMulIntegerToFloat", inputs, name, domain=MICROSOFT)
    if is_static:
        return out
    out = graph.call("Mul", [out, scale], f"{name}/by_row")
    return out if bias is None else graph.call("Add", [out, bias], f"{name}/biased")
