"""ModelSpec -> the ONNX graph of a decoder, with the fused operators of ONNX Runtime.

Knows the spec and the canonical names. Does not know families, files or runtimes, nor how weights are stored.

Tokens of all sequences are rows of one matrix [batch * length, hidden]; only attention sees batch and length:

    tokens ── embed ── [+ positions] ──► x
    each layer:
        x ── norm ── qkv ── GroupQueryAttention (rotary, cache) ── o ─► + ──► x
        x ── norm ─┬─ gate ── activation ─► * ── down ────────────────► + ──► x
                   └─ up ─────────────────►
    x ── norm ─┬─ Gather(rows) ── head ──► logits
               └────────────────────────► hidden

An addition and the norm that follows it are one operator, SkipLayerNormalization or SkipSimplifiedLayerNormalization.
Where a prefix sees itself whole, the attention operator masks nothing, and a bias does (onnx_prefix.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from llmc import alibi, names, rope
from llmc.builders import onnx_moe
from llmc.builders.onnx_graph import MICROSOFT, Graph
from llmc.builders.onnx_layers import state_name
from llmc.builders.onnx_linear import Lowering, path
from llmc.builders.onnx_prefix import Prefixes, Rotations, positions
from llmc.errors import UnsupportedModelError
from llmc.recipe import QuantRecipe
from llmc.spec import Alibi, Learned, ModelSpec, Rope

FLOAT, INT8, INT32, INT64 = ir.DataType.FLOAT, ir.DataType.INT8, ir.DataType.INT32, ir.DataType.INT64

# GroupQueryAttention's CPU kernel wants tables whose rows are multiples of 8 pairs.
_TURNED_UNIT = 16

# Kind of norm -> the operator alone, and with an addition before it.
_NORMS = {
    "rms": ("SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization"),
    "layer": ("LayerNormalization", "SkipLayerNormalization"),
}

# Activation -> operator and its options. SiLU(x) = x sigmoid(x) is QuickGelu(x) = x sigmoid(alpha x) with alpha 1: one
# pass instead of two operators.
_ACTIVATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "silu": ("QuickGelu", {"domain": MICROSOFT, "alpha": 1.0}),
    "gelu": ("Gelu", {}),
    "gelu_tanh": ("FastGelu", {"domain": MICROSOFT}),
    "relu": ("Relu", {}),
}


def draw(
    spec: ModelSpec,
    recipe: QuantRecipe | None,
    load: Callable[[str], npt.NDArray[Any]],
    *,
    max_length: int,
    kv_int8: bool,
    accuracy_level: int,
    adapters: bool = False,
    compute: npt.DTypeLike = np.float32,
    fused_experts: bool = True,
) -> Graph:
    """The whole graph, its weights still unread.

    Inputs: tokens int64 [batch, length]; rows int64 [rows], which of the batch * length tokens want logits;
    seqlens_k int32 [batch], each sequence's length after this step minus one; total_sequence_length int32 [], the
    longest of those lengths; past.N.{key,value} [batch, kv_heads, max_length, head_dim]. Of models with a prefix also
    prefix int64 [batch, 2], each sequence's llmc.prefix.Span.
    Outputs: logits float32 [rows, vocab (or labels)]; hidden float32 [tokens, hidden], what the head reads of every
    token, which is there anyhow; present.N.{key,value}, to be bound to the memory of past.N.

    Args:
        load: A tensor of the checkpoint by its canonical name.
        max_length: Positions in the rotary table.
        kv_int8: The cache holds int8, by the checkpoint's scales.
        accuracy_level, adapters, fused_experts: See `Lowering`.
        compute: The type of activations, weights that are not packed, scales, and the cache unless it is int8. What
            goes in and out besides the cache is the same for all: both outputs are cast at the end.
    """
    graph = Graph("decoder", compute)
    tokens = graph.input("tokens", INT64, ["batch", "length"])
    rows = graph.input("rows", INT64, ["rows"])
    lowering = Lowering(graph, spec, recipe, load, accuracy_level, adapters=adapters, fused_experts=fused_experts)
    decoder = _Decoder(spec, graph, lowering, tokens, max_length, kv_int8)

    flat = graph.call("Reshape", [tokens, graph.constant("/tokens/shape", np.array([-1]))], "/tokens")
    x = decoder.embed(flat)
    x.name = state_name(0)
    out = decoder.layers(x) if spec.norm.order != "after" else decoder.layers_with_norms_after(x)
    if spec.embedding_size:
        out = lowering.linear(out, "embed_out")
    elif spec.norm.order == "after":
        # A value has one name, and this one is the last layer's state already.
        out = graph.call("Identity", [out], "/hidden")
    hidden = graph.cast(out, "/hidden/float32", before=graph.compute, after=np.float32)
    graph.output(hidden, "hidden", FLOAT, ["tokens", spec.embedding_size or spec.hidden_size])
    sampled = graph.call("Gather", [out, rows], "/rows")
    head = "score" if spec.score else "embed" if spec.tied else "head"
    logits = lowering.linear(sampled, head, node="/head")
    logits = graph.cast(logits, "/head/float32", before=graph.compute, after=np.float32)
    if spec.normalised_head:
        logits = graph.call("Mul", [logits, lowering.inverse_lengths(head)], "/head/normalised")
    graph.output(logits, "logits", FLOAT, ["rows", spec.score.labels if spec.score else spec.vocab_size])
    decoder.declare_presents()
    return graph


class _Decoder:
    """The parts of a layer, and what all layers share."""

    def __init__(
        self, spec: ModelSpec, graph: Graph, lowering: Lowering, tokens: ir.Value, max_length: int, kv_int8: bool
    ) -> None:
        self.spec, self.graph, self.lowering, self.kv_int8 = spec, graph, lowering, kv_int8
        self.seqlens = graph.input("seqlens_k", INT32, ["batch"])
        self.total = graph.input("total_sequence_length", INT32, [])
        self.rotary: dict[Rope, list[ir.Value | None]] = {}
        if isinstance(spec.position, Rope):
            if spec.position.size(spec.attention.head_dim) % _TURNED_UNIT:
                raise UnsupportedModelError(
                    f"{spec.position.size(spec.attention.head_dim)} dimensions of each head are turned; the attention "
                    f"operator of ONNX Runtime turns multiples of {_TURNED_UNIT}"
                )
            for one in dict.fromkeys(spec.rope_of(layer) for layer in range(spec.num_layers)):
                name = "rotary" if one == spec.position else "rotary.window"
                # On the second of two axes, tokens without a prefix stand one place further.
                tables = rope.rotary_table(spec, max_length + one.axes - 1, context=max_length, of=one)
                self.rotary[one] = [
                    graph.weight(f"{name}.{kind}", graph.compute, table.shape, table.copy)
                    for kind, table in zip(("cos", "sin"), tables, strict=True)
                ]
        self.cache_type = INT8 if kv_int8 else graph.compute_type
        self.cache_shape: list[int | str] = [
            "batch",
            spec.attention.num_kv_heads,
            "max_length",
            spec.attention.head_dim,
        ]
        self.presents: dict[str, ir.Value] = {}
        self.shape = graph.call("Shape", [tokens], "/shape")
        self.batched = graph.call("Concat", [self.shape, graph.constant("/rest", np.array([-1]))], "/batched", axis=0)
        self.flat = graph.constant("/flat", np.array([-1, spec.q_size]))
        self.bias = self.linear_biases() if isinstance(spec.position, Alibi) else None
        self.prefixes = Prefixes(graph, self.shape, self.seqlens, self.total) if spec.prefix else None
        self.rotations: Rotations | None = None
        if self.prefixes:
            masked = self.prefixes.bias
            self.bias = graph.call("Add", [self.bias, masked], "/prefix/biases") if self.bias is not None else masked
            if isinstance(spec.position, Rope) and spec.position.axes == 2:
                self.rotations = Rotations(self.prefixes, self.rotary.pop(spec.position))

    def embed(self, tokens: ir.Value) -> ir.Value:
        """What the first layer is given of the tokens [batch * length]."""
        x = self.lowering.embedding(tokens, "embed")
        if self.spec.embedding_scale != 1:
            scale = self.graph.number("/embed/scale", self.spec.embedding_scale)
            x = self.graph.call("Mul", [x, scale], "/embed/scaled")
        if self.spec.embedding_size:
            x = self.lowering.linear(x, "embed_in")
        if self.spec.norm.embedding:
            x = self.norm(x, "embed_norm")
        if isinstance(self.spec.position, Learned):
            x = self.graph.call("Add", [x, self.positions(self.spec.position.offset)], "/positions/added")
        return x

    def linear_biases(self) -> ir.Value:
        """ALiBi: what is added to scores, [batch, heads, length, total].

        Counted from each query's own position and in float32, and only then made what the graph computes in: softmax
        would take out a common distance, but 11 bits of a large one leave nothing of the small differences.
        """
        graph = self.graph

        def number(name: str, values: Any) -> ir.Value:
            return graph.constant(f"/alibi/{name}", np.array(values))

        total = graph.call("Cast", [self.total], "/alibi/total", to=INT64)
        keys = graph.call("Range", [number("zero", 0), total, number("one", 1)], "/alibi/keys")
        here = positions(graph, "/alibi/positions", self.shape, self.seqlens)
        queries = graph.call("Unsqueeze", [here, number("axes", [1, 3])], "/alibi/queries")
        behind = graph.call("Sub", [keys, queries], "/alibi/behind")
        distances = graph.call("Cast", [behind], "/alibi/distances", to=FLOAT)
        slopes = alibi.slopes(self.spec.attention.num_heads).reshape(1, -1, 1, 1)
        biases = graph.call("Mul", [distances, graph.constant("/alibi/slopes", slopes)], "/alibi")
        return graph.cast(biases, "/alibi/narrow", before=np.float32, after=graph.compute)

    def layers(self, x: ir.Value) -> ir.Value:
        """All layers, and the norm at the end."""
        normed = self.norm(x, "layers.0.attn_norm")
        for layer in range(self.spec.num_layers):
            following = f"layers.{layer + 1}.attn_norm" if layer + 1 < self.spec.num_layers else "norm"
            mixed = self.post_norm(self.attention(normed, layer), f"layers.{layer}.attn_post_norm")
            x = self.residual(x, normed, f"layers.{layer}.attn")
            normed, x = self.add_norm(x, mixed, f"layers.{layer}.mlp_norm")
            mixed = self.post_norm(self.mix(normed, layer), f"layers.{layer}.mlp_post_norm")
            x = self.residual(x, normed, f"layers.{layer}.mlp")
            normed, x = self.add_norm(x, mixed, following)
            x.name = state_name(layer + 1)
        return normed

    def post_norm(self, x: ir.Value, name: str) -> ir.Value:
        """An output as it is added to the residual stream."""
        return self.norm(x, name) if self.spec.norm.order == "both" else x

    def residual(self, x: ir.Value, normed: ir.Value, name: str) -> ir.Value:
        """What an output is added to, of the input as it came and normalised."""
        if not self.spec.norm.residual_scale:
            return x
        scale = self.graph.number(f"{path(name)}/scale", self.spec.norm.residual_scale)
        return self.graph.call("Mul", [normed, scale], f"{path(name)}/residual")

    def layers_with_norms_after(self, x: ir.Value) -> ir.Value:
        """All layers, where the sum is normalised and goes on so."""
        for layer in range(self.spec.num_layers):
            x, _ = self.add_norm(x, self.attention(x, layer), f"layers.{layer}.attn_norm")
            x, _ = self.add_norm(x, self.mix(x, layer), f"layers.{layer}.mlp_norm")
            x.name = state_name(layer + 1)
        return x

    def norm(self, x: ir.Value, name: str) -> ir.Value:
        """x normalised over its last axis."""
        operator, _ = _NORMS[self.spec.norm.kind]
        inputs = [x, *self._norm_weights(name)]
        return self.graph.call(operator, inputs, path(name), epsilon=self.spec.norm.eps, axis=-1)

    def add_norm(self, x: ir.Value, y: ir.Value, name: str) -> tuple[ir.Value, ir.Value]:
        """(norm(x + y), x + y)."""
        _, operator = _NORMS[self.spec.norm.kind]
        inputs = [x, y, *self._norm_weights(name)]
        normed, _, _, added = self.graph.node(
            operator, inputs, path(name), domain=MICROSOFT, outputs=4, epsilon=self.spec.norm.eps
        )
        return normed, added

    def _norm_weights(self, name: str) -> list[ir.Value]:
        is_head = name.endswith(("q_norm", "k_norm"))
        size = self.spec.attention.head_dim if is_head else self.spec.hidden_size
        if self.spec.norm.plus_one:
            weight = f"{name}.weight"
            load = self.lowering.load
            return [self.graph.weight(weight, self.graph.compute, (size,), lambda: load(weight).astype(np.float32) + 1)]
        kinds = ("weight", "bias") if self.spec.norm.kind == "layer" else ("weight",)
        return [self.lowering.weight([name], kind, (size,)) for kind in kinds]

    def positions(self, offset: int) -> ir.Value:
        """Rows of the learned positions of all tokens, [batch * length, hidden]."""
        table = positions(self.graph, "/positions", self.shape, self.seqlens, offset=offset)
        flat = self.graph.constant("/positions/flat", np.array([-1]))
        return self.lowering.embedding(self.graph.call("Reshape", [table, flat], "/positions/flat_rows"), "positions")

    def attention(self, x: ir.Value, layer: int) -> ir.Value:
        """o(attention(rotary(q), rotary(k), v)).

            x ── qkv ─────────────────────► GroupQueryAttention ── o ──►
        or, when heads are normalised,
            x ── q ── [heads] ── norm ──►
            x ── k ── [heads] ── norm ──►   GroupQueryAttention ── o ──►
            x ── v ─────────────────────►
        and likewise where heads are turned on two axes.
        """
        graph, spec, at = self.graph, self.spec.attention, f"layers.{layer}.attn"
        past = [graph.input(f"past.{layer}.{kind}", self.cache_type, self.cache_shape) for kind in ("key", "value")]
        quantized: dict[str, Any] = {}
        scales: list[ir.Value | None] = []
        if self.kv_int8:
            shape = (1, spec.num_kv_heads, 1, spec.head_dim)
            scales = [None, *(self.lowering.weight([at], f"{kv}_scale", shape, np.float32) for kv in "kv")]
            quantized = {"kv_cache_bit_width": 8, "k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL"}
        rotary = self.rotary[self.spec.rope_of(layer)] if self.rotary else [None, None]
        out, key, value = graph.node(
            "GroupQueryAttention",
            [*self._qkv(x, at), *past, self.seqlens, self.total, *rotary, None, self.bias, *scales],
            path(at),
            domain=MICROSOFT,
            outputs=3,
            num_heads=spec.num_heads,
            kv_num_heads=spec.num_kv_heads,
            do_rotary=int(bool(self.rotary)),
            rotary_interleaved=int(isinstance(self.spec.position, Rope) and self.spec.position.interleaved),
            local_window_size=self.spec.window(layer) or -1,
            scale=spec.scale or 0.0,
            **({"causal": 0} if self.prefixes else {}),
            **quantized,
        )
        self.presents[f"present.{layer}.key"] = key
        self.presents[f"present.{layer}.value"] = value
        return self.lowering.linear(graph.call("Reshape", [out, self.flat], f"{path(at)}/rows"), f"{at}.o")

    def _qkv(self, x: ir.Value, at: str) -> list[ir.Value | None]:
        """Attention's first three inputs: packed in the first where one product can make them."""
        parts = [f"{at}.{name}" for name in "qkv"]
        is_plain = not self.spec.attention.qk_norm and self.rotations is None
        if is_plain and self.lowering.alike(*parts):
            packed = self.lowering.linear(x, *parts, node=path(f"{at}.qkv"))
            return [self._batch(packed, f"{at}.qkv"), None, None]
        made = [self.lowering.linear(x, part) for part in parts]
        if self.spec.attention.qk_norm:
            # The operator has inputs for these norms, but its CPU kernel refuses them.
            made[:2] = [self._norm_heads(y, part) for y, part in zip(made[:2], parts, strict=False)]
        batched: list[ir.Value | None] = [self._batch(y, part) for y, part in zip(made, parts, strict=True)]
        if self.rotations:
            rope, of = self.spec.rope, self.spec.attention
            batched[:2] = [
                self.rotations.turn(y, f"{path(part)}/turned", rope, heads, of.head_dim)
                for y, part, heads in zip(batched, parts, (of.num_heads, of.num_kv_heads), strict=False)
            ]
        return batched

    def _norm_heads(self, x: ir.Value, name: str) -> ir.Value:
        shape = self.graph.constant(f"{path(name)}/head", np.array([-1, self.spec.attention.head_dim]))
        return self.norm(self.graph.call("Reshape", [x, shape], f"{path(name)}/heads"), f"{name}_norm")

    def _batch(self, x: ir.Value, name: str) -> ir.Value:
        return self.graph.call("Reshape", [x, self.batched], f"{path(name)}/batched")

    def mix(self, x: ir.Value, layer: int) -> ir.Value:
        """The layer's MLP, or its mixture of experts."""
        moe = self.spec.experts(layer)
        if moe is None:
            return self.mlp(x, f"layers.{layer}.mlp")
        return onnx_moe.mixture(self.lowering, self.spec, moe, self.mlp, x, f"layers.{layer}.moe")

    def mlp(self, x: ir.Value, at: str) -> ir.Value:
        """down(activation(gate(x)) * up(x)), or down(activation(up(x)))."""
        activation = self.spec.mlp.activation
        operator, options = _ACTIVATIONS[activation]
        made = [self.lowering.linear(x, f"{at}.{name}") for name in names.inputs_of_mlp(self.spec)]
        inner = self.graph.call(operator, made[:1], path(f"{at}.{activation}"), **options)
        if self.spec.mlp.gated:
            inner = self.graph.call("Mul", [inner, made[1]], path(f"{at}.product"))
        return self.lowering.linear(inner, f"{at}.down")

    def declare_presents(self) -> None:
        for name, value in self.presents.items():
            self.graph.output(value, name, self.cache_type, self.cache_shape)
