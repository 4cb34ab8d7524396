"""A prefix that sees itself whole, and places on two axes, as ONNX nodes.

    seqlens_k, shape ──► positions [batch, length] ─┬─ Where(< length of prefix, itself, mark) ──► first ──┐
    prefix ──► length, mark ────────────────────────┴─ Max(itself - length of prefix + 1, 0) ───► second ──┤
    bias [batch, 1, length, total] = 0 where key <= position or key < length of prefix, else -infinity     │
    cos, sin [batch * length, pairs] = Concat(Gather(table, first), Gather(table, second)) ◄───────────────┘
    q, k ── RotaryEmbedding(cos, sin) ──►          before the attention operator, whose own rotation has one axis

The bias of one new token is one row: decoding needs memory for the keys, not for their square.

Knows what llmc/prefix.py says. Does not know layers or weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from llmc.builders.onnx_graph import MICROSOFT, Graph
from llmc.spec import Rope

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64


def positions(graph: Graph, at: str, shape: ir.Value, seqlens: ir.Value, *, offset: int = 0) -> ir.Value:
    """The positions of all new tokens plus `offset`, [batch, length].

    A sequence's new tokens are its last: the first of them stands at seqlens_k + 1 - length.

    Args:
        at: Where the nodes' names begin.
        shape: Of the tokens, [batch, length].
    """

    def number(name: str, values: Any) -> ir.Value:
        return graph.constant(f"{at}/{name}", np.array(values))

    length = graph.call("Gather", [shape, number("axis", 1)], f"{at}/length")
    new = graph.call("Range", [number("zero", 0), length, number("one", 1)], f"{at}/new")
    last = graph.call("Cast", [seqlens], f"{at}/last", to=INT64)
    end = graph.call("Add", [last, number("offset", offset + 1)], f"{at}/end")
    first = graph.call("Sub", [end, length], f"{at}/first")
    column = graph.call("Unsqueeze", [first, number("column", [1])], f"{at}/begin")
    return graph.call("Add", [column, new], f"{at}/rows")


class Prefixes:
    """What follows from the input `prefix` for all layers.

    Attributes:
        positions: Of the new tokens, [batch, length].
        length, mark: The two columns of the input, [batch, 1].
        bias: What is added to scores, [batch, 1, length, total].
    """

    def __init__(self, graph: Graph, shape: ir.Value, seqlens: ir.Value, total: ir.Value) -> None:
        self.graph, self.shape = graph, shape
        spans = graph.input("prefix", INT64, ["batch", 2])
        self.positions = positions(graph, "/prefix/positions", shape, seqlens)
        self.length, self.mark = graph.node(
            "Split", [spans, self.number("sizes", [1, 1])], "/prefix/parts", outputs=2, axis=1
        )
        self.bias = self._bias(total)

    def number(self, name: str, values: Any) -> ir.Value:
        """A constant."""
        return self.graph.constant(f"/prefix/{name}", np.array(values))

    def _bias(self, total: ir.Value) -> ir.Value:
        graph, last = self.graph, self.number("last", [2])
        count = graph.call("Cast", [total], "/prefix/total", to=INT64)
        keys = graph.call("Range", [self.number("zero", 0), count, self.number("step", 1)], "/prefix/keys")
        queries = graph.call("Unsqueeze", [self.positions, last], "/prefix/queries")
        length = graph.call("Unsqueeze", [self.length, last], "/prefix/length")
        before = graph.call("LessOrEqual", [keys, queries], "/prefix/before")
        inside = graph.call("Less", [keys, length], "/prefix/inside")
        seen = graph.call("Or", [before, inside], "/prefix/seen")
        nothing, far = (self.number(name, graph.compute.type(x)) for name, x in (("nothing", 0), ("far", -np.inf)))
        bias = graph.call("Where", [seen, nothing, far], "/prefix/bias")
        return graph.call("Unsqueeze", [bias, self.number("heads", [1])], "/prefix/bias_of_heads")


class Rotations:
    """The rotation of the new tokens on two axes."""

    def __init__(self, of: Prefixes, tables: list[ir.Value | None]) -> None:
        """Look up where they stand in `tables`: cos, sin [places, pairs of an axis]."""
        graph, self._graph, one = of.graph, of.graph, of.number("one", 1)
        inside = graph.call("Less", [of.positions, of.length], "/rotation/inside")
        first = graph.call("Where", [inside, of.positions, of.mark], "/rotation/first")
        behind = graph.call("Sub", [of.positions, of.length], "/rotation/behind")
        counted = graph.call("Add", [behind, one], "/rotation/counted")
        second = graph.call("Max", [counted, of.number("none", 0)], "/rotation/second")
        flat = of.number("flat", [-1])
        axes = [graph.call("Reshape", [axis, flat], f"{axis.name}/rows") for axis in (first, second)]
        size = graph.call("Size", [first], "/rotation/size")
        count = graph.call("Range", [of.number("from", 0), size, one], "/rotation/count")
        self._inputs: list[ir.Value | None] = [graph.call("Reshape", [count, of.shape], "/rotation/row")]
        for kind, table in zip(("cos", "sin"), tables, strict=True):
            halves = [graph.call("Gather", [table, rows], f"{rows.name}/{kind}") for rows in axes]
            self._inputs.append(graph.call("Concat", halves, f"/rotation/{kind}", axis=1))

    def turn(self, x: ir.Value | None, name: str, rope: Rope, heads: int, head_dim: int) -> ir.Value:
        """Turn x [batch, length, heads * head_dim]."""
        size = rope.size(head_dim)
        return self._graph.call(
            "RotaryEmbedding",
            [x, *self._inputs],
            name,
            domain=MICROSOFT,
            num_heads=heads,
            rotary_embedding_dim=0 if size == head_dim else size,
            interleaved=int(rope.interleaved),
        )
