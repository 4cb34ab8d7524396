"""Mixtral 8x7B and 8x22B (Mistral AI): Mistral with a mixture of experts for every MLP."""

from __future__ import annotations

from typing import Any

from llmc.converters.decoder_config import read_decoder, write_decoder
from llmc.converters.families import llama
from llmc.converters.reader import Reader
from llmc.converters.rules import Family, Rule
from llmc.spec import ModelSpec, Moe, Rope

_MOE = "model.layers.{layer}.block_sparse_moe."
_EXPERT = {"gate": "w1", "down": "w2", "up": "w3"}

RULES = (
    *llama.RULES,
    Rule("layers.{layer}.moe.router.weight", _MOE + "gate.weight"),
    *(
        Rule(f"layers.{{layer}}.moe.experts.{{expert}}.{ours}.weight", f"{_MOE}experts.{{expert}}.{theirs}.weight")
        for ours, theirs in _EXPERT.items()
    ),
)


def read(reader: Reader) -> ModelSpec:
    moe = Moe(
        num_experts=reader.integer("num_local_experts", 8),
        top_k=reader.integer("num_experts_per_tok", 2),
        intermediate_size=reader.integer("intermediate_size"),
    )
    window = reader.window("sliding_window", None)
    return read_decoder(
        reader,
        "mixtral",
        num_kv_heads=8,
        max_positions=131072,
        window=(window, ()),
        eps=1e-5,
        rope=Rope(theta=1e6),
        moe=moe,
    )


def write(spec: ModelSpec) -> dict[str, Any]:
    moe = {"num_local_experts": spec.moe.num_experts, "num_experts_per_tok": spec.moe.top_k} if spec.moe else {}
    return write_decoder(spec, "MixtralForCausalLM", sliding_window=spec.attention.window, **moe)


FAMILY = Family("mixtral", ("MixtralForCausalLM",), read, write, RULES, llama.DROPPED)
