"""A mixture of experts as ONNX nodes: only what a token's experts compute is computed.

    x ── router ──► scores
    quantized:  QMoE(x, scores, softmax, weights of all experts) ──► y         one operator
    else:       scores ── TopK ──► weights, chosen
                each expert:  rows that chose it ── Gather(x) ── mlp ─┐
                (the others' products have no rows)                   ├─ Concat ── back in order ── weights ──► y
                                                                      ┘
    y + sigmoid(shared_gate(x)) * mlp(x)                                where there is a shared expert

What was measured is in docs/mixture-of-experts.md. In float32 the CPU's MoE operator is slower than the experts one by
one. Its QMoE is faster, most of all with many experts; it takes experts of one format, in whole groups of inputs that
come as they are, and with 8 bits computes in int8 only. What it does not take goes one by one as well.

Knows formats and operators. Does not know where in a decoder the mixture stands.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from llmc.builders.onnx_graph import MICROSOFT, Array
from llmc.builders.onnx_linear import INT8_ARITHMETIC, Lowering, path
from llmc.recipe import WeightFormat
from llmc.spec import ModelSpec, Moe

# Draws the MLP of a name: (x, name) -> y.
DrawMlp = Callable[[ir.Value, str], ir.Value]


def mixture(lowering: Lowering, spec: ModelSpec, moe: Moe, mlp: DrawMlp, x: ir.Value, at: str) -> ir.Value:
    """The mixture `at` of x [rows, hidden]."""
    graph, scores = lowering.graph, lowering.linear(x, f"{at}.router")
    shared_format = _common_format(lowering, spec, moe, at)
    if shared_format:
        out = fused(lowering, spec, moe, shared_format, [x, scores], at)
    else:
        out = one_by_one(lowering, spec, moe, mlp, [x, scores], at)
    if not moe.shared_size:
        return out
    weight = graph.call("Sigmoid", [lowering.linear(x, f"{at}.shared_gate")], f"{path(at)}/shared_weight")
    weighted = graph.call("Mul", [weight, mlp(x, f"{at}.shared")], f"{path(at)}/shared_weighted")
    return graph.call("Add", [out, weighted], f"{path(at)}/sum")


def _common_format(lowering: Lowering, spec: ModelSpec, moe: Moe, at: str) -> WeightFormat | None:
    """The format of all experts if QMoE can compute them, and as exactly as was asked for; else None."""
    if not lowering.fused_experts:
        return None
    experts = [f"{at}.experts.{expert}.{name}" for expert in range(moe.num_experts) for name in ("gate", "up", "down")]
    found = {lowering.format(expert) for expert in experts}
    form = found.pop()
    if found or form is None or spec.mlp.activation != "silu":
        return None
    if form.group_size == 0 or not all(map(lowering.inputs.are_plain, experts)):
        return None
    has_whole_groups = spec.hidden_size % form.group_size == 0 == moe.intermediate_size % form.group_size
    is_exact = form.bits == 4 or lowering.accuracy_level == INT8_ARITHMETIC
    return form if has_whole_groups and is_exact else None


def fused(
    lowering: Lowering, spec: ModelSpec, moe: Moe, form: WeightFormat, inputs: list[ir.Value | None], at: str
) -> ir.Value:
    """QMoE. Its first product has the rows of gate and up by turns.

    The scores are given twice: as they are to choose by, and as a softmax over all of them to weigh by, because on
    the CPU the operator renormalises what it makes of scores alone, whatever `normalize_routing_weights` says.
    """

    def weight(names: tuple[str, ...], kind: str, rows: int, columns: int, dtype: npt.DTypeLike) -> ir.Value:
        shape = (moe.num_experts, rows * len(names), columns)

        def load() -> Array:
            values = np.empty((moe.num_experts, rows, len(names), columns), dtype)
            for expert in range(moe.num_experts):
                for turn, name in enumerate(names):
                    values[expert, :, turn] = lowering.load(f"{at}.experts.{expert}.{name}.{kind}")
            return values

        return lowering.graph.weight(f"{at}.experts.{'_'.join(names)}.{kind}", dtype, shape, load)

    weights = lowering.graph.call("Softmax", [inputs[1]], f"{path(at)}/softmax", axis=-1)
    zeros: list[ir.Value | None] = []
    hidden, inner = spec.hidden_size, moe.intermediate_size
    for names, rows, columns in ((("gate", "up"), inner, hidden), (("down",), hidden, inner)):
        groups = form.groups(columns)
        codes = weight(names, "qweight", rows, columns * form.bits // 8, np.uint8)
        inputs = [*inputs, codes, weight(names, "scale", rows, groups, np.float32), None]
        zero_bytes = -(-groups * form.bits // 8)
        zeros.append(None if form.symmetric else weight(names, "zero", rows, zero_bytes, np.uint8))
    no_third_product = [None, None, None]
    return lowering.graph.call(
        "QMoE",
        [*inputs, *no_third_product, *zeros, None, weights],
        path(f"{at}.experts"),
        domain=MICROSOFT,
        k=moe.top_k,
        normalize_routing_weights=int(moe.renormalise),
        expert_weight_bits=form.bits,
        block_size=form.group_size,
        accuracy_level=lowering.accuracy_level,
        activation_type="swiglu",
        swiglu_fusion=1,
        activation_alpha=1.0,
        activation_beta=0.0,
    )


def one_by_one(
    lowering: Lowering, spec: ModelSpec, moe: Moe, mlp: DrawMlp, inputs: list[ir.Value], at: str
) -> ir.Value:
    """Each expert's MLP on the rows that chose it; each row is met `top_k` times, and put back in order after."""
    graph, here = lowering.graph, path(at)
    x, scores = inputs

    def number(name: str, values: Any) -> ir.Value:
        return graph.constant(f"{here}/{name}", np.array(values))

    # In float32, as transformers does it whatever the rest computes in: who is chosen must not hang on rounding.
    scores = graph.cast(scores, f"{here}/scores", before=graph.compute, after=np.float32)
    softmax = graph.call("Softmax", [scores], f"{here}/softmax", axis=-1)
    weights, chosen = graph.node("TopK", [softmax, number("top_k", [moe.top_k])], f"{here}/top", outputs=2)
    if moe.renormalise:
        total = graph.call("ReduceSum", [weights, number("last", [-1])], f"{here}/total")
        weights = graph.call("Div", [weights, total], f"{here}/weights")
    weights = graph.cast(weights, f"{here}/narrow", before=np.float32, after=graph.compute)
    flat, width = number("flat", [-1]), number("width", moe.top_k)
    chosen = graph.call("Reshape", [chosen, flat], f"{here}/chosen")
    made, places = [], []
    for expert in range(moe.num_experts):
        name = f"{at}.experts.{expert}"
        hit = graph.call("Equal", [chosen, number(f"experts/{expert}/index", expert)], f"{path(name)}/hit")
        place = graph.call("Reshape", [graph.call("NonZero", [hit], f"{path(name)}/at"), flat], f"{path(name)}/places")
        row = graph.call("Div", [place, width], f"{path(name)}/rows")
        made.append(mlp(graph.call("Gather", [x, row], f"{path(name)}/x"), name))
        places.append(place)
    place = graph.call("Concat", places, f"{here}/places", axis=0)
    size = graph.call("Size", [chosen], f"{here}/size")
    count = graph.call("Range", [number("zero", 0), size, number("one", 1)], f"{here}/count")
    origin = graph.call("ScatterElements", [chosen, place, count], f"{here}/origin", axis=0)
    out = graph.call("Gather", [graph.call("Concat", made, f"{here}/made", axis=0), origin], f"{here}/ordered")
    out = graph.call("Reshape", [out, number("by_row", [-1, moe.top_k, spec.hidden_size])], f"{here}/by_row_out")
    weights = graph.call("Unsqueeze", [weights, number("between", [1])], f"{here}/weights_row")
    mixed = graph.call("MatMul", [weights, out], f"{here}/mixed")
    return graph.call("Reshape", [mixed, number("rows", [-1, spec.hidden_size])], f"{here}/out")
