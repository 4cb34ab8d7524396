"""Qwen3-MoE (Alibaba): Qwen3 with many small experts, and none that is shared."""

from __future__ import annotations

from typing import Any

from llmc.converters.decoder_config import read_decoder, read_experts, write_decoder, write_experts
from llmc.converters.families import llama, qwen2_moe
from llmc.converters.reader import Reader
from llmc.converters.rules import Family
from llmc.spec import ModelSpec


def read(reader: Reader) -> ModelSpec:
    window = reader.window("sliding_window", 4096) if reader.flag("use_sliding_window") else None
    reader.note("sliding_window", "max_window_layers")
    bias = reader.flag("attention_bias")
    return read_decoder(
        reader, "qwen3_moe", num_kv_heads=4, max_positions=32768, window=(window, ()),
        qk_norm=True, qkv_bias=bias, o_bias=bias, moe=read_experts(reader),
    )  # fmt: skip


def write(spec: ModelSpec) -> dict[str, Any]:
    window = spec.attention.window
    settings = {"attention_bias": spec.attention.o_bias, "use_sliding_window": bool(window), "sliding_window": window}
    return write_decoder(spec, "Qwen3MoeForCausalLM", **settings, **write_experts(spec))


FAMILY = Family("qwen3_moe", ("Qwen3MoeForCausalLM",), read, write, qwen2_moe.RULES, llama.DROPPED)
