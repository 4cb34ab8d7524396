"""Qwen2 and Qwen2.5 (Alibaba): LLaMA with biases on q, k and v, and a sliding window in the upper layers if at all."""

from __future__ import annotations

from typing import Any

from llmc.converters.decoder_config import read_decoder, read_layer_windows, write_decoder, write_layer_windows
from llmc.converters.families import llama
from llmc.converters.reader import Reader
from llmc.converters.rules import Family
from llmc.spec import ModelSpec


def read(reader: Reader) -> ModelSpec:
    window = read_layer_windows(reader)
    return read_decoder(reader, "qwen2", num_kv_heads=32, max_positions=32768, window=window, qkv_bias=True)


def write(spec: ModelSpec) -> dict[str, Any]:
    return write_decoder(spec, "Qwen2ForCausalLM", **write_layer_windows(spec))


FAMILY = Family("qwen2", ("Qwen2ForCausalLM",), read, write, llama.RULES, llama.DROPPED)
