"""Canonical tensor names, and what follows from them: shapes, smoothing groups, shard axes.

    embed.weight                          [vocab, hidden]
    embed_{in,out}.weight                 [out, in]                           where the embedding has a size of its own
    embed_norm.weight                     [hidden]            .bias           where embeddings are normalised
    positions.weight                      [offset + max_positions, hidden]    where positions are learned
    layers.N.attn_norm.weight             [hidden]            .bias [hidden], as of every LayerNorm
    layers.N.attn.{q,k,v,o}.weight        [out, in]           .bias [out]
    layers.N.attn.{q,k}_norm.weight       [head_dim]
    layers.N.mlp_norm.weight              [hidden]
    layers.N.mlp.{gate,up,down}.weight    [out, in]           .bias [out]     no gate where the MLP is not gated
    layers.N.moe.router.weight            [experts, hidden]   in place of the mlp; so are the next three
    layers.N.moe.experts.E.{gate,up,down}.weight
    layers.N.moe.shared.{gate,up,down}.weight                 where there is a shared expert
    layers.N.moe.shared_gate.weight       [1, hidden]
    layers.N.{attn,mlp}_post_norm.weight  [hidden]            where outputs are normalised before they are added
    norm.weight                           [hidden]
    head.weight                           [vocab, hidden]     absent when tied
    score.weight                          [labels, hidden]    in place of the head where there is a scoring head

Every linear is [out, in] and is applied as y = x W^T + b, whatever the source did. A quantized tensor keeps the name
of its linear: `layers.N.attn.q.qweight`, `.scale`, `.scale_2`, `.zero` (see llmc/quant/pack.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from llmc.spec import Learned, ModelSpec, Moe

Shape = tuple[int, ...]


def tensors(spec: ModelSpec) -> dict[str, Shape]:
    """Every tensor of the model and its shape, in the order in which a forward pass meets them."""
    hidden, attention = spec.hidden_size, spec.attention
    width = spec.embedding_size or hidden
    found: dict[str, Shape] = {"embed.weight": (spec.vocab_size, width)}
    if spec.embedding_size:
        found["embed_in.weight"] = (hidden, width)
    if spec.norm.embedding:
        found.update(_norm(spec, "embed_norm", hidden))
    if isinstance(spec.position, Learned):
        found["positions.weight"] = (spec.position.offset + spec.max_positions, hidden)
    for layer in range(spec.num_layers):
        at = f"layers.{layer}"
        found.update(_norm(spec, f"{at}.attn_norm", hidden))
        for name in ("q", "k", "v"):
            size = spec.q_size if name == "q" else spec.kv_size
            found.update(_linear(f"{at}.attn.{name}", size, hidden, attention.qkv_bias))
            if attention.qk_norm and name != "v":
                found.update(_norm(spec, f"{at}.attn.{name}_norm", attention.head_dim))
        found.update(_linear(f"{at}.attn.o", hidden, spec.q_size, attention.o_bias))
        if spec.norm.order == "both":
            found.update(_norm(spec, f"{at}.attn_post_norm", hidden))
        found.update(_norm(spec, f"{at}.mlp_norm", hidden))
        if moe := spec.experts(layer):
            found.update(_moe(spec, f"{at}.moe", moe))
        else:
            found.update(_mlp(spec, f"{at}.mlp", spec.mlp.intermediate_size))
        if spec.norm.order == "both":
            found.update(_norm(spec, f"{at}.mlp_post_norm", hidden))
    if spec.norm.order != "after":
        found.update(_norm(spec, "norm", hidden))
    if spec.embedding_size:
        found["embed_out.weight"] = (width, hidden)
    if spec.score:
        found["score.weight"] = (spec.score.labels, width)
    elif not spec.tied:
        found["head.weight"] = (spec.vocab_size, width)
    return found


def _mlp(spec: ModelSpec, at: str, inner: int) -> Iterator[tuple[str, Shape]]:
    for name in inputs_of_mlp(spec):
        yield from _linear(f"{at}.{name}", inner, spec.hidden_size, spec.mlp.bias)
    yield from _linear(f"{at}.down", spec.hidden_size, inner, spec.mlp.bias)


def _moe(spec: ModelSpec, at: str, moe: Moe) -> Iterator[tuple[str, Shape]]:
    yield from _linear(f"{at}.router", moe.num_experts, spec.hidden_size, False)
    for expert in range(moe.num_experts):
        yield from _mlp(spec, f"{at}.experts.{expert}", moe.intermediate_size)
    if moe.shared_size:
        yield from _mlp(spec, f"{at}.shared", moe.shared_size)
        yield from _linear(f"{at}.shared_gate", 1, spec.hidden_size, False)


def mlps_of(spec: ModelSpec, layer: int) -> list[str]:
    """The MLPs of a layer: one, or its experts."""
    moe = spec.experts(layer)
    if moe is None:
        return [f"layers.{layer}.mlp"]
    at = f"layers.{layer}.moe"
    return [f"{at}.experts.{expert}" for expert in range(moe.num_experts)] + [f"{at}.shared"] * bool(moe.shared_size)


def _routers(spec: ModelSpec, layer: int) -> tuple[str, ...]:
    """What weighs a layer's experts, and reads what they read."""
    moe = spec.experts(layer)
    if moe is None:
        return ()
    return (f"layers.{layer}.moe.router",) + (f"layers.{layer}.moe.shared_gate",) * bool(moe.shared_size)


def inputs_of_mlp(spec: ModelSpec) -> tuple[str, ...]:
    """The linears that an MLP's input goes through."""
    return ("gate", "up") if spec.mlp.gated else ("up",)


def _norm(spec: ModelSpec, name: str, size: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (size,)
    if spec.norm.kind == "layer":
        yield f"{name}.bias", (size,)


def _linear(name: str, out_features: int, in_features: int, bias: bool) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (out_features, in_features)
    if bias:
        yield f"{name}.bias", (out_features,)


def matrices(spec: ModelSpec) -> list[str]:
    """Names (without `.weight`) of all that may be quantized: the linears, the embedding and the head."""
    return [name.removesuffix(".weight") for name, shape in tensors(spec).items() if is_matrix(name, shape)]


def kinds(matrices: Iterable[str]) -> list[str]:
    """Globs of names with layers and experts left open: embed, layers.*.attn.q, ..."""
    parts = (name.split(".") for name in matrices)
    return list(dict.fromkeys(".".join("*" if part.isdigit() else part for part in name) for name in parts))


def is_matrix(name: str, shape: Shape) -> bool:
    """Whether a tensor may be quantized.

    Learned positions are few, and every token's error would be theirs too; a router is small, and an error there is
    another expert; so is a scoring head, and all of the answer.
    """
    kept = ("positions.weight", "score.weight", "moe.router.weight", "_gate.weight")
    return len(shape) == 2 and not name.endswith(kept)


# What stands before the layers, and what behind them.
FRONT, TAIL = "front", "tail"


def parts(spec: ModelSpec) -> dict[str, list[str]]:
    """What is worked on at a time: "front", "layers.0", ..., "tail" -> names of tensors, in order."""
    found: dict[str, list[str]] = {FRONT: []}
    for name in tensors(spec):
        in_layer = name.startswith("layers.")
        part = ".".join(name.split(".")[:2]) if in_layer else FRONT if len(found) == 1 else TAIL
        found.setdefault(part, []).append(name)
    found.setdefault(TAIL, [])
    return found


@dataclass(frozen=True, slots=True)
class SmoothingGroup:
    """A scale per channel may move from the inputs of `targets` into the output of `source`, and nothing changes.

    Attributes:
        source: A norm or a linear, its rows being the channels.
        targets: Linears that all read exactly that output, so that one vector must serve them all.
        repeat: How often each channel of the source is met in the target: with grouped-query attention one value
            channel feeds `num_heads / num_kv_heads` columns of `o`.
    """

    source: str
    targets: tuple[str, ...]
    repeat: int = 1


def smoothing_groups(spec: ModelSpec) -> list[SmoothingGroup]:
    """What SmoothQuant and AWQ may fold into what, layer by layer."""
    groups = []
    for layer in range(spec.num_layers):
        attn, mlps = f"layers.{layer}.attn", mlps_of(spec, layer)
        readers = tuple(f"{mlp}.{name}" for mlp in mlps for name in inputs_of_mlp(spec))
        shared = spec.attention.num_heads // spec.attention.num_kv_heads
        groups.append(SmoothingGroup(f"{attn}.v", (f"{attn}.o",), repeat=shared))
        # A norm that stands after an addition, or goes on as the residual stream, is read by the next addition as well,
        # and a factor of 1 + weight is none of the weight.
        if spec.norm.order != "after" and not spec.norm.plus_one and not spec.norm.residual_scale:
            groups += [
                SmoothingGroup(f"{attn}_norm", (f"{attn}.q", f"{attn}.k", f"{attn}.v")),
                SmoothingGroup(f"layers.{layer}.mlp_norm", readers + _routers(spec, layer)),
            ]
        # A factor passes through a product and through max(0, x), and through no other activation.
        if spec.mlp.gated or spec.mlp.activation == "relu":
            groups += [SmoothingGroup(f"{mlp}.up", (f"{mlp}.down",)) for mlp in mlps]
    return groups


_SPLIT_AXIS = {"q": 0, "k": 0, "v": 0, "gate": 0, "up": 0, "o": 1, "down": 1, "embed": 0, "head": 0}


def shard_axis(name: str) -> int | None:
    """Along which axis tensor parallelism splits a tensor, None where every rank holds it whole.

    Column-parallel linears (q, k, v, gate, up) and the vocabulary split their outputs, row-parallel ones (o, down)
    their inputs (Shoeybi et al. 2019, Megatron-LM, section 3). A row-parallel bias is whole: it is added once, after
    the sum over ranks. So are `embed_in` and `embed_out`, which are small.
    """
    module, _, kind = name.rpartition(".")
    axis = _SPLIT_AXIS.get(module.rpartition(".")[2])
    if kind == "bias":
        return 0 if axis == 0 else None
    return axis
