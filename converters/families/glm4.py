"""GLM-4-0414 (Zhipu AI): GLM-4 with the outputs of attention and MLP normalised as well."""

from __future__ import annotations

from typing import Any

from llmc.converters.chatglm_config import HALF_IN_NEIGHBOURS
from llmc.converters.decoder_config import read_decoder, write_decoder
from llmc.converters.families import glm, llama
from llmc.converters.reader import Reader
from llmc.converters.rules import Family, Rule
from llmc.spec import ModelSpec

_OURS, _THEIRS = "layers.{layer}.", "model.layers.{layer}."

RULES = (
    *glm.RULES,
    Rule(_OURS + "attn_post_norm.weight", _THEIRS + "post_self_attn_layernorm.weight"),
    Rule(_OURS + "mlp_post_norm.weight", _THEIRS + "post_mlp_layernorm.weight"),
)


def read(reader: Reader) -> ModelSpec:
    return read_decoder(
        reader, "glm4", num_kv_heads=2, max_positions=131072, head_dim=128, eps=1.5625e-07, norms="both",
        rope=HALF_IN_NEIGHBOURS, qkv_bias=reader.flag("attention_bias", default=True),
    )  # fmt: skip


def write(spec: ModelSpec) -> dict[str, Any]:
    return write_decoder(spec, "Glm4ForCausalLM", attention_bias=spec.attention.qkv_bias)


FAMILY = Family("glm4", ("Glm4ForCausalLM",), read, write, RULES, llama.DROPPED)
