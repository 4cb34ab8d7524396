"""The config of ChatGLM2, ChatGLM3 and GLM-4-9B as their authors publish them.

What is read there is put into the words that GLM-4 has in transformers, so that one reader makes the spec.
"""

from __future__ import annotations

from typing import Any

from llmc.converters.decoder_config import read_decoder, write_decoder
from llmc.converters.reader import HARMLESS, Reader
from llmc.errors import UnsupportedModelError
from llmc.spec import LinearScaling, ModelSpec, Rope

_THETA = 10000.0
HALF_IN_NEIGHBOURS = Rope(theta=_THETA, fraction=0.5, interleaved=True)

# Theirs -> transformers'.
_INTEGERS = {
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "kv_channels": "head_dim",
    "multi_query_group_num": "num_key_value_heads",
    "num_attention_heads": "num_attention_heads",
    "num_layers": "num_hidden_layers",
    "padded_vocab_size": "vocab_size",
    "seq_length": "max_position_embeddings",
}

# What the authors' code could do, and no published model does.
_ONLY = {
    "add_bias_linear": False,
    "apply_residual_connection_post_layernorm": False,
    "multi_query_attention": True,
    "original_rope": True,
    "position_encoding_2d": False,
    "post_layer_norm": True,
    "pre_seq_len": 0,
    "prefix_projection": False,
    "quantization_bit": 0,
    "rmsnorm": True,
}

# Settings of precision and speed, and sizes said twice.
_HARMLESS = HARMLESS | {
    "apply_query_key_layer_scaling", "attention_softmax_in_fp32", "bias_dropout_fusion", "classifier_dropout",
    "fp32_residual_connection", "num_hidden_layers", "vocab_size",
}  # fmt: skip


def read_chatglm(reader: Reader, family: str) -> ModelSpec:
    """The spec of such a config.

    Raises:
        UnsupportedModelError: A setting is missing, unknown, or has a value that no published model has.
    """
    for key, value in _ONLY.items():
        reader.only(key, value, "as in ChatGLM2, ChatGLM3 and GLM-4")
    config: dict[str, Any] = {theirs: reader.integer(key) for key, theirs in _INTEGERS.items()}
    config["rms_norm_eps"] = reader.number("layernorm_epsilon", 1e-5)
    config["tie_word_embeddings"] = reader.flag("tie_word_embeddings")
    config |= _rope(reader)
    bias = reader.flag("add_qkv_bias")
    reader.done(_HARMLESS)
    again = Reader(config, reader.where)
    return read_decoder(again, family, num_kv_heads=None, max_positions=0, rope=HALF_IN_NEIGHBOURS, qkv_bias=bias)


def _rope(reader: Reader) -> dict[str, Any]:
    """`rope_ratio` divides positions in ChatGLM2's code (6B-32k), and multiplies the base in that of its successors.

    Their configs have the same keys; only the name that they came under tells them apart.
    """
    ratio, name = reader.number("rope_ratio", 1.0), reader.text("_name_or_path", "").lower()
    if ratio == 1:
        return {}
    if "chatglm2" in name:
        return {"rope_scaling": {"type": "linear", "factor": ratio}}
    if "chatglm3" in name or "glm-4" in name:
        return {"rope_theta": _THETA * ratio}
    raise UnsupportedModelError(
        f"{reader.where}: 'rope_ratio' is {ratio}, which means one thing in ChatGLM2 and another in ChatGLM3 and "
        f"GLM-4, and '_name_or_path' ({name!r}) has none of these names: write there which of them it is"
    )


def write_chatglm(spec: ModelSpec) -> dict[str, Any]:
    """The inverse of `read_chatglm`."""
    scaling, settings = spec.rope.scaling, write_decoder(spec, "")
    return {
        "_name_or_path": "THUDM/chatglm2-6b" if scaling else "THUDM/chatglm3-6b",
        "architectures": ["ChatGLMModel"],
        "model_type": "chatglm",
        **{key: settings[theirs] for key, theirs in _INTEGERS.items()},
        "layernorm_epsilon": spec.norm.eps,
        "add_bias_linear": False,
        "add_qkv_bias": spec.attention.qkv_bias,
        "multi_query_attention": True,
        "original_rope": True,
        "post_layer_norm": True,
        "rmsnorm": True,
        "rope_ratio": scaling.factor if isinstance(scaling, LinearScaling) else spec.rope.theta / _THETA,
        "tie_word_embeddings": spec.tied,
    }
