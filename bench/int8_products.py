"""Times the ways in which ONNX Runtime's CPU can multiply int8 weights, at the shapes of a model, and prints a table.

    python bench/int8_products.py [--threads N]

Random weights and inputs; the best run of a quarter of a second counts. What an engine uses is "per token, u8 s8"
(dynamic) and "static, u8 s8"; the other rows are why. `error` is the mean error of the product over its mean size.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from rich.console import Console
from rich.table import Table

from llmc.builders.onnx_graph import MICROSOFT, Graph

SHAPES = ((896, 896), (4864, 896), (896, 4864))  # [out, in] of Qwen2.5-0.5B
ROWS = (1, 16, 128)
SECONDS = 0.25


class Way:
    """What a way of multiplying is given: the graph, its input, weights and their codes."""

    def __init__(self, weights: Any) -> None:
        self.graph = Graph("product")
        self.x = self.graph.input("x", ir.DataType.FLOAT, ["rows", weights.shape[1]])
        self.weights = weights
        self.scale = (np.abs(weights).max(1) / 127).astype(np.float32)
        self.codes = np.rint(weights / self.scale[:, None]).astype(np.int8)

    def value(self, name: str, values: Any) -> ir.Value:
        return self.graph.constant(name, np.asarray(values))

    def product(self, x: ir.Value, by: Any, kind: Any = np.uint8, weight_kind: Any = np.int8) -> ir.Value:
        """QuantizeLinear, MatMulIntegerToFloat."""
        middle = self.value("zero", kind(128) if kind is np.uint8 else kind(0))
        by = self.value("by", np.float32(by))
        codes = self.graph.call("QuantizeLinear", [x, by, middle], "quantized")
        is_signed = weight_kind is np.int8
        weights = self.codes.T if is_signed else (self.codes.T.astype(np.int16) + 128).astype(np.uint8)
        zero = None if is_signed else self.value("weight_zero", np.full(len(self.codes), 128, np.uint8))
        weights = self.value("weights", np.ascontiguousarray(weights))
        inputs = [codes, weights, by, self.value("scale", self.scale), middle, zero]
        return self.graph.call("MatMulIntegerToFloat", inputs, "product", domain=MICROSOFT)

    def by_token(self, **kinds: Any) -> ir.Value:
        """Each row divided by its own scale, and multiplied again."""
        graph = self.graph
        reach = graph.call("ReduceMax", [graph.call("Abs", [self.x], "abs"), self.value("axis", [1])], "reach")
        scale = graph.call("Mul", [reach, self.value("steps", np.float32(1 / 127))], "row_scale")
        scale = graph.call("Max", [scale, self.value("least", np.float32(1e-20))], "row_scales")
        y = self.product(graph.call("Div", [self.x, scale], "scaled"), 1, **kinds)
        return graph.call("Mul", [y, scale], "by_row")

    def float32(self) -> ir.Value:
        return self.graph.call("Gemm", [self.x, self.value("weights", self.weights)], "product", transB=1)

    def whole_batch(self) -> ir.Value:
        inputs = [self.x, self.value("weights", np.ascontiguousarray(self.codes.T)), self.value("scale", self.scale)]
        return self.graph.call("DynamicQuantizeMatMul", inputs, "product", domain=MICROSOFT)

    def qlinear(self) -> ir.Value:
        middle, by = self.value("zero", np.uint8(128)), self.value("by", np.float32(4 / 127))
        codes = self.graph.call("QuantizeLinear", [self.x, by, middle], "quantized")
        weights = self.value("weights", np.ascontiguousarray(self.codes.T))
        zero = self.value("weight_zero", np.zeros(len(self.codes), np.int8))
        out = self.value("of_output", np.float32(3 * np.sqrt(self.weights.shape[1]) * 0.02 / 127))
        inputs = [codes, by, middle, weights, self.value("scale", self.scale), zero, out, middle]
        return self.graph.call(
            "DequantizeLinear", [self.graph.call("QLinearMatMul", inputs, "q"), out, middle], "product"
        )

    def blocks(self) -> ir.Value:
        size, (rows, columns) = 128, self.codes.shape
        codes = (self.codes.astype(np.int16) + 128).astype(np.uint8).reshape(rows, -1, size)
        scale = np.repeat(self.scale[:, None], columns // size, 1)
        return self.graph.call(
            "MatMulNBits", [self.x, self.value("weights", codes), self.value("scale", scale)], "product",
            domain=MICROSOFT, K=columns, N=rows, bits=8, block_size=size, accuracy_level=4,
        )  # fmt: skip


WAYS: dict[str, Callable[[Way], ir.Value]] = {
    "float32 Gemm": Way.float32,
    "per token, u8 s8 MatMulIntegerToFloat": Way.by_token,
    "per token, u8 u8": lambda way: way.by_token(weight_kind=np.uint8),
    "per token, s8 s8": lambda way: way.by_token(kind=np.int8),
    "per token and block, MatMulNBits": Way.blocks,
    "static, u8 s8 MatMulIntegerToFloat": lambda way: way.product(way.x, 4 / 127),
    "static, QLinearMatMul": Way.qlinear,
    "whole batch, DynamicQuantizeMatMul": Way.whole_batch,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    threads = parser.parse_args().threads
    table = Table(title=f"microseconds, {threads} threads")
    for column in ("product", *(f"{out}x{into}, {rows} rows" for out, into in SHAPES for rows in ROWS), "error"):
        table.add_column(column, justify="left" if column == "product" else "right")
    random = np.random.default_rng(0)
    for name, draw in WAYS.items():
        cells, error = [], 0.0
        for shape in SHAPES:
            weights = random.standard_normal(shape, np.float32) * np.float32(0.02)
            session = opened(weights, draw, threads)
            for rows in ROWS:
                x = random.standard_normal((rows, shape[1]), np.float32)
                exact = x @ weights.T
                error = float(np.abs(session.run(None, {"x": x})[0] - exact).mean() / np.abs(exact).mean())
                cells.append(f"{best(session, x) * 1e6:.0f}")
        table.add_row(name, *cells, f"{error:.2%}")
    Console(width=200).print(table)


def opened(weights: Any, draw: Callable[[Way], ir.Value], threads: int) -> Any:
    way = Way(weights)
    way.graph.output(draw(way), "y", ir.DataType.FLOAT, ["rows", len(weights)])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    with tempfile.TemporaryDirectory() as folder:
        way.graph.save(Path(folder))
        return onnxruntime.InferenceSession(Path(folder) / "model.onnx", options, providers=["CPUExecutionProvider"])


def best(session: Any, x: Any) -> float:
    """Seconds of the fastest run."""
    fastest, until = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < until:
        begun = time.perf_counter()
        session.run(None, {"x": x})
        fastest = min(fastest, time.perf_counter() - begun)
    return fastest


if __name__ == "__main__":
    main()
