"""BLOOM (BigScience): linear biases in place of positions, normalised embeddings, q, k and v of each head together."""

from __future__ import annotations

from typing import Any

from llmc.converters.classic_decoder import read_classic, weight_and_bias, write_classic
from llmc.converters.ops import BY_HEADS
from llmc.converters.reader import Reader
from llmc.converters.rules import Family, Rule
from llmc.spec import Alibi, ModelSpec

_OURS, _THEIRS = "layers.{layer}.", "transformer.h.{layer}."
_QKV = tuple(f"{_OURS}attn.{name}" for name in "qkv")
_MODULES = {
    "attn.o": "self_attention.dense",
    "attn_norm": "input_layernorm",
    "mlp.up": "mlp.dense_h_to_4h",
    "mlp.down": "mlp.dense_4h_to_h",
    "mlp_norm": "post_attention_layernorm",
}

RULES = (
    Rule("embed.weight", "transformer.word_embeddings.weight"),
    *weight_and_bias("embed_norm", "transformer.word_embeddings_layernorm"),
    *weight_and_bias(_QKV, _THEIRS + "self_attention.query_key_value", BY_HEADS, BY_HEADS),
    *(rule for ours, theirs in _MODULES.items() for rule in weight_and_bias(_OURS + ours, _THEIRS + theirs)),
    *weight_and_bias("norm", "transformer.ln_f"),
    Rule("head.weight", "lm_head.weight"),
)

# How the sums were computed in training, and sizes of it.
_HARMLESS = """attention_softmax_in_fp32 bias_dropout_fusion masked_softmax_fusion offset_alibi skip_bias_add
    skip_bias_add_qkv slow_but_exact unk_token_id"""


def read(reader: Reader) -> ModelSpec:
    hidden_size = reader.integer(reader.first("hidden_size", "n_embed"))
    layers = reader.integer(reader.first("n_layer", "num_hidden_layers"))
    heads = reader.integer(reader.first("n_head", "num_attention_heads"))
    reader.only("n_inner", 4 * hidden_size, "the MLP is four times as wide as the model")
    reader.only("apply_residual_connection_post_layernorm", False, "the residual stream is not normalised")
    return read_classic(
        reader, "bloom", sizes=(hidden_size, layers, heads), intermediate_size=4 * hidden_size, position=Alibi(),
        max_positions=reader.integer("seq_length", 2048), eps=reader.number("layer_norm_epsilon", 1e-5),
        activation="gelu_tanh", embedding_norm=True, harmless=frozenset(_HARMLESS.split()),
    )  # fmt: skip


def write(spec: ModelSpec) -> dict[str, Any]:
    return write_classic(
        spec, "BloomForCausalLM", hidden_size=spec.hidden_size, n_layer=spec.num_layers,
        n_head=spec.attention.num_heads, seq_length=spec.max_positions, layer_norm_epsilon=spec.norm.eps,
    )  # fmt: skip


_NAMES = ("BloomForCausalLM", "BloomModel")
FAMILY = Family("bloom", _NAMES, read, write, RULES, prefix="transformer.", positions=("alibi",))
