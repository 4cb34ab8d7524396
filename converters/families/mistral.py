"""Mistral 7B and relatives (Mistral AI): LLaMA with a sliding window in all layers, or in none."""

from __future__ import annotations

from typing import Any

from llmc.converters.decoder_config import read_decoder, write_decoder
from llmc.converters.families import llama
from llmc.converters.reader import Reader
from llmc.converters.rules import Family
from llmc.spec import ModelSpec


def read(reader: Reader) -> ModelSpec:
    window = reader.window("sliding_window", 4096)
    return read_decoder(reader, "mistral", num_kv_heads=8, max_positions=131072, window=(window, ()))


def write(spec: ModelSpec) -> dict[str, Any]:
    return write_decoder(spec, "MistralForCausalLM", sliding_window=spec.attention.window)


FAMILY = Family("mistral", ("MistralForCausalLM",), read, write, llama.RULES, llama.DROPPED)
