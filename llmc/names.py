"""Canonical tensor names, and what follows from them: shapes, smoothing groups, shard axes.

    embed.weight                          [vocab, hidden]
    layers.N.attn_norm.weight             [hidden]
    layers.N.attn.{q,k,v,o}.weight        [out, in]           .bias [out]
    layers.N.attn.{q,k}_norm.weight       [head_dim]
    layers.N.mlp_norm.weight              [hidden]
    layers.N.mlp.{gate,up,down}.weight    [out, in]           .bias [out]
    norm.weight                           [hidden]
    head.weight                           [vocab, hidden]     absent when tied

Every linear is [out, in] and is applied as y = x W^T + b, whatever the source did. A quantized tensor keeps the name
of its linear: `layers.N.attn.q.qweight`, `.scale`, `.zero` (see llmc/quant/pack.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from llmc.spec import ModelSpec

Shape = tuple[int, ...]


def tensors(spec: ModelSpec) -> dict[str, Shape]:
    """Every tensor of the model and its shape, in the order in which a forward pass meets them."""
    hidden, attention, mlp = spec.hidden_size, spec.attention, spec.mlp
    found: dict[str, Shape] = {"embed.weight": (spec.vocab_size, hidden)}
    for layer in range(spec.num_layers):
        at = f"layers.{layer}"
        found[f"{at}.attn_norm.weight"] = (hidden,)
        for name in ("q", "k", "v"):
            size = spec.q_size if name == "q" else spec.kv_size
            found.update(_linear(f"{at}.attn.{name}", size, hidden, attention.qkv_bias))
            if attention.qk_norm and name != "v":
                found[f"{at}.attn.{name}_norm.weight"] = (attention.head_dim,)
        found.update(_linear(f"{at}.attn.o", hidden, spec.q_size, attention.o_bias))
        found[f"{at}.mlp_norm.weight"] = (hidden,)
        for name in ("gate", "up"):
            found.update(_linear(f"{at}.mlp.{name}", mlp.intermediate_size, hidden, mlp.bias))
        found.update(_linear(f"{at}.mlp.down", hidden, mlp.intermediate_size, mlp.bias))
    found["norm.weight"] = (hidden,)
    if not spec.tied:
        found["head.weight"] = (spec.vocab_size, hidden)
    return found


def _linear(name: str, out_features: int, in_features: int, bias: bool) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (out_features, in_features)
    if bias:
        yield f"{name}.bias", (out_features,)


def matrices(spec: ModelSpec) -> list[str]:
    """Names (without `.weight`) of all that may be quantized: the linears, the embedding and the head."""
    return [name.removesuffix(".weight") for name, shape in tensors(spec).items() if len(shape) == 2]


# What stands before the layers, and what behind them.
FRONT, TAIL = "front", "tail"


def parts(spec: ModelSpec) -> dict[str, list[str]]:
    """What is worked on at a time: "front", "layers.0", ..., "tail" -> names of tensors, in order."""
    found: dict[str, list[str]] = {FRONT: []}
    for name in tensors(spec):
        in_layer = name.startswith("layers.")
        part = ".".join(name.split(".")[:2]) if in_layer else FRONT if len(found) == 1 else TAIL
        found.setdefault(part, []).append(name)
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
        attn, mlp = f"layers.{layer}.attn", f"layers.{layer}.mlp"
        shared = spec.attention.num_heads // spec.attention.num_kv_heads
        groups += [
            SmoothingGroup(f"{attn}_norm", (f"{attn}.q", f"{attn}.k", f"{attn}.v")),
            SmoothingGroup(f"{attn}.v", (f"{attn}.o",), repeat=shared),
            SmoothingGroup(f"{mlp}_norm", (f"{mlp}.gate", f"{mlp}.up")),
            SmoothingGroup(f"{mlp}.up", (f"{mlp}.down",)),
        ]
    return groups


_SPLIT_AXIS = {"q": 0, "k": 0, "v": 0, "gate": 0, "up": 0, "o": 1, "down": 1, "embed": 0, "head": 0}


def shard_axis(name: str) -> int | None:
    """Along which axis tensor parallelism splits a tensor, None where every rank holds it whole.

    Column-parallel linears (q, k, v, gate, up) and the vocabulary split their outputs, row-parallel ones (o, down)
    their inputs (Shoeybi et al. 2019, Megatron-LM, section 3). A row-parallel bias is whole: it is added once, after
    the sum over ranks.
    """
    module, _, kind = name.rpartition(".")
    axis = _SPLIT_AXIS.get(module.rpartition(".")[2])
    if kind == "bias":
        return 0 if axis == 0 else None
    return axis
