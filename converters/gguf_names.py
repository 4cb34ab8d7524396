"""What GGUF calls the tensors of each architecture, as rules (gguf.constants has the names: TENSOR_NAMES).

    blk.N.attn_{q,k,v,output}.weight    or blk.N.attn_qkv.weight, q above k above v
    blk.N.ffn_{gate,up,down}.weight     GLM has gate above up in blk.N.ffn_up.weight
    blk.N.ffn_gate_exps.weight          [experts, out, in], seen as the older blk.N.ffn_gate.E.weight: see `expert_name`

Architectures "llama" and "baichuan" have the rows of q and k permuted for a rotation of neighbours (llama.cpp,
convert_hf_to_gguf.py, `permute`); here they are put back, so that the head's halves form the pairs.

Gemma's norms are kept here as 1 + the authors' weight: see `is_norm`.

Knows: names and layouts. Does not know: settings (gguf_settings.py), the file.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from llmc.converters.ops import STACKED
from llmc.converters.rules import SAME, Op, Rule
from llmc.names import Shape
from llmc.spec import ModelSpec
from llmc.tensors import Array

ROPE_FACTORS = "rope_freqs.weight"
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
FUSED_QKV = "blk.0.attn_qkv.weight"
# A matrix of one row, which llama.cpp reads as such and as a vector.
VECTOR = "ffn_gate_inp_shexp.weight"


def _halves_from_neighbours(source: Array, _shapes: Sequence[Shape], spec: ModelSpec) -> list[Array]:
    """Rows of each head from (0, n/2, 1, n/2 + 1, ...) to (0, 1, ... n - 1)."""
    heads = source.reshape(-1, spec.attention.head_dim // 2, 2, *source.shape[1:])
    return [heads.swapaxes(1, 2).reshape(source.shape)]


def _neighbours_from_halves(parts: Sequence[Array], spec: ModelSpec) -> Array:
    heads = parts[0].reshape(-1, 2, spec.attention.head_dim // 2, *parts[0].shape[1:])
    return heads.swapaxes(1, 2).reshape(parts[0].shape)


UNPERMUTE = Op(_halves_from_neighbours, _neighbours_from_halves, lambda shapes: shapes[0])
_ONE_ROW = Op(
    split=lambda source, shapes, _spec: [source.reshape(shapes[0])],
    join=lambda parts, _spec: parts[0].reshape(-1),
    source_shape=lambda shapes: (shapes[0][1],),
)


@dataclass(frozen=True, slots=True)
class Layout:
    """How an architecture lays out what others lay out otherwise.

    Attributes:
        rotated: What stands between its q and k and ours.
        fused_qkv: q, k and v are written as one tensor; reading takes either.
        fused_mlp: So are gate and up, under the name of up.
    """

    rotated: Op = SAME
    fused_qkv: bool = False
    fused_mlp: bool = False


LAYOUTS = {
    "llama": Layout(UNPERMUTE),
    "baichuan": Layout(UNPERMUTE),
    "qwen": Layout(fused_qkv=True),
    "qwen2": Layout(),
    "qwen2moe": Layout(),
    "qwen3": Layout(),
    "qwen3moe": Layout(),
    "gpt2": Layout(fused_qkv=True),
    "bloom": Layout(fused_qkv=True),
    "chatglm": Layout(fused_qkv=True, fused_mlp=True),
    "glm4": Layout(fused_mlp=True),
    "gemma3": Layout(),
}

_OURS, _THEIRS = "layers.{layer}.", "blk.{layer}."
# Modules of a layer, without those of `_qkv` and `_mlp`.
_NAMES = {
    "attn_norm": "attn_norm",
    "attn.q_norm": "attn_q_norm",
    "attn.k_norm": "attn_k_norm",
    "attn.o": "attn_output",
    "attn_post_norm": "post_attention_norm",
    "mlp_norm": "ffn_norm",
    "mlp.down": "ffn_down",
    "moe.router": "ffn_gate_inp",
    **{f"moe.experts.{{expert}}.{name}": f"ffn_{name}.{{expert}}" for name in ("gate", "up", "down")},
    **{f"moe.shared.{name}": f"ffn_{name}_shexp" for name in ("gate", "up", "down")},
    "mlp_post_norm": "post_ffw_norm",
}
_OUTSIDE = {
    "embed": "token_embd",
    "embed_norm": "token_embd_norm",
    "positions": "position_embd",
    "norm": "output_norm",
    "head": "output",
}


def rules(architecture: str, *, fused_qkv: bool | None = None) -> tuple[Rule, ...]:
    """The tensors of an architecture.

    Args:
        fused_qkv: Whether q, k and v are one tensor; None as the architecture has it.
    """
    layout = LAYOUTS[architecture]
    return (
        *(rule for ours, theirs in _OUTSIDE.items() for rule in _pair(ours, theirs)),
        *_qkv(layout, layout.fused_qkv if fused_qkv is None else fused_qkv),
        *_mlp(layout),
        *(rule for ours, theirs in _NAMES.items() for rule in _pair(_OURS + ours, _THEIRS + theirs)),
        Rule(f"{_OURS}moe.shared_gate.weight", _THEIRS + VECTOR, _ONE_ROW),
    )


def _pair(ours: str | tuple[str, ...], theirs: str, op: Op = SAME) -> list[Rule]:
    parts = (ours,) if isinstance(ours, str) else ours
    return [Rule(tuple(f"{part}.{kind}" for part in parts), f"{theirs}.{kind}", op) for kind in ("weight", "bias")]


def _qkv(layout: Layout, fused: bool) -> list[Rule]:
    if fused:
        return _pair(tuple(f"{_OURS}attn.{name}" for name in "qkv"), _THEIRS + "attn_qkv", STACKED)
    ops = {"q": layout.rotated, "k": layout.rotated, "v": SAME}
    return [rule for name, op in ops.items() for rule in _pair(f"{_OURS}attn.{name}", f"{_THEIRS}attn_{name}", op)]


def _mlp(layout: Layout) -> list[Rule]:
    if layout.fused_mlp:
        return _pair((f"{_OURS}mlp.gate", f"{_OURS}mlp.up"), _THEIRS + "ffn_up", STACKED)
    return [rule for name in ("gate", "up") for rule in _pair(f"{_OURS}mlp.{name}", f"{_THEIRS}ffn_{name}")]


_STACK = re.compile(r"(blk\.\d+\.ffn_(?:gate|up|down))_exps\.weight")
_EXPERT = re.compile(r"(blk\.\d+\.ffn_(?:gate|up|down))\.(\d+)\.weight")


def expert_name(stack: str, expert: int) -> str | None:
    """The name of one expert of a stack, as files of before 2024 had it; None when the name is not one of a stack."""
    met = _STACK.fullmatch(stack)
    return f"{met[1]}.{expert}.weight" if met else None


def stack_name(expert: str) -> str | None:
    """The inverse of `expert_name`: the stack that an expert's tensor is a part of."""
    met = _EXPERT.fullmatch(expert)
    return f"{met[1]}_exps.weight" if met else None


def is_norm(name: str) -> bool:
    """Whether a tensor is a norm's weight, which GGUF has with its one added where the authors add it in the code."""
    return name.endswith("norm.weight")
