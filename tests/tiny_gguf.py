"""The tiny models as GGUF files, written with the gguf package the way llama.cpp's converter writes them.

The names are the package's own map from Hugging Face's; what llama.cpp's converter does to tensors is in `TURNED`.
"""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import tiny
from gguf import GGMLQuantizationType, TokenType
from safetensors.numpy import load_file

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "mixtral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen2_moe": gguf.MODEL_ARCH.QWEN2MOE,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
    "gpt2": gguf.MODEL_ARCH.GPT2,
    "bloom": gguf.MODEL_ARCH.BLOOM,
    "glm": gguf.MODEL_ARCH.CHATGLM,
    "chatglm2": gguf.MODEL_ARCH.CHATGLM,
    "glm4": gguf.MODEL_ARCH.GLM4,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
    "qwen": gguf.MODEL_ARCH.QWEN,
    "baichuan": gguf.MODEL_ARCH.BAICHUAN,
}

_DEEP = {"hidden_size": 32, "intermediate_size": 32}
CASES: dict[str, tiny.Case] = {
    **{name: case for name, case in tiny.TINY.items() if case.model_type in ARCHITECTURES},
    # llama.cpp wants heads of these to fill the hidden size, and Baichuan as deep as it was published.
    "glm-square": tiny.Case("glm", {"head_dim": 16, "attention_bias": False, "tie_word_embeddings": True}),
    "chatglm3-square": tiny.Case("chatglm2", {"kv_channels": 16}, base=tiny.CHATGLM_BASE),
    "chatglm2-32k-square": tiny.Case(
        "chatglm2", {"kv_channels": 16, "_name_or_path": "chatglm2-6b-32k", "rope_ratio": 4.0}, base=tiny.CHATGLM_BASE
    ),
    "qwen2-moe-all": tiny.Case(
        "qwen2_moe",
        {
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "num_experts": 5,
            "shared_expert_intermediate_size": 64,
        },
    ),
    "gemma3-by-sixes": tiny.Case(
        "gemma3_text",
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 8,
            "num_hidden_layers": 7,
            "tie_word_embeddings": True,
        },
    ),
    "baichuan-7b-deep": tiny.Case(
        "baichuan", {**_DEEP, "num_hidden_layers": 32, "max_position_embeddings": 256}, base=tiny.BAICHUAN_BASE
    ),
    "baichuan-13b-deep": tiny.Case("baichuan", {**_DEEP, "num_hidden_layers": 40}, base=tiny.BAICHUAN_BASE),
}


def permute(weights: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp, convert_hf_to_gguf.py: the halves of each head become neighbours."""
    return (
        weights.reshape(heads, 2, len(weights) // heads // 2, *weights.shape[1:]).swapaxes(1, 2).reshape(weights.shape)
    )


def _permuted(name: str, values: np.ndarray, sizes: Any) -> dict[str, np.ndarray]:
    heads = {"q_proj": sizes.heads, "k_proj": sizes.kv_heads}
    met = next((heads[part] for part in heads if part in name), None)
    return {name: values if met is None else permute(values, met)}


def _transposed(name: str, values: np.ndarray, _sizes: Any) -> dict[str, np.ndarray]:
    """GPT-2's Conv1D."""
    return {name: values.T if re.search(r"(c_attn|c_proj|c_fc)\.weight$", name) else values}


def _by_parts(name: str, values: np.ndarray, sizes: Any) -> dict[str, np.ndarray]:
    """BLOOM's q, k and v of each head, to all heads' q, k and v."""
    if "query_key_value" in name:
        heads = values.reshape(sizes.heads, 3, sizes.head_dim, *values.shape[1:])
        values = np.concatenate([heads[:, part].reshape(-1, *values.shape[1:]) for part in range(3)])
    return {name: values}


def _unpacked(name: str, values: np.ndarray, sizes: Any) -> dict[str, np.ndarray]:
    """Baichuan's W_pack."""
    if "W_pack" not in name:
        return {name: values}
    parts = dict(zip(("q_proj", "k_proj", "v_proj"), np.split(values, 3), strict=True))
    return {name.replace("W_pack", part): _permuted(part, own, sizes)[part] for part, own in parts.items()}


def _plus_one(name: str, values: np.ndarray, _sizes: Any) -> dict[str, np.ndarray]:
    """Gemma's norms."""
    return {name: values + np.float32(1) if name.endswith("norm.weight") else values}


TURNED = {
    "gemma3_text": _plus_one,
    "llama": _permuted,
    "mistral": _permuted,
    "mixtral": _permuted,
    "gpt2": _transposed,
    "bloom": _by_parts,
    "baichuan": _unpacked,
}


def tensors(case: tiny.Case, sizes: Any) -> dict[str, np.ndarray]:
    """What llama.cpp's converter makes of the model's file, under the gguf package's names."""
    with tempfile.TemporaryDirectory() as folder:
        theirs = load_file(tiny.save(case, Path(folder)) / "model.safetensors")
    names = gguf.get_tensor_name_map(ARCHITECTURES[case.model_type], sizes.layers)
    turned: dict[str, np.ndarray] = {}
    experts: dict[str, dict[int, np.ndarray]] = {}
    for name, values in theirs.items():
        if met := re.search(r"experts\.(\d+)\.", name):
            experts.setdefault(name.replace(met[0], "experts."), {})[int(met[1])] = values
        else:
            turned |= TURNED.get(case.model_type, lambda name, values, _: {name: values})(name, values, sizes)
    turned |= {name: np.stack([own[expert] for expert in sorted(own)]) for name, own in experts.items()}
    return {
        next(
            found
            for spelling in (name, name.removeprefix("transformer."))
            if (found := names.get_name(spelling, try_suffixes=(".weight", ".bias")))
        ): values
        for name, values in turned.items()
    }


def save(case: tiny.Case, path: Path, *, kind: str = "F32", **changes: Any) -> Path:
    """Write a file; vectors stay F32, as llama.cpp keeps them.

    Args:
        kind: ggml's type of the matrices.
        changes: Metadata to add or replace, by key; None leaves a key out.
    """
    config = case.build().config
    name, sizes = ARCHITECTURES[case.model_type], sizes_of(config)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[name])
    metadata = {**settings(config, sizes, gguf.MODEL_ARCH_NAMES[name]), **vocabulary(), **changes}
    for key, value in metadata.items():
        if value is not None:
            add(writer, key, value)
    for found, stored in tensors(case, sizes).items():
        own = GGMLQuantizationType[kind] if stored.ndim > 1 else GGMLQuantizationType.F32
        writer.add_tensor(found, gguf.quants.quantize(np.ascontiguousarray(stored), own), raw_dtype=own)
    scaling = getattr(config, "rope_parameters", None) or {}
    if scaling.get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_divisors(scaling, config.head_dim))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _first(config: Any, *names: str, default: Any = None) -> Any:
    return next((getattr(config, name) for name in names if getattr(config, name, None) is not None), default)


def sizes_of(config: Any) -> Any:
    """The sizes under one set of names, whatever the family calls them."""
    hidden, heads = _first(config, "hidden_size", "n_embd"), _first(config, "num_attention_heads", "n_head")
    return SimpleNamespace(
        layers=_first(config, "num_hidden_layers", "n_layer", "num_layers"),
        positions=_first(config, "seq_length", "max_position_embeddings", "n_positions", "model_max_length"),
        hidden=hidden,
        inner=_first(config, "intermediate_size", "n_inner", "ffn_hidden_size", default=4 * hidden),
        heads=heads,
        kv_heads=_first(config, "num_key_value_heads", "multi_query_group_num", default=heads),
        head_dim=_first(config, "head_dim", "kv_channels", default=hidden // heads),
        rms_eps=_first(config, "rms_norm_eps", "layernorm_epsilon"),
        eps=_first(config, "layer_norm_epsilon"),
        theta=_first(config, "rotary_emb_base"),
        vocab=_first(config, "vocab_size", "padded_vocab_size"),
    )


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


# Families whose q and k are turned in part.
_HALF = ("glm", "glm4", "chatglm")


def settings(config: Any, sizes: Any, name: str) -> dict[str, Any]:
    is_classic = config.model_type in ("gpt2", "bloom")
    found = {
        "block_count": sizes.layers,
        "context_length": sizes.positions,
        "embedding_length": sizes.hidden,
        "feed_forward_length": sizes.inner,
        "attention.head_count": sizes.heads,
        "attention.head_count_kv": sizes.kv_heads,
        "vocab_size": sizes.vocab,
        "attention.layer_norm_epsilon" if is_classic else "attention.layer_norm_rms_epsilon": float(
            sizes.eps if sizes.rms_eps is None else sizes.rms_eps
        ),
    }
    scaling = getattr(config, "rope_parameters", None) or {}
    if not is_classic and config.model_type != "baichuan":
        scaling = scaling.get("full_attention", scaling)
        theta = scaling.get("rope_theta") or sizes.theta or 10000.0
        fraction = scaling.get("partial_rotary_factor", 0.5) if config.model_type in _HALF else 1
        found |= {"rope.freq_base": float(theta), "rope.dimension_count": int(sizes.head_dim * fraction)}
        found |= {"attention.key_length": sizes.head_dim, "attention.value_length": sizes.head_dim}
    if scaling.get("rope_type") in ("linear", "yarn"):
        found |= {"rope.scaling.type": scaling["rope_type"], "rope.scaling.factor": scaling["factor"]}
    if scaling.get("rope_type") == "yarn":
        found["rope.scaling.original_context_length"] = scaling["original_max_position_embeddings"]
    if config.model_type == "chatglm" and "chatglm2" in config._name_or_path:
        found |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(config.rope_ratio)}
    elif config.model_type == "chatglm":
        found["rope.freq_base"] = 10000.0 * getattr(config, "rope_ratio", 1.0)
    if config.model_type in ("mistral", "mixtral", "gemma3_text") and config.sliding_window:
        found["attention.sliding_window"] = config.sliding_window
    experts = {
        "expert_count": ("num_local_experts", "num_experts"),
        "expert_used_count": ("num_experts_per_tok",),
        "expert_feed_forward_length": ("moe_intermediate_size",),
        "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    }
    found |= {key: value for key, names in experts.items() if (value := _first(config, *names)) is not None}
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
