"""GLM-4-9B (Zhipu AI): LLaMA with half of each head turned, in neighbours, and with gate and up in one linear."""

from __future__ import annotations

from typing import Any

from llmc.converters.chatglm_config import HALF_IN_NEIGHBOURS
from llmc.converters.decoder_config import read_decoder, write_decoder
from llmc.converters.families import llama
from llmc.converters.ops import STACKED
from llmc.converters.reader import Reader
from llmc.converters.rules import Family, Rule
from llmc.spec import ModelSpec

_FUSED = tuple(f"layers.{{layer}}.mlp.{name}.weight" for name in ("gate", "up"))

RULES = (
    *(rule for rule in llama.RULES if rule.ours not in _FUSED),
    Rule(_FUSED, "model.layers.{layer}.mlp.gate_up_proj.weight", STACKED),
)


def read(reader: Reader) -> ModelSpec:
    return read_decoder(
        reader, "glm", num_kv_heads=2, max_positions=131072, head_dim=128, eps=1.5625e-07, rope=HALF_IN_NEIGHBOURS,
        qkv_bias=reader.flag("attention_bias", default=True),
    )  # fmt: skip


def write(spec: ModelSpec) -> dict[str, Any]:
    return write_decoder(spec, "GlmForCausalLM", attention_bias=spec.attention.qkv_bias)


FAMILY = Family("glm", ("GlmForCausalLM",), read, write, RULES, llama.DROPPED)
