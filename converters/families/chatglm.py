"""ChatGLM-6B (Zhipu AI) as its authors publish it: a prefix that sees itself whole, places on two axes, DeepNorm."""

from __future__ import annotations

from typing import Any

from llmc.converters.classic_decoder import read_classic, weight_and_bias
from llmc.converters.ops import BY_HEADS_ON_TWO_AXES
from llmc.converters.reader import Reader
from llmc.converters.rules import Family, Rule
from llmc.spec import ModelSpec, Prefix, Rope

_OURS, _THEIRS = "layers.{layer}.", "transformer.layers.{layer}."
_QKV, _FUSED = tuple(f"{_OURS}attn.{name}" for name in "qkv"), "attention.query_key_value"
_MODULES = {
    "attn_norm": "input_layernorm", "attn.o": "attention.dense", "mlp_norm": "post_attention_layernorm",
    "mlp.up": "mlp.dense_h_to_4h", "mlp.down": "mlp.dense_4h_to_h",
}  # fmt: skip

RULES = (
    Rule("embed.weight", "transformer.word_embeddings.weight"),
    *weight_and_bias(_QKV, _THEIRS + _FUSED, BY_HEADS_ON_TWO_AXES, BY_HEADS_ON_TWO_AXES),
    *(rule for ours, theirs in _MODULES.items() for rule in weight_and_bias(_OURS + ours, _THEIRS + theirs)),
    *weight_and_bias("norm", "transformer.final_layernorm"),
    Rule("head.weight", "lm_head.weight"),
)

# Their code takes the square root of twice 28, a default that it never sets, for models of any depth.
_RESIDUAL_SCALE = (2 * 28) ** 0.5


def read(reader: Reader) -> ModelSpec:
    for key, value in {"position_encoding_2d": True, "prefix_projection": False, "quantization_bit": 0}.items():
        reader.only(key, value, "as in ChatGLM-6B")
    reader.only("pre_seq_len", 0, "a trained prefix is no part of the model")
    hidden, end = reader.integer("hidden_size"), reader.integer("bos_token_id")
    marks = reader.integer("gmask_token_id", end - 3), reader.integer("mask_token_id", end - 4)
    return read_classic(
        reader, "chatglm", sizes=(hidden, reader.integer("num_layers"), reader.integer("num_attention_heads")),
        intermediate_size=reader.integer("inner_hidden_size"), max_positions=reader.integer("max_sequence_length"),
        position=Rope(axes=2, half=True), eps=reader.number("layernorm_epsilon", 1e-5), activation="gelu_tanh",
        residual_scale=_RESIDUAL_SCALE, prefix=Prefix(end=end, marks=marks), tied=False,
    )  # fmt: skip


def write(spec: ModelSpec) -> dict[str, Any]:
    prefix = spec.prefix or Prefix(end=0)
    names = dict(zip(("gmask_token_id", "mask_token_id"), prefix.marks, strict=True))
    return names | {
        "_name_or_path": "THUDM/chatglm-6b", "architectures": ["ChatGLMModel"], "model_type": "chatglm",
        "bos_token_id": prefix.end, "hidden_size": spec.hidden_size, "inner_hidden_size": spec.mlp.intermediate_size,
        "layernorm_epsilon": spec.norm.eps, "max_sequence_length": spec.max_positions, "num_layers": spec.num_layers,
        "num_attention_heads": spec.attention.num_heads, "position_encoding_2d": True, "vocab_size": spec.vocab_size,
        "tie_word_embeddings": spec.tied,
    }  # fmt: skip


_NAMES = ("ChatGLMModel", "ChatGLMForConditionalGeneration")
_TABLES = ("*.rotary_emb.inv_freq",)
FAMILY = Family("chatglm", _NAMES, read, write, RULES, _TABLES, native=None, sign="position_encoding_2d")
