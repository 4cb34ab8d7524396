"""GPT-2 (OpenAI), and GPT-3's layout as its reproductions have it: learned positions, LayerNorm, Conv1D for linears."""

from __future__ import annotations

from typing import Any

from llmc.converters.classic_decoder import ACTIVATIONS, WRITTEN, read_classic, weight_and_bias, write_classic
from llmc.converters.ops import STACKED, TRANSPOSED, transposed
from llmc.converters.reader import Reader
from llmc.converters.rules import Family, Rule
from llmc.spec import Learned, ModelSpec

_OURS, _THEIRS = "layers.{layer}.", "transformer.h.{layer}."
_LINEARS = {"attn.o": "attn.c_proj", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}

RULES = (
    Rule("embed.weight", "transformer.wte.weight"),
    Rule("positions.weight", "transformer.wpe.weight"),
    *weight_and_bias(_OURS + "attn_norm", _THEIRS + "ln_1"),
    *weight_and_bias(tuple(f"{_OURS}attn.{x}" for x in "qkv"), _THEIRS + "attn.c_attn", transposed(STACKED), STACKED),
    *(
        rule
        for ours, theirs in _LINEARS.items()
        for rule in weight_and_bias(_OURS + ours, _THEIRS + theirs, TRANSPOSED)
    ),
    *weight_and_bias(_OURS + "mlp_norm", _THEIRS + "ln_2"),
    *weight_and_bias("norm", "transformer.ln_f"),
    Rule("head.weight", "lm_head.weight"),
)

# The causal mask as older versions of transformers saved it, and what it filled in.
DROPPED = ("transformer.h.*.attn.bias", "transformer.h.*.attn.masked_bias")
_SUMMARY = frozenset(f"summary_{key}" for key in ("activation", "first_dropout", "proj_to_labels", "type", "use_proj"))


def read(reader: Reader) -> ModelSpec:
    hidden_size, layers, heads = (reader.integer(key) for key in ("n_embd", "n_layer", "n_head"))
    positions = reader.integer("n_positions")
    reader.only("n_ctx", positions, "the context is n_positions")
    reader.only("scale_attn_weights", True, "scores are divided by the root of the head's size")
    reader.only("scale_attn_by_inverse_layer_idx", False, "scores of all layers are scaled alike")
    reader.flag("reorder_and_upcast_attn")  # Another order of the same steps, for half precision.
    return read_classic(
        reader, "gpt2", sizes=(hidden_size, layers, heads), max_positions=positions, position=Learned(),
        intermediate_size=reader.integer("n_inner", 4 * hidden_size), eps=reader.number("layer_norm_epsilon", 1e-5),
        activation=reader.choice("activation_function", ACTIVATIONS, "gelu_new"), harmless=_SUMMARY,
    )  # fmt: skip


def write(spec: ModelSpec) -> dict[str, Any]:
    return write_classic(
        spec, "GPT2LMHeadModel", n_embd=spec.hidden_size, n_layer=spec.num_layers, n_head=spec.attention.num_heads,
        n_inner=spec.mlp.intermediate_size, n_positions=spec.max_positions, layer_norm_epsilon=spec.norm.eps,
        activation_function=WRITTEN[spec.mlp.activation],
    )  # fmt: skip


FAMILY = Family("gpt2", ("GPT2LMHeadModel",), read, write, RULES, DROPPED, "transformer.", ("learned",))
