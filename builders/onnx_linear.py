"""Linears and the embedding as ONNX nodes, quantized or not: the lowering of a checkpoint's formats to operators.

    format          linear                      embedding
    none            Gemm (transB)               Gather
    int4, int8      MatMulNBits                 GatherBlockQuantized

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
from llmc.builders.onnx_graph import MICROSOFT, Graph
from llmc.quant import pack
from llmc.recipe import QuantRecipe, WeightFormat
from llmc.spec import ModelSpec

INT8_ARITHMETIC = 4  # as an accuracy_level

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
        accuracy_level: MatMulNBits' attribute: 4 lets it quantize its input to int8, 1 computes in float32.
        adapters: Linears take low-rank adapters as inputs of the graph (llmc/adapter.py).
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
    ) -> None:
        self.graph = graph
        self.adapters = adapters
        self._masks: dict[str, ir.Value] = {}
        self.load = load
        self.accuracy_level = accuracy_level
        self._recipe = recipe
        self._shapes = names.tensors(spec)
        self._known: dict[str, ir.Value] = {}

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
        out_features = sum(self._shapes[f"{module}.weight"][0] for module in modules)
        in_features = self._shapes[f"{modules[0]}.weight"][1]
        has_bias = f"{modules[0]}.bias" in self._shapes
        bias = self.weight(modules, "bias", (out_features,)) if has_bias else None
        name, weight_format = node or path(modules[0]), self.format(modules[0])
        if weight_format is None:
            weight = self.weight(modules, "weight", (out_features, in_features))
            return self._adapted(x, self.graph.call("Gemm", [x, weight, bias], name, transB=1), modules, name)
        bits, groups = weight_format.bits, weight_format.groups(in_features)
        blob = weight_format.group_size * bits // 8
        codes = self.weight(modules, "qweight", (out_features, groups, blob), np.uint8)
        scale = self.weight(modules, "scale", (out_features, groups))
        product = self.graph.call(
            "MatMulNBits",
            [x, codes, scale, self._zero(modules, weight_format, out_features, groups), None, bias],
            name,
            domain=MICROSOFT,
            K=in_features,
            N=out_features,
            bits=bits,
            block_size=weight_format.group_size,
            accuracy_level=self.accuracy_level,
        )
        return self._adapted(x, product, modules, name)

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

    def embedding(self, tokens: ir.Value, module: str) -> ir.Value:
        """Rows of a matrix: int64 [tokens] -> float32 [tokens, width]."""
        rows, width = self._shapes[f"{module}.weight"]
        weight_format = self.format(module)
        if weight_format is None:
            return self.graph.call("Gather", [self.weight([module], "weight", (rows, width)), tokens], path(module))
        bits, groups = weight_format.bits, weight_format.groups(width)
        padded = groups * weight_format.group_size
        inputs = [
            self.weight([module], "qweight", (rows, padded * bits // 8), np.uint8),
            tokens,
            self.weight([module], "scale", (rows, groups)),
            self._zero([module], weight_format, rows, groups),
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

    def weight(
        self,
        modules: Modules,
        kind: str,
        shape: tuple[int, ...],
        dtype: npt.DTypeLike = np.float32,
    ) -> ir.Value:
        """The tensors `kind` of `modules`, stacked, as one weight of `shape`; the same one whenever asked for again."""
        stored = "+".join(f"{module}.{kind}" for module in modules)
        key = f"{stored} {shape}"
        if key not in self._known:
            # Two views of the same bytes need two names.
            name = stored if all(stored != known.split()[0] for known in self._known) else f"{stored}:{len(shape)}d"

            def load() -> Array:
                parts = [self.load(f"{module}.{kind}").astype(dtype, copy=False) for module in modules]
                return parts[0] if len(parts) == 1 else np.concatenate(parts)

            self._known[key] = self.graph.weight(name, dtype, shape, load, stored=stored)
        return self._known[key]
