"""Times the two ways in which an engine can compute a mixture of experts (builders/onnx_moe.py), and prints a table.

    python bench/experts.py [--threads N]

Random weights; the best of several runs counts. Consecutive runs meet the same experts, so that a few tokens are timed
from the processor's cache, which a whole model would not be.
"""

from __future__ import annotations

import argparse
import functools
import os
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from rich.console import Console
from rich.table import Table

from llmc import names
from llmc.builders import onnx_moe
from llmc.builders.onnx_graph import MICROSOFT, Graph
from llmc.builders.onnx_linear import INT8_ARITHMETIC, Lowering
from llmc.quant import rtn
from llmc.recipe import QuantRecipe, WeightFormat
from llmc.spec import Attention, Mlp, ModelSpec, Moe, Norm, Rope

AT = "layers.0.moe"
HIDDEN = 1024
SHAPES = {"8 experts of 3584, top 2": (8, 2, 3584), "64 experts of 768, top 8": (64, 8, 768)}
TOKENS = {1: 200, 8: 100, 128: 10}  # tokens -> runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    threads = parser.parse_args().threads
    table = Table(title=f"hidden size {HIDDEN}, {threads} threads, milliseconds")
    for column in ("experts", "weights", "tokens", "QMoE", "one by one"):
        table.add_column(column, justify="right" if column in ("QMoE", "one by one") else "left")
    for label, (experts, top_k, inner) in SHAPES.items():
        spec = spec_of(Moe(num_experts=experts, top_k=top_k, intermediate_size=inner))
        for bits in (4, 8):
            sessions = [session(spec, bits, threads, fused=fused) for fused in (True, False)]
            for tokens, runs in TOKENS.items():
                x = np.random.default_rng(1).standard_normal((tokens, HIDDEN), np.float32)
                times = [best(one, x, runs) for one in sessions]
                table.add_row(label, f"int{bits} group 32", str(tokens), *(f"{ms:.2f}" for ms in times))
    Console().print(table)


def spec_of(moe: Moe) -> ModelSpec:
    return ModelSpec(
        family="none", vocab_size=1, hidden_size=HIDDEN, num_layers=1, max_positions=1, norm=Norm(eps=1e-5),
        position=Rope(), attention=Attention(num_heads=1, num_kv_heads=1, head_dim=16), moe=moe,
        mlp=Mlp(intermediate_size=moe.intermediate_size),
    )  # fmt: skip


def session(spec: ModelSpec, bits: Any, threads: int, *, fused: bool) -> Any:
    form = WeightFormat(bits=bits, group_size=32)
    shapes = names.tensors(spec)

    @functools.cache
    def packed(module: str) -> dict[str, Any]:
        generator = np.random.default_rng(zlib.crc32(module.encode()))
        values = generator.standard_normal(shapes[f"{module}.weight"], np.float32) / 32
        router = {f"{module}.weight": values} if module.endswith("router") else {}
        return dict(rtn.quantize(values, form).pieces(module)) | router

    graph = Graph("mixture")
    x = graph.input("x", ir.DataType.FLOAT, ["tokens", HIDDEN])
    recipe = QuantRecipe(algorithm="rtn", weights=form)
    lowering = Lowering(graph, spec, recipe, lambda name: packed(name.rpartition(".")[0])[name], INT8_ARITHMETIC)

    def mlp(rows: ir.Value, at: str) -> ir.Value:
        gate, up = (lowering.linear(rows, f"{at}.{name}") for name in ("gate", "up"))
        active = graph.call("QuickGelu", [gate], f"/{at}/silu", domain=MICROSOFT, alpha=1.0)
        return lowering.linear(graph.call("Mul", [active, up], f"/{at}/product"), f"{at}.down")

    moe = spec.experts(0)
    if moe is None:
        raise ValueError("the spec has no experts")
    inputs = [x, lowering.linear(x, f"{AT}.router")]
    if fused:
        y = onnx_moe.fused(lowering, spec, moe, form, inputs, AT)
    else:
        y = onnx_moe.one_by_one(lowering, spec, moe, mlp, inputs, AT)
    graph.output(y, "y", ir.DataType.FLOAT, ["tokens", HIDDEN])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    with tempfile.TemporaryDirectory() as folder:
        graph.save(Path(folder))
        return onnxruntime.InferenceSession(Path(folder) / "model.onnx", options, providers=["CPUExecutionProvider"])


def best(one: Any, x: Any, runs: int) -> float:
    """Milliseconds of the fastest run, after one that warms up."""
    one.run(None, {"x": x})
    times = []
    for _ in range(runs):
        begun = time.perf_counter()
        one.run(None, {"x": x})
        times.append(time.perf_counter() - begun)
    return min(times) * 1e3


if __name__ == "__main__":
    main()
