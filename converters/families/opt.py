"""OPT (Meta): learned positions from row 2 on, ReLU; OPT-350m has its norms after, and a narrow embedding."""

from __future__ import annotations

from typing import Any

from llmc.converters.classic_decoder import ACTIVATIONS, WRITTEN, read_classic, weight_and_bias, write_classic
from llmc.converters.reader import Reader
from llmc.converters.rules import Family, Rule
from llmc.spec import Learned, ModelSpec

_OURS, _THEIRS = "layers.{layer}.", "model.decoder.layers.{layer}."
_MODULES = {f"attn.{name}": f"self_attn.{name}_proj" for name in "qkv"} | {"attn.o": "self_attn.out_proj"}
_MODULES |= {"mlp.up": "fc1", "mlp.down": "fc2", "attn_norm": "self_attn_layer_norm", "mlp_norm": "final_layer_norm"}

RULES = (
    Rule("embed.weight", "model.decoder.embed_tokens.weight"),
    Rule("embed_in.weight", "model.decoder.project_in.weight"),
    Rule("positions.weight", "model.decoder.embed_positions.weight"),
    *(rule for ours, theirs in _MODULES.items() for rule in weight_and_bias(_OURS + ours, _THEIRS + theirs)),
    *weight_and_bias("norm", "model.decoder.final_layer_norm"),
    Rule("embed_out.weight", "model.decoder.project_out.weight"),
    Rule("head.weight", "lm_head.weight"),
)

_HARMLESS = frozenset({"activation_dropout", "dropout", "init_std", "layerdrop"})
# OPT's LayerNorms have PyTorch's own epsilon, which no config names.
_EPS = 1e-5


def read(reader: Reader) -> ModelSpec:
    hidden_size, layers, heads, inner = (
        reader.integer(key) for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "ffn_dim")
    )
    reader.only("_remove_final_layer_norm", False, "the last layer's output is normalised")
    reader.only("enable_bias", True, "every linear has a bias")
    reader.only("layer_norm_elementwise_affine", True, "every norm has weights")
    width = reader.integer("word_embed_proj_dim", hidden_size)
    return read_classic(
        reader, "opt", sizes=(hidden_size, layers, heads), intermediate_size=inner, eps=_EPS,
        max_positions=reader.integer("max_position_embeddings", 2048), position=Learned(offset=2),
        activation=reader.choice("activation_function", ACTIVATIONS, "relu"), harmless=_HARMLESS,
        norm_order="before" if reader.flag("do_layer_norm_before", default=True) else "after",
        embedding_size=None if width == hidden_size else width,
    )  # fmt: skip


def write(spec: ModelSpec) -> dict[str, Any]:
    return write_classic(
        spec, "OPTForCausalLM", hidden_size=spec.hidden_size, num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.attention.num_heads, ffn_dim=spec.mlp.intermediate_size,
        max_position_embeddings=spec.max_positions, activation_function=WRITTEN[spec.mlp.activation],
        do_layer_norm_before=spec.norm.order == "before", enable_bias=True,
        word_embed_proj_dim=spec.embedding_size or spec.hidden_size,
    )  # fmt: skip


FAMILY = Family("opt", ("OPTForCausalLM",), read, write, RULES, prefix="model.", positions=("learned",))
