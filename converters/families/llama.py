"""LLaMA 1, 2 and 3.x (Meta), and the rules of tensors that its relatives use as they are."""

from __future__ import annotations

from typing import Any

from llmc.converters.decoder_config import read_decoder, write_decoder
from llmc.converters.reader import Reader
from llmc.converters.rules import Family, Rule
from llmc.spec import ModelSpec

_THEIRS = "model.layers.{layer}."
_LINEARS = {f"attn.{name}": f"self_attn.{name}_proj" for name in "qkvo"} | {
    f"mlp.{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")
}
_NORMS = {
    "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "attn.q_norm": "self_attn.q_norm",
    "attn.k_norm": "self_attn.k_norm",
}

RULES = (
    Rule("embed.weight", "model.embed_tokens.weight"),
    *(Rule(f"layers.{{layer}}.{ours}.weight", f"{_THEIRS}{theirs}.weight") for ours, theirs in _NORMS.items()),
    *(
        Rule(f"layers.{{layer}}.{ours}.{kind}", f"{_THEIRS}{theirs}.{kind}")
        for ours, theirs in _LINEARS.items()
        for kind in ("weight", "bias")
    ),
    Rule("norm.weight", "model.norm.weight"),
    Rule("head.weight", "lm_head.weight"),
)

# Older versions of transformers saved the table of rotary frequencies, which follows from the config.
DROPPED = ("model.layers.*.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")


def read(reader: Reader) -> ModelSpec:
    bias = reader.flag("attention_bias")
    return read_decoder(
        reader, "llama", num_kv_heads=None, max_positions=2048,
        qkv_bias=bias, o_bias=bias, mlp_bias=reader.flag("mlp_bias"),
    )  # fmt: skip


def write(spec: ModelSpec) -> dict[str, Any]:
    return write_decoder(spec, "LlamaForCausalLM", attention_bias=spec.attention.o_bias, mlp_bias=spec.mlp.bias)


FAMILY = Family("llama", ("LlamaForCausalLM", "LLaMAForCausalLM"), read, write, RULES, DROPPED)
