"""Qwen 1 (Alibaba) as its authors publish it: Qwen2 without shared key heads, and with names of GPT-2's kind."""

from __future__ import annotations

from typing import Any

from llmc.converters.classic_decoder import weight_and_bias
from llmc.converters.decoder_config import read_decoder, write_decoder
from llmc.converters.ops import STACKED
from llmc.converters.reader import HARMLESS, Reader
from llmc.converters.rules import Family, Rule
from llmc.spec import ModelSpec

_OURS, _THEIRS = "layers.{layer}.", "transformer.h.{layer}."
_SAME = {
    "attn_norm": "ln_1", "attn.o": "attn.c_proj", "mlp_norm": "ln_2",
    "mlp.gate": "mlp.w2", "mlp.up": "mlp.w1", "mlp.down": "mlp.c_proj",
}  # fmt: skip

RULES = (
    Rule("embed.weight", "transformer.wte.weight"),
    *(Rule(f"{_OURS}{ours}.weight", f"{_THEIRS}{theirs}.weight") for ours, theirs in _SAME.items()),
    *weight_and_bias(tuple(f"{_OURS}attn.{x}" for x in "qkv"), f"{_THEIRS}attn.c_attn", STACKED, STACKED),
    Rule("norm.weight", "transformer.ln_f.weight"),
    Rule("head.weight", "lm_head.weight"),
)

# Theirs -> transformers' of Qwen2.
_SIZES = {key: key for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")} | {
    "intermediate_size": "intermediate_size", "kv_channels": "head_dim", "seq_length": "max_position_embeddings"
}  # fmt: skip
# Dynamic NTK and log-n attention do nothing up to the trained length, which is a spec's `max_positions`.
_HARMLESS = HARMLESS | {
    "attn_dropout_prob", "bf16", "emb_dropout_prob", "fp16", "fp32", "max_position_embeddings", "onnx_safe",
    "softmax_in_fp32", "use_cache_kernel", "use_cache_quantization", "use_dynamic_ntk", "use_flash_attn",
    "use_logn_attn",
}  # fmt: skip


def read(reader: Reader) -> ModelSpec:
    config: dict[str, Any] = {theirs: reader.integer(key) for key, theirs in _SIZES.items()}
    head = config["hidden_size"] // max(config["num_attention_heads"], 1)
    for key, value in {"kv_channels": head, "no_bias": True, "rotary_pct": 1.0, "scale_attn_weights": True}.items():
        reader.only(key, value, "as in every published Qwen")
    config["intermediate_size"] //= 2  # the authors count w1 and w2 together
    eps, theta = reader.number("layer_norm_epsilon", 1e-6), reader.number("rotary_emb_base", 1e4)
    config |= {"rms_norm_eps": eps, "rope_theta": theta, "tie_word_embeddings": reader.flag("tie_word_embeddings")}
    reader.done(_HARMLESS)
    return read_decoder(Reader(config, reader.where), "qwen", num_kv_heads=None, max_positions=0, qkv_bias=True)


def write(spec: ModelSpec) -> dict[str, Any]:
    settings = write_decoder(spec, "QWenLMHeadModel")
    config = {key: settings[theirs] for key, theirs in _SIZES.items()} | {"rotary_emb_base": spec.rope.theta}
    config |= {"intermediate_size": 2 * spec.mlp.intermediate_size, "layer_norm_epsilon": spec.norm.eps}
    config |= {"no_bias": True, "tie_word_embeddings": spec.tied, "model_type": "qwen"}
    return config | {"architectures": ["QWenLMHeadModel"]}


FAMILY = Family("qwen", ("QWenLMHeadModel",), read, write, RULES, ("*rotary_emb.inv_freq",), native="qwen2")
