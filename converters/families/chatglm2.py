"""ChatGLM2-6B, ChatGLM3-6B and GLM-4-9B as their authors publish them (Zhipu AI): GLM-4 under names of their own."""

from __future__ import annotations

from typing import Any

from llmc.converters.chatglm_config import read_chatglm, write_chatglm
from llmc.converters.ops import STACKED
from llmc.converters.reader import Reader
from llmc.converters.rules import Family, Rule
from llmc.spec import ModelSpec

_OURS, _THEIRS = "layers.{layer}.", "transformer.encoder.layers.{layer}."
_SAME = {
    "attn_norm": "input_layernorm",
    "attn.o": "self_attention.dense",
    "mlp_norm": "post_attention_layernorm",
    "mlp.down": "mlp.dense_4h_to_h",
}

RULES = (
    Rule("embed.weight", "transformer.embedding.word_embeddings.weight"),
    *(Rule(f"{_OURS}{ours}.weight", f"{_THEIRS}{theirs}.weight") for ours, theirs in _SAME.items()),
    *(
        Rule(
            tuple(f"{_OURS}attn.{x}.{kind}" for x in "qkv"), f"{_THEIRS}self_attention.query_key_value.{kind}", STACKED
        )
        for kind in ("weight", "bias")
    ),
    Rule(tuple(f"{_OURS}mlp.{name}.weight" for name in ("gate", "up")), f"{_THEIRS}mlp.dense_h_to_4h.weight", STACKED),
    Rule("norm.weight", "transformer.encoder.final_layernorm.weight"),
    Rule("head.weight", "transformer.output_layer.weight"),
)


def read(reader: Reader) -> ModelSpec:
    return read_chatglm(reader, "chatglm2")


def write(spec: ModelSpec) -> dict[str, Any]:
    return write_chatglm(spec)


_NAMES = ("ChatGLMModel", "ChatGLMForConditionalGeneration")
_TABLES = ("transformer.rotary_pos_emb.inv_freq",)
FAMILY = Family("chatglm2", _NAMES, read, write, RULES, dropped=_TABLES, native="glm")
