"""Qwen3, the dense models (Alibaba): LLaMA with each head of q and k normalised, and a head size of its own."""

from __future__ import annotations

from typing import Any

from llmc.converters.decoder_config import read_decoder, read_layer_windows, write_decoder, write_layer_windows
from llmc.converters.families import llama
from llmc.converters.reader import Reader
from llmc.converters.rules import Family
from llmc.spec import ModelSpec


def read(reader: Reader) -> ModelSpec:
    window, bias = read_layer_windows(reader), reader.flag("attention_bias")
    return read_decoder(
        reader, "qwen3", num_kv_heads=32, max_positions=32768, head_dim=128,
        window=window, qk_norm=True, qkv_bias=bias, o_bias=bias,
    )  # fmt: skip


def write(spec: ModelSpec) -> dict[str, Any]:
    bias = spec.attention.o_bias
    return write_decoder(spec, "Qwen3ForCausalLM", attention_bias=bias, **write_layer_windows(spec))


FAMILY = Family("qwen3", ("Qwen3ForCausalLM",), read, write, llama.RULES, llama.DROPPED, prefix="model.")
