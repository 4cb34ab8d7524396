"""Baichuan and Baichuan2, 7B and 13B: LLaMA with q, k and v in one linear; the 13B with linear biases for positions."""

from __future__ import annotations

from typing import Any

from llmc.converters.decoder_config import read_decoder
from llmc.converters.families import llama
from llmc.converters.ops import STACKED
from llmc.converters.reader import Reader
from llmc.converters.rules import Family, Rule
from llmc.spec import ModelSpec, Rope

_QKV = tuple(f"layers.{{layer}}.attn.{name}.weight" for name in "qkv")

RULES = (
    *(rule for rule in llama.RULES if rule.ours not in _QKV),
    Rule(_QKV, "model.layers.{layer}.self_attn.W_pack.weight", STACKED),
)

# Rows of the vocabulary of every Baichuan2 (vLLM tells them apart by it as well).
_VOCABULARY_2 = 125696


def read(reader: Reader) -> ModelSpec:
    """The authors give 7B and 13B, and Baichuan2, one architecture's name: what tells them apart is what they lack.

    Only the 7B have `max_position_embeddings`; only Baichuan2, which normalises its head, has a `z_loss_weight`.
    """
    for key in ("rope_theta", "rope_scaling", "num_key_value_heads", "head_dim"):
        reader.only(key, None, "Baichuan's code has no such setting")
    is_second = "z_loss_weight" in reader or reader.integer("vocab_size") == _VOCABULARY_2
    reader.number("z_loss_weight", 0)
    return read_decoder(
        reader, "baichuan", num_kv_heads=None, max_positions=reader.integer("model_max_length", 4096),
        alibi="max_position_embeddings" not in reader, normalised_head=is_second,
    )  # fmt: skip


def write(spec: ModelSpec) -> dict[str, Any]:
    config = {
        "architectures": ["BaichuanForCausalLM"], "model_type": "baichuan", "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size, "intermediate_size": spec.mlp.intermediate_size,
        "num_hidden_layers": spec.num_layers, "num_attention_heads": spec.attention.num_heads,
        "hidden_act": spec.mlp.activation, "rms_norm_eps": spec.norm.eps, "model_max_length": spec.max_positions,
        "tie_word_embeddings": spec.tied,
    }  # fmt: skip
    config |= {"max_position_embeddings": spec.max_positions} if isinstance(spec.position, Rope) else {}
    return config | ({"z_loss_weight": 0} if spec.normalised_head else {})


_NAMES = ("BaichuanForCausalLM", "BaiChuanForCausalLM")
FAMILY = Family("baichuan", _NAMES, read, write, RULES, llama.DROPPED, "", ("rope", "alibi"), "llama")
