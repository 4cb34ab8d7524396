"""What GGUF's metadata says of a model: into the words of a Hugging Face config, and from a spec.

Reading goes through the family's own reader, which decides what is supported. What a key that is missing means, and
what an architecture implies without saying, is llama.cpp's (src/llama-model.cpp): its graph is what a file was made
for. Writing is checked by reading: a spec that does not come back has no place in GGUF, and is refused.

Knows: GGUF's keys. Does not know: the container, the tensors' layouts (gguf_names.py), the tokenizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llmc.converters import families, llama3_factors
from llmc.converters.gguf_names import EMBEDDING, HEAD, ROPE_FACTORS
from llmc.converters.rope_config import yarn_magnitude
from llmc.converters.rules import Tensors
from llmc.errors import UnsupportedModelError
from llmc.rope import inverse_frequencies
from llmc.spec import LinearScaling, Llama3Scaling, ModelSpec, Rope, Scaling, YarnScaling
from llmc.tensors import Array

Words = dict[str, Any]

# Key after the architecture's name -> setting of a Hugging Face config.
_SIZES = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_LLAMA = _SIZES | {
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
}
_QWEN_EXPERTS = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
_BLOOM = {
    "block_count": "n_layer",
    "context_length": "seq_length",
    "embedding_length": "hidden_size",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}
# Keys that say again what the tensors say, or where the file comes from.
_HARMLESS = {"vocab_size", "tensor_data_layout", "rope.scaling.finetuned"}


@dataclass(frozen=True, slots=True)
class Architecture:
    """What a value of `general.architecture` means.

    Attributes:
        name: transformers' architecture.
        words: Key -> setting of that architecture's config.
        variants: Key that is there and not 0 -> the architecture that it then is; the last one counts.
        implied: Settings that hold unless a switch or a key says otherwise.
        switches: Setting that is true where one of these tensors is there.
        partial: A part of each head may be turned.
        square: llama.cpp wants heads that fill the hidden size exactly.
        complete: Adds to the config what follows from the rest.
        relatives: Architectures that are written as this one, and read as `name`.
    """

    name: str
    words: Mapping[str, str] = field(default_factory=lambda: _LLAMA)
    variants: Mapping[str, str] = field(default_factory=dict)
    implied: Mapping[str, Any] = field(default_factory=dict)
    switches: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    partial: bool = False
    square: bool = False
    complete: Callable[[Words], Words] = lambda config: config
    relatives: tuple[str, ...] = ()


def _baichuan(config: Words) -> Words:
    """llama.cpp tells the 7B, which is rotated, from the 13B, which has linear biases, by the number of layers."""
    layers = config.get("num_hidden_layers")
    if layers not in (32, 40):
        raise UnsupportedModelError(
            f"a Baichuan of {layers} layers: llama.cpp knows it with 32 (rotary) and 40 (linear biases) alone"
        )
    return config if layers == 40 else config | {"max_position_embeddings": config.get("model_max_length")}


def _qwen(config: Words) -> Words:
    """Qwen1's config counts gate and up together."""
    return config | {"intermediate_size": config.get("intermediate_size", 0) // 2}


def _gemma3(config: Words) -> Words:
    """llama.cpp scales scores by the root of a head's size, but for the 27B, which it tells by its 62 layers."""
    hidden, heads = config.get("hidden_size", 0), config.get("num_attention_heads", 1)
    is_largest = config.get("num_hidden_layers") == 62
    return config | {"query_pre_attn_scalar": hidden // heads if is_largest else config.get("head_dim")}


_QKV_BIAS = ("blk.0.attn_q.bias", "blk.0.attn_qkv.bias")
_BIAS = {"attention_bias": _QKV_BIAS}

ARCHITECTURES = {
    # llama.cpp's "llama" is Mistral and Mixtral, too.
    "llama": Architecture(
        "LlamaForCausalLM",
        _LLAMA
        | {
            "attention.sliding_window": "sliding_window",
            "expert_count": "num_local_experts",
            "expert_used_count": "num_experts_per_tok",
        },
        variants={"attention.sliding_window": "MistralForCausalLM", "expert_count": "MixtralForCausalLM"},
        switches=_BIAS | {"mlp_bias": ("blk.0.ffn_gate.bias",)},
    ),
    "qwen2": Architecture("Qwen2ForCausalLM", square=True, relatives=("QWenLMHeadModel",)),
    "qwen": Architecture("Qwen2ForCausalLM", square=True, complete=_qwen),
    "qwen2moe": Architecture(
        "Qwen2MoeForCausalLM",
        _LLAMA | _QWEN_EXPERTS | {"expert_shared_feed_forward_length": "shared_expert_intermediate_size"},
        implied={"norm_topk_prob": False, "qkv_bias": False},
        switches={"qkv_bias": _QKV_BIAS},
        square=True,
    ),
    "qwen3": Architecture("Qwen3ForCausalLM", switches=_BIAS),
    "qwen3moe": Architecture("Qwen3MoeForCausalLM", _LLAMA | _QWEN_EXPERTS, implied={"norm_topk_prob": True}),
    "gpt2": Architecture(
        "GPT2LMHeadModel",
        _BLOOM | {"context_length": "n_positions", "embedding_length": "n_embd"},
        implied={"activation_function": "gelu_new"},
    ),
    "bloom": Architecture("BloomForCausalLM", _BLOOM),
    "baichuan": Architecture(
        "BaichuanForCausalLM", _SIZES | {"context_length": "model_max_length"}, complete=_baichuan
    ),
    "chatglm": Architecture(
        "GlmForCausalLM",
        implied={"attention_bias": False},
        switches=_BIAS,
        partial=True,
        square=True,
        relatives=("ChatGLMModel", "ChatGLMForConditionalGeneration"),
    ),
    "gemma3": Architecture(
        "Gemma3ForCausalLM",
        _LLAMA
        | {
            "attention.sliding_window": "sliding_window",
            "attention.sliding_window_pattern": "sliding_window_pattern",
            "rope.freq_base_swa": "rope_local_base_freq",
        },
        implied={"rope_local_base_freq": 10000.0, "sliding_window_pattern": 6},
        complete=_gemma3,
    ),
    "glm4": Architecture("Glm4ForCausalLM", implied={"attention_bias": False}, switches=_BIAS, partial=True),
}


def architecture_of(metadata: Mapping[str, Any], where: object) -> str:
    """The file's `general.architecture`.

    Raises:
        UnsupportedModelError: llmc does not know it.
    """
    name = metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{where}: the architecture is {name!r}; from GGUF llmc supports {', '.join(ARCHITECTURES)}"
        )
    return str(name)


def read_config(metadata: Mapping[str, Any], stored: Tensors, where: object) -> Words:
    """The metadata in the words of a Hugging Face config.

    Raises:
        UnsupportedModelError: Another architecture, or a setting of it that llmc does not know.
    """
    name = architecture_of(metadata, where)
    architecture, prefix = ARCHITECTURES[name], f"{name}."
    left = {
        key.removeprefix(prefix): _shortest(value)
        for key, value in metadata.items()
        # 0 is how a file says that there is none: no window, no experts.
        if key.startswith(prefix) and not (value == 0 and key.removeprefix(prefix) in architecture.variants)
    }
    met = [variant for key, variant in architecture.variants.items() if key in left]
    head_dim = _head_dim(left, architecture.square)
    implied = {
        "attention.head_count_kv": left.get("attention.head_count"),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.causal": True,
        "rope.dimension_count": head_dim,
        "rope.freq_base": 10000.0,
        "expert_count": 0,
        "expert_used_count": 0,
    }
    config: Words = {
        "architectures": [[architecture.name, *met][-1]],
        "tie_word_embeddings": HEAD not in stored.infos,
        **architecture.implied,
    }
    if architecture.square and left.get("attention.key_length", head_dim) != head_dim:
        raise UnsupportedModelError(
            f"{where}: heads of {left['attention.key_length']} in '{name}'; llama.cpp supports {head_dim} alone there"
        )
    for key, setting in architecture.words.items():
        value = left.pop(key, implied.get(key))
        config |= {setting: value} if value else {}
    for setting, tensors in architecture.switches.items():
        config |= {setting: True} if any(tensor in stored.infos for tensor in tensors) else {}
    if EMBEDDING in stored.infos:
        config["vocab_size"] = stored.infos[EMBEDDING].shape[0]
    if architecture.partial:
        config["partial_rotary_factor"] = left.pop("rope.dimension_count", head_dim) / max(1, head_dim)
    if scaling := _read_scaling(left, config, stored, where):
        config["rope_scaling"] = scaling
    _refuse_the_rest(left, implied, name, where)
    return architecture.complete(config)


def _shortest(value: Any) -> Any:
    """A float32 as the shortest decimal that means it: 1e-06, not 9.99999997e-07, as its author wrote it."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _head_dim(left: Mapping[str, Any], square: bool) -> int:
    """The size of a head; 0 where the file does not say, which the family's reader then refuses."""
    own, hidden, heads = (left.get(key) for key in ("attention.key_length", "embedding_length", "attention.head_count"))
    if isinstance(own, int) and own and not square:
        return own
    return hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads else 0


def _read_scaling(left: Words, config: Words, stored: Tensors, where: object) -> Words | None:
    """The keys of the rotary scaling, and the factors that llama.cpp keeps as a tensor for Llama 3."""
    kind, factor = left.pop("rope.scaling.type", "none"), left.pop("rope.scaling.factor", 1.0)
    if old := left.pop("rope.scale_linear", None):
        kind, factor = "linear", old
    original = left.pop("rope.scaling.original_context_length", None)
    is_scaled = kind != "none" and factor != 1.0
    if kind not in ("none", "linear", "yarn") or (is_scaled and ROPE_FACTORS in stored.infos):
        beside = f" beside the tensor {ROPE_FACTORS}" if ROPE_FACTORS in stored.infos else ""
        raise UnsupportedModelError(
            f"{where}: the rotary scaling is {kind!r}{beside}; from GGUF llmc supports linear, yarn and Llama 3's"
        )
    if ROPE_FACTORS in stored.infos:
        theta, head_dim = config.get("rope_theta", 10000.0), config.get("head_dim", 0)
        return llama3_factors.recover(stored.load(ROPE_FACTORS), theta, head_dim)
    if not is_scaled:
        return None
    if kind == "linear":
        return {"rope_type": kind, "factor": factor}
    # ggml multiplies its own magnitude by the file's factor (ggml-cpu/ops.cpp, rope_yarn).
    magnitude = yarn_magnitude(factor) * left.pop("rope.scaling.attn_factor", 1.0)
    betas = {key: left.pop(f"rope.scaling.yarn_{key}", None) for key in ("beta_fast", "beta_slow")}
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
        "attention_factor": magnitude,
        **{key: value for key, value in betas.items() if value is not None},
    }


def _refuse_the_rest(left: Mapping[str, Any], implied: Mapping[str, Any], name: str, where: object) -> None:
    for key, value in left.items():
        if key in _HARMLESS or (key in implied and implied[key] == value):
            continue
        expected = f"; llmc supports {implied[key]!r} alone" if key in implied else ", which llmc does not know"
        raise UnsupportedModelError(f"{where}: the setting '{name}.{key}' is {value!r}{expected}")


def architecture_for(family: str) -> str:
    """The architecture as which a family's models are written.

    Raises:
        UnsupportedModelError: GGUF has none for it.
    """
    own = families.by_name(family)
    # What is read from GGUF has no sign: its architecture is that of the family without one.
    met = set() if own.sign else set(own.architectures)
    for name, architecture in ARCHITECTURES.items():
        if met.intersection((architecture.name, *architecture.variants.values(), *architecture.relatives)):
            return name
    raise UnsupportedModelError(f"GGUF has no architecture for the family '{family}', or llmc does not know it")


# Key -> what a spec says; None is not written. A key that an architecture has no word for is not written either.
_WRITTEN: dict[str, Callable[[ModelSpec], Any]] = {
    "block_count": lambda spec: spec.num_layers,
    "context_length": lambda spec: spec.max_positions,
    "embedding_length": lambda spec: spec.hidden_size,
    "feed_forward_length": lambda spec: spec.mlp.intermediate_size,
    "attention.head_count": lambda spec: spec.attention.num_heads,
    "attention.head_count_kv": lambda spec: spec.attention.num_kv_heads,
    "attention.key_length": lambda spec: spec.attention.head_dim,
    "attention.value_length": lambda spec: spec.attention.head_dim,
    "attention.layer_norm_rms_epsilon": lambda spec: spec.norm.eps,
    "attention.layer_norm_epsilon": lambda spec: spec.norm.eps,
    "attention.sliding_window": lambda spec: spec.attention.window,
    "rope.freq_base": lambda spec: _rope(spec).theta,
    "rope.dimension_count": lambda spec: _rope(spec).size(spec.attention.head_dim),
    "expert_count": lambda spec: spec.moe and spec.moe.num_experts,
    "expert_used_count": lambda spec: spec.moe and spec.moe.top_k,
    "expert_feed_forward_length": lambda spec: spec.moe and spec.moe.intermediate_size,
    "expert_shared_feed_forward_length": lambda spec: spec.moe and spec.moe.shared_size,
    "vocab_size": lambda spec: spec.vocab_size,
}
_ALWAYS = {
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "rope.freq_base",
    "rope.dimension_count", "vocab_size",
}  # fmt: skip


def _rope(spec: ModelSpec) -> Rope:
    return spec.position if isinstance(spec.position, Rope) else Rope()


def write(spec: ModelSpec) -> Words:
    """The metadata of a model, `general.architecture` first.

    Raises:
        UnsupportedModelError: GGUF has no architecture for it, or no place for something that the spec says.
    """
    name = architecture_for(spec.family)
    if spec.score:
        raise UnsupportedModelError("llmc does not write a scoring head into GGUF: use --format hf")
    known = _ALWAYS | set(ARCHITECTURES[name].words)
    rotary = {} if isinstance(spec.position, Rope) else {"rope.freq_base", "rope.dimension_count"}
    found = {key: value(spec) for key, value in _WRITTEN.items() if key in known and key not in rotary}
    found |= _write_scaling(_rope(spec).scaling)
    return {
        "general.architecture": name,
        **{f"{name}.{key}": value for key, value in found.items() if value is not None},
    }


def _write_scaling(scaling: Scaling | None) -> Words:
    """llama.cpp takes Llama 3's from a tensor (`rope_factors`), and for most architectures reads no betas of YaRN's."""
    if isinstance(scaling, LinearScaling):
        return {"rope.scaling.type": "linear", "rope.scaling.factor": scaling.factor}
    if isinstance(scaling, YarnScaling):
        return {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": scaling.factor,
            "rope.scaling.original_context_length": scaling.original_max_positions,
            "rope.scaling.attn_factor": scaling.attention_factor / yarn_magnitude(scaling.factor),
        }
    return {}


def rope_factors(spec: ModelSpec) -> Array | None:
    """The tensor `rope_freqs.weight`: what llama.cpp divides each frequency by; None where there is nothing to say."""
    rope = _rope(spec)
    if not isinstance(rope.scaling, Llama3Scaling):
        return None
    head_dim = spec.attention.head_dim
    plain = inverse_frequencies(rope.model_copy(update={"scaling": None}), head_dim, 1)[0]
    return (plain / inverse_frequencies(rope, head_dim, 1)[0]).astype(np.float32)


def check_written(spec: ModelSpec, metadata: Mapping[str, Any], stored: Tensors) -> None:
    """Read back what is about to be written.

    Raises:
        UnsupportedModelError: It would be another model; names what GGUF has no place for.
    """
    found = families.read_spec(read_config(metadata, stored, "the GGUF file"), "the GGUF file")[1]
    name = metadata["general.architecture"]
    if lost := _difference(spec.model_dump(mode="json"), found.model_dump(mode="json"), ""):
        raise UnsupportedModelError(f"GGUF's architecture '{name}' has no place for {lost}")


def _difference(left: Any, right: Any, path: str) -> str | None:
    """The first value that differs, as "norm.eps = 1e-05"; the family's name does not count."""
    if isinstance(left, dict) and isinstance(right, dict):
        keys = [key for key in left if path or key != "family"]
        return next(filter(None, (_difference(left[key], right.get(key), f"{path}.{key}") for key in keys)), None)
    both_real = isinstance(left, float) and isinstance(right, float)
    # The file's numbers are float32.
    is_same = math.isclose(left, right, rel_tol=1e-6) if both_real else left == right
    return None if is_same else f"'{path[1:]}' = {left!r} (it would read {right!r})"
