"""Linears and the embedding as ONNX nodes, quantized or not: the lowering of a checkpoint's formats to operators.

    format                      linear                         embedding
    none                        Gemm (transB)                  Gather
    int4, int8 in groups        MatMulNBits                    GatherBlockQuantized
    int8 in rows                MatMulIntegerToFloat
    fp8                         Cast, Mul, Gemm (transB)       Cast, Mul, Gather

Products of int8 in rows read rounded inputs, the others where the recipe says so, and those of weights in groups read
inputs in another order where it says that (onnx_inputs.py). Weights of fp8 are stored as such; the session turns them
into float32 once, when it is opened, because the CPU multiplies no fp8.

The checkpoint's packed codes are MatMulNBits' own layout, so weights pass through byte by byte. A tied head and the
embedding are the same bytes in the file.

Knows formats and operators. Does not know where in a decoder a linear stands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from llmc import adapter, names
from llmc.builders import onnx_inputs
from llmc.builders.onnx_graph import MICROSOFT, Graph
from llmc.builders.onnx_inputs import Inputs
from llmc.quant import pack
from llmc.recipe import FP8, ActivationFormat, QuantRecipe, WeightFormat
from llmc.spec import ModelSpec

# As an accuracy_level.
INT8_ARITHMETIC = 4
HALF_ARITHMETIC = 2
FLOAT_ARITHMETIC = 1
_ARITHMETICS = {INT8_ARITHMETIC: "int8", HALF_ARITHMETIC: "float16", FLOAT_ARITHMETIC: "float32"}

# What torch's functional.normalize takes for the length of a row of zeros.
_SHORTEST = np.float32(1e-12)

Array = npt.NDArray[Any]
Modules = Sequence[str]


def path(module: str) -> str:
    """The node name of a module: `layers.0.attn.q` -> `/layers.0/attn/q`."""
    return "/" + module.replace(".", "/").replace("layers/", "layers.", 1)


class Lowering:
    """Adds linears to a graph.

    Attributes:
        load: A tensor of the checkpoint by its canonical name.
        accuracy_level: MatMulNBits' attribute: 4 lets it quantize its input to int8, 1 computes in float32, 2 in
            float16.
        adapters: Linears take low-rank adapters as inputs of the graph (llmc/adapter.py).
        fused_experts: Experts may be one operator (builders/onnx_moe.py).
    """

    def __init__(
        self,
        graph: Graph,
        spec: ModelSpec,
        recipe: QuantRecipe | None,
        load: Callable[[str], Array],
        accuracy_level: int,
        *,
        adapters: bool = False,
        fused_experts: bool = True,
    ) -> None:
        self.graph = graph
        self.fused_experts = fused_experts
        self.adapters = adapters
        self._masks: dict[str, ir.Value] = {}
        self.load = load
        self.accuracy_level = accuracy_level
        self._recipe = recipe
        self._shapes = names.tensors(spec)
        self._known: dict[str, ir.Value] = {}
        self.inputs = Inputs(graph, recipe, load)

    def alike(self, *modules: str) -> bool:
        """Whether linears have one format, and treat their inputs alike: then one product can make them all."""
        return len({(self.format(module), *self.inputs.key(module)) for module in modules}) == 1

    def format(self, module: str) -> WeightFormat | None:
        weight = f"{module}.weight"
        return (
            self._recipe.format_of(module) if self._recipe and names.is_matrix(weight, self._shapes[weight]) else None
        )

    def linear(self, x: ir.Value, *modules: str, node: str = "") -> ir.Value:
        """y = x W^T + b, the outputs of several modules of the same format side by side.

        Args:
            x: float32 [rows, in].
            node: The node's name; by default the module's path.

        Returns:
            float32 [rows, sum of out].
        """
        name = node or path(modules[0])
        return self._adapted(x, self._product(x, modules, name), modules, name)

    def _product(self, x: ir.Value, modules: Modules, name: str) -> ir.Value:
        rows = sum(self._shapes[f"{module}.weight"][0] for module in modules)
        columns = self._shapes[f"{modules[0]}.weight"][1]
        bias = self._bias(modules, rows)
        form, inputs = self.format(modules[0]), self.inputs.form(modules[0])
        if form is None:
            weight = self.weight(modules, "weight", (rows, columns))
            return self.graph.call("Gemm", [x, weight, bias], name, transB=1)
        if inputs and inputs.kind == "fp8":
            x = self.inputs.values(x, modules[0], name)
        elif form.group_size:
            x = self.inputs.whole(x, modules[0], name)
        if form.kind == "fp8":
            return self.graph.call("Gemm", [x, self._wide(modules, form, rows, columns), bias], name, transB=1)
        if form.group_size == 0:
            codes, scale = self.inputs.codes(x, modules[0], name)
            return onnx_inputs.product(self.graph, codes, scale, self._int8(modules, rows, columns), bias, name)
        level = self.accuracy_level
        if inputs:
            level = INT8_ARITHMETIC if inputs.kind == "int8" else FLOAT_ARITHMETIC
        return self._blocks(x, modules, form, (rows, columns), bias, name, level)

    def _blocks(
        self,
        x: ir.Value,
        modules: Modules,
        form: WeightFormat,
        shape: tuple[int, int],
        bias: ir.Value | None,
        name: str,
        accuracy_level: int,
    ) -> ir.Value:
        """A product with weights in groups. Its int8 arithmetic is that of dynamic activations in the same groups."""
        (rows, columns), groups = shape, form.groups(shape[1])
        codes = self.weight(modules, "qweight", (rows, groups, form.group_size * form.bits // 8), np.uint8)
        scale = self.weight(modules, "scale", (rows, groups))
        return self.graph.call(
            "MatMulNBits",
            [x, codes, scale, self._zero(modules, form, rows, groups), None, bias],
            name,
            domain=MICROSOFT,
            K=columns,
            N=rows,
            bits=form.bits,
            block_size=form.group_size,
            accuracy_level=accuracy_level,
        )

    def _adapted(self, x: ir.Value, y: ir.Value, modules: Modules, name: str) -> ir.Value:
        """y + (mask * (x a^T)) b, where modules take adapters.

            x ── Gemm(a) ── * mask ── Gemm(b, y) ──►

        With no rows in a and b, when nobody uses an adapter, it is y.
        """
        if not self.adapters or not all(map(adapter.is_adaptable, modules)):
            return y
        both = adapter.joined(modules)
        kind, shapes = adapter.kind_of(both), [self._shapes[f"{module}.weight"] for module in modules]
        rank = f"rank.{kind}"
        if kind not in self._masks:
            self._masks[kind] = self.graph.input(f"lora.mask.{kind}", ir.DataType.FLOAT, ["tokens", rank])
        a = self.graph.input(f"lora.{both}.a", ir.DataType.FLOAT, [rank, shapes[0][1]])
        b = self.graph.input(f"lora.{both}.b", ir.DataType.FLOAT, [rank, sum(out for out, _ in shapes)])
        inner = self.graph.call("Gemm", [x, a], f"{name}/lora/a", transB=1)
        masked = self.graph.call("Mul", [inner, self._masks[kind]], f"{name}/lora/mask")
        return self.graph.call("Gemm", [masked, b, y], f"{name}/lora")

    def _bias(self, modules: Modules, rows: int) -> ir.Value | None:
        """The linears' biases, and what their shifted inputs take from the outputs."""
        has_bias = f"{modules[0]}.bias" in self._shapes
        if not (self._recipe and self._recipe.is_shifted(modules[0])):
            return self.weight(modules, "bias", (rows,)) if has_bias else None

        def load() -> Array:
            kinds = ("bias", "input_bias") if has_bias else ("input_bias",)
            parts = [[self.load(f"{module}.{kind}").astype(np.float32) for module in modules] for kind in kinds]
            total: Array = np.stack([np.concatenate(part) for part in parts]).sum(axis=0)
            return total

        name = "+".join(f"{module}.shifted_bias" for module in modules)
        return self.graph.weight(name, self.graph.compute, (rows,), load)

    def _int8(self, modules: Modules, rows: int, columns: int) -> list[ir.Value]:
        """Weights int8 [in, out] and scales float32 [out]."""

        def load() -> Array:
            codes = np.concatenate([self.load(f"{module}.qweight") for module in modules])
            return np.ascontiguousarray((codes ^ np.uint8(128)).view(np.int8).T)

        stored = "+".join(f"{module}.qweight" for module in modules)
        return [
            self.graph.weight(stored, np.int8, (columns, rows), load),
            self.weight(modules, "scale", (rows,)),
        ]

    def _wide(self, modules: Modules, form: WeightFormat, rows: int, columns: int) -> ir.Value:
        """Weights of fp8 as float32 [out, in]."""
        name = "+".join(modules)
        if f"{name}.wide" not in self._known:
            codes = self.weight(modules, "qweight", (rows, columns), FP8)
            wide = self.graph.call("Cast", [codes], f"{path(name)}/wide_weight", to=ir.DataType.FLOAT)

            def load() -> Array:
                sizes = (self._shapes[f"{module}.weight"][0] for module in modules)
                scales = [np.broadcast_to(self.load(f"{m}.scale"), (n, 1)) for m, n in zip(modules, sizes, strict=True)]
                return np.concatenate(scales)

            scale = self.graph.weight(f"{name}.row_scale", np.float32, (rows, 1), load)
            self._known[f"{name}.wide"] = self.graph.call("Mul", [wide, scale], f"{path(name)}/weight")
        return self._known[f"{name}.wide"]

    def embedding(self, tokens: ir.Value, module: str) -> ir.Value:
        """Rows of a matrix: int64 [tokens] -> float32 [tokens, width]."""
        rows, width = self._shapes[f"{module}.weight"]
        weight_format = self.format(module)
        if weight_format is None:
            return self.graph.call("Gather", [self.weight([module], "weight", (rows, width)), tokens], path(module))
        if weight_format.kind == "fp8":
            return self.graph.call("Gather", [self._wide([module], weight_format, rows, width), tokens], path(module))
        bits, groups = weight_format.bits, weight_format.groups(width)
        padded = groups * weight_format.group_size
        inputs = [
            self.weight([module], "qweight", (rows, padded * bits // 8), np.uint8),
            tokens,
            self.weight([module], "scale", (rows, groups)),
            self._zero([module], weight_format, rows, groups) or self._middles(module, weight_format, rows, groups),
        ]
        found = self.graph.call(
            "GatherBlockQuantized",
            inputs,
            path(module),
            domain=MICROSOFT,
            bits=bits,
            block_size=weight_format.group_size,
            gather_axis=0,
            quantize_axis=1,
        )
        if padded == width:
            return found
        start, end, axis = (self.graph.constant(f"{path(module)}/cut:{n}", np.array([n])) for n in (0, width, 1))
        return self.graph.call("Slice", [found, start, end, axis], f"{path(module)}/cut")

    def inverse_lengths(self, module: str) -> ir.Value:
        """One over the Euclidean length of each row of a matrix, as it is after packing: float32 [rows]."""
        rows, width = self._shapes[f"{module}.weight"]

        def load() -> Array:
            form = self.format(module)
            if form is None:
                values = self.load(f"{module}.weight").astype(np.float32, copy=False)
            else:
                zero = None if form.symmetric else self.load(f"{module}.zero")
                values = pack.dequantize(
                    self.load(f"{module}.qweight"), self.load(f"{module}.scale"), zero, form, width
                )
            lengths: Array = np.linalg.norm(values, axis=1)
            return 1 / np.maximum(lengths, _SHORTEST)

        return self.graph.weight(f"{module}.inverse_lengths", np.float32, (rows,), load)

    def _zero(self, modules: Modules, form: WeightFormat, rows: int, groups: int) -> ir.Value | None:
        if form.symmetric:
            return None
        return self.weight(modules, "zero", (rows, -(-groups * form.bits // 8)), np.uint8)

    def _middles(self, module: str, form: WeightFormat, rows: int, groups: int) -> ir.Value:
        """Zero points that are all the middle of the codes.

        Left out they mean the same on a CPU, but zero on CUDA (onnxruntime's issue 31692, of August 2026).
        """
        shape, middle = (rows, -(-groups * form.bits // 8)), {4: 0x88, 8: 0x80}[form.bits]
        return self.graph.weight(f"{module}.middles", np.uint8, shape, lambda: np.full(shape, middle, np.uint8))

    def weight(
        self,
        modules: Modules,
        kind: str,
        shape: tuple[int, ...],
        dtype: npt.DTypeLike | None = None,
    ) -> ir.Value:
        """The tensors `kind` of `modules`, stacked, as one weight of `shape`; the same one whenever asked for again.

        Args:
            dtype: By default what the graph computes in.
        """
        dtype = self.graph.compute if dtype is None else np.dtype(dtype)
        wide = np.promote_types(dtype, np.float32) if dtype.kind == "f" else dtype
        stored = "+".join(f"{module}.{kind}" for module in modules)
        key = f"{stored} {shape}"
        if key not in self._known:
            # Two views of the same bytes need two names.
            name = stored if all(stored != known.split()[0] for known in self._known) else f"{stored}:{len(shape)}d"

            def load() -> Array:
                parts = [self.load(f"{module}.{kind}").astype(wide, copy=False) for module in modules]
                return parts[0] if len(parts) == 1 else np.concatenate(parts)

            self._known[key] = self.graph.weight(name, dtype, shape, load, stored=stored)
        return self._known[key]


def kernel(
    form: WeightFormat | None, inputs: ActivationFormat | None, accuracy_level: int, compute: str
) -> tuple[str, str]:
    """A format of matrices and what computes them, for people."""
    if form is None:
        return compute, f"Gemm in {compute}"
    label = f"fp8, a scale {'for all' if form.per_tensor else 'for each row'}" if form.kind == "fp8" else ""
    label = label or f"int{form.bits} " + (f"group {form.group_size}" if form.group_size else "rows")
    if inputs:
        each = "one scale" if not inputs.dynamic else "a scale for each token"
        label += f" x {inputs.kind} inputs, {each}"
    if form.kind == "fp8" or (inputs and inputs.kind == "fp8"):
        product = "Gemm" if form.kind == "fp8" else "MatMulNBits"
        return label, f"{product} in float32: the CPU multiplies no fp8, and weights are widened when the engine opens"
    if form.group_size == 0:
        return label, "MatMulIntegerToFloat, products in int8"
    return label, f"MatMulNBits, products in {_ARITHMETICS[INT8_ARITHMETIC if inputs else accuracy_level]}"
