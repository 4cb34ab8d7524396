"""Qwen1.5-MoE and Qwen2-MoE (Alibaba): Qwen2 with many small experts and a shared one, in most layers."""

from __future__ import annotations

from typing import Any

from llmc.converters.decoder_config import (
    read_decoder,
    read_experts,
    read_layer_windows,
    write_decoder,
    write_experts,
    write_layer_windows,
)
from llmc.converters.families import llama
from llmc.converters.reader import Reader
from llmc.converters.rules import Family, Rule
from llmc.spec import ModelSpec

_OURS, _THEIRS = "layers.{layer}.moe.", "model.layers.{layer}.mlp."
_MLPS = {"experts.{expert}": "experts.{expert}", "shared": "shared_expert"}

RULES = (
    *llama.RULES,
    Rule(f"{_OURS}router.weight", f"{_THEIRS}gate.weight"),
    *(
        Rule(f"{_OURS}{ours}.{name}.weight", f"{_THEIRS}{theirs}.{name}_proj.weight")
        for ours, theirs in _MLPS.items()
        for name in ("gate", "up", "down")
    ),
    Rule(f"{_OURS}shared_gate.weight", f"{_THEIRS}shared_expert_gate.weight"),
)


def read(reader: Reader) -> ModelSpec:
    if "layer_types" not in reader:
        # transformers and the authors' code then disagree on which layers have a window; no published model has one.
        reader.only("use_sliding_window", False, "'layer_types' does not say in which layers")
    moe = read_experts(reader, shared_size=reader.integer("shared_expert_intermediate_size"))
    window, bias = read_layer_windows(reader), reader.flag("qkv_bias", default=True)
    return read_decoder(
        reader, "qwen2_moe", num_kv_heads=16, max_positions=32768, window=window, qkv_bias=bias, moe=moe
    )


def write(spec: ModelSpec) -> dict[str, Any]:
    settings = write_layer_windows(spec) | write_experts(spec) | {"qkv_bias": spec.attention.qkv_bias}
    if spec.moe:
        settings["shared_expert_intermediate_size"] = spec.moe.shared_size
    return write_decoder(spec, "Qwen2MoeForCausalLM", **settings)


FAMILY = Family("qwen2_moe", ("Qwen2MoeForCausalLM",), read, write, RULES, llama.DROPPED)
