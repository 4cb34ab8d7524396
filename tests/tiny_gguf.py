"""The tiny models as GGUF files, written with the gguf package the way llama.cpp's converter writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tiny
from gguf import GGMLQuantizationType, TokenType

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}


def permute(weights: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp, convert_hf_to_gguf.py: the halves of each head become neighbours."""
    return (
        weights.reshape(heads, 2, len(weights) // heads // 2, *weights.shape[1:]).swapaxes(1, 2).reshape(weights.shape)
    )


def save(case: tiny.Case, path: Path, *, kind: str = "F32", **changes: Any) -> Path:
    """Write a file; norms and biases stay F32, as llama.cpp keeps them.

    Args:
        kind: ggml's type of the matrices.
        changes: Metadata to add or replace, by key; None leaves a key out.
    """
    model = case.build()
    config = model.config
    name = ARCHITECTURES[case.model_type]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[name])
    metadata = {**settings(config, gguf.MODEL_ARCH_NAMES[name]), **vocabulary(), **changes}
    for key, value in metadata.items():
        if value is not None:
            add(writer, key, value)
    names = gguf.get_tensor_name_map(name, config.num_hidden_layers)
    for theirs, values in model.state_dict().items():
        if theirs == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stored = values.numpy()
        is_llama = name == gguf.MODEL_ARCH.LLAMA
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if is_llama and part in theirs:
                stored = permute(stored, heads)
        own = GGMLQuantizationType[kind] if stored.ndim == 2 else GGMLQuantizationType.F32
        found = names.get_name(theirs, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(found, gguf.quants.quantize(np.ascontiguousarray(stored), own), raw_dtype=own)
    scaling = config.rope_parameters
    if scaling["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_divisors(scaling, config.head_dim))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama3_divisors(scaling: dict[str, Any], head_dim: int) -> np.ndarray:
    """llama.cpp, convert_hf_to_gguf.py, LlamaModel.generate_extra_tensors."""
    found = []
    for at in range(0, head_dim, 2):
        wavelength = 2 * np.pi * scaling["rope_theta"] ** (at / head_dim)
        low = scaling["original_max_position_embeddings"] / scaling["low_freq_factor"]
        high = scaling["original_max_position_embeddings"] / scaling["high_freq_factor"]
        if wavelength < high:
            found.append(1.0)
        elif wavelength > low:
            found.append(scaling["factor"])
        else:
            smooth = (scaling["original_max_position_embeddings"] / wavelength - scaling["low_freq_factor"]) / (
                scaling["high_freq_factor"] - scaling["low_freq_factor"]
            )
            found.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return np.array(found, np.float32)


def settings(config: Any, name: str) -> dict[str, Any]:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    found = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "rope.dimension_count": head_dim,
        "vocab_size": config.vocab_size,
    }
    scaling = config.rope_parameters
    if scaling["rope_type"] in ("linear", "yarn"):
        found |= {"rope.scaling.type": scaling["rope_type"], "rope.scaling.factor": scaling["factor"]}
    if scaling["rope_type"] == "yarn":
        found["rope.scaling.original_context_length"] = scaling["original_max_position_embeddings"]
    if config.model_type == "mistral" and config.sliding_window:
        found["attention.sliding_window"] = config.sliding_window
    return {f"{name}.{key}": value for key, value in found.items()}


def vocabulary() -> dict[str, Any]:
    """The tiny tokenizer, as llama.cpp writes one of the kind "gpt2"."""
    tokenizer = json.loads(tiny._tokenizer_json())
    ids = {number: token for token, number in tokenizer["model"]["vocab"].items()}
    types = [TokenType.CONTROL if number < 3 else TokenType.NORMAL for number in range(len(ids))]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [ids[number] for number in range(len(ids))],
        "tokenizer.ggml.token_type": [int(kind) for kind in types],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in tokenizer["model"]["merges"]],
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.chat_template": tiny.CHAT_TEMPLATE,
    }


def add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)
