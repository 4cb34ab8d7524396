"""Gemma 3, the text models (Google): norms before and after, windows in most layers, two rotary bases."""

from __future__ import annotations

from typing import Any

from llmc.converters.decoder_config import write_decoder
from llmc.converters.families import llama
from llmc.converters.gemma_config import read_gemma3, write_gemma3
from llmc.converters.reader import Reader
from llmc.converters.rules import Family, Rule
from llmc.spec import ModelSpec

_OURS, _THEIRS = "layers.{layer}.", "model.layers.{layer}."
_MLP_NORM = f"{_OURS}mlp_norm.weight"

RULES = (
    *(rule for rule in llama.RULES if rule.ours != _MLP_NORM),
    Rule(f"{_OURS}attn_post_norm.weight", f"{_THEIRS}post_attention_layernorm.weight"),
    Rule(_MLP_NORM, f"{_THEIRS}pre_feedforward_layernorm.weight"),
    Rule(f"{_OURS}mlp_post_norm.weight", f"{_THEIRS}post_feedforward_layernorm.weight"),
)


def read(reader: Reader) -> ModelSpec:
    return read_gemma3(reader, "gemma3_text")


def write(spec: ModelSpec) -> dict[str, Any]:
    config = write_decoder(spec, "Gemma3ForCausalLM", **write_gemma3(spec))
    del config["hidden_act"]
    return config


# Gemma3ForSequenceClassification is of the models that see pictures.
_SCORED = "Gemma3TextForSequenceClassification"
FAMILY = Family("gemma3_text", ("Gemma3ForCausalLM",), read, write, RULES, llama.DROPPED, scored=_SCORED)
