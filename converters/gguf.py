"""GGUF files (llama.cpp) into a canonical checkpoint: settings, tensors and tokenizer.

The metadata is put into the words of a Hugging Face config, so that the family's own reader decides what is
supported. Quantized tensors are dequantized to float32, a block of rows at a time; F32, F16 and BF16 stay as they are
unless another type is asked for. Architecture "llama" has the rows of q and k permuted for a rotation of neighbours
(llama.cpp, convert_hf_to_gguf.py, `permute`); here they are put back, so that the head's halves form the pairs.

Knows: GGUF's names. Does not know: the container (gguf_file.py), its types of numbers (gguf_tensors.py), the
tokenizer (gguf_tokenizer.py), the families.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llmc import checkpoint
from llmc import manifest as manifests
from llmc.checkpoint import Checkpoint
from llmc.converters import cast, families, gguf_file, gguf_tensors, gguf_tokenizer, llama3_factors
from llmc.converters.gguf_file import GgufFile
from llmc.converters.rope_config import yarn_magnitude
from llmc.converters.rules import SAME, Op, Progress, Rule, Tensors, to_canonical
from llmc.errors import UnsupportedModelError
from llmc.manifest import Manifest, Parent
from llmc.names import Shape
from llmc.spec import ModelSpec
from llmc.tensors import Array

ROPE_FACTORS = "rope_freqs.weight"


def _halves_from_neighbours(source: Array, _shapes: Sequence[Shape], spec: ModelSpec) -> list[Array]:
    """Rows of each head from (0, n/2, 1, n/2 + 1, ...) to (0, 1, ... n - 1)."""
    heads = source.reshape(-1, spec.attention.head_dim // 2, 2, *source.shape[1:])
    return [heads.swapaxes(1, 2).reshape(source.shape)]


def _neighbours_from_halves(parts: Sequence[Array], spec: ModelSpec) -> Array:
    heads = parts[0].reshape(-1, 2, spec.attention.head_dim // 2, *parts[0].shape[1:])
    return heads.swapaxes(1, 2).reshape(parts[0].shape)


UNPERMUTE = Op(_halves_from_neighbours, _neighbours_from_halves, lambda shapes: shapes[0])


def _rules(rotated: Op) -> tuple[Rule, ...]:
    """The tensors of all architectures; `rotated` is what stands between their q and k and ours."""
    linears = {"attn.q": rotated, "attn.k": rotated, "attn.v": SAME, "attn.o": SAME}
    theirs = {"attn.q": "attn_q", "attn.k": "attn_k", "attn.v": "attn_v", "attn.o": "attn_output"}
    mlp = {f"mlp.{name}": f"ffn_{name}" for name in ("gate", "up", "down")}
    norms = {
        "attn_norm": "attn_norm",
        "attn.q_norm": "attn_q_norm",
        "attn.k_norm": "attn_k_norm",
        "mlp_norm": "ffn_norm",
    }
    return (
        Rule("embed.weight", "token_embd.weight"),
        *(Rule(f"layers.{{layer}}.{ours}.weight", f"blk.{{layer}}.{name}.weight") for ours, name in norms.items()),
        *(
            Rule(f"layers.{{layer}}.{ours}.{kind}", f"blk.{{layer}}.{name}.{kind}", linears.get(ours, SAME))
            for ours, name in (theirs | mlp).items()
            for kind in ("weight", "bias")
        ),
        Rule("norm.weight", "output_norm.weight"),
        Rule("head.weight", "output.weight"),
    )


@dataclass(frozen=True, slots=True)
class _Architecture:
    """What a value of `general.architecture` means.

    Attributes:
        name: transformers' architecture.
        rules: Its tensors.
        switches: Tensor whose presence turns on a setting of the config -> that setting.
    """

    name: str
    rules: tuple[Rule, ...]
    switches: Mapping[str, str] = field(default_factory=dict)


ARCHITECTURES = {
    "llama": _Architecture(
        "LlamaForCausalLM",
        _rules(UNPERMUTE),
        {"blk.0.attn_q.bias": "attention_bias", "blk.0.ffn_gate.bias": "mlp_bias"},
    ),
    "qwen2": _Architecture("Qwen2ForCausalLM", _rules(SAME)),
    "qwen3": _Architecture("Qwen3ForCausalLM", _rules(SAME), {"blk.0.attn_q.bias": "attention_bias"}),
}

# Key after the architecture's name -> setting of a Hugging Face config.
_SETTINGS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
# Keys that say again what the tensors say, or where the file comes from.
_HARMLESS = {"vocab_size", "tensor_data_layout", "rope.scaling.finetuned"}


def convert(
    source: Path, out: Path, *, dtype: str = "keep", overwrite: bool = False, progress: Progress | None = None
) -> Checkpoint:
    """Make a canonical checkpoint of a GGUF file.

    Args:
        dtype: "keep" gives float32 for what is quantized and leaves the rest; or the type of all tensors.

    Raises:
        UserError: `out` exists, or `dtype` is not a type.
        UnsupportedModelError: The architecture, a setting, a ggml type or the tokenizer is not supported.
        CheckpointError: The file is damaged, or a tensor is missing, unknown or misshapen.
        MissingDependencyError: The gguf package is not installed.
    """
    target = cast.target_dtype(dtype)
    manifests.check_target(out, overwrite=overwrite)
    file = gguf_file.read(source)
    stored = gguf_tensors.open_tensors(file, target)
    config = read_config(file, stored)
    spec = families.read_spec(config, source)[1]
    rules = ARCHITECTURES[file.metadata["general.architecture"]].rules
    canonical = to_canonical(rules, spec, stored, dropped=(ROPE_FACTORS,), where=source)
    with manifests.creating(out, overwrite=overwrite) as work:
        gguf_tokenizer.write(file.metadata, work, where=source)
        checkpoint.write(work, spec, canonical.infos, canonical.watched("convert", progress))
        parent = Parent(kind="gguf", sha256=manifests.sha256_of(source), name=source.name)
        tools, settings = manifests.tools("gguf"), {"dtype": dtype}
        manifests.seal(work, Manifest(kind="checkpoint", tools=tools, settings=settings, parents=(parent,)))
    return Checkpoint(out)


def read_config(file: GgufFile, stored: Tensors) -> dict[str, Any]:
    """The metadata in the words of a Hugging Face config.

    Raises:
        UnsupportedModelError: Another architecture, or a setting of it that llmc does not know.
    """
    name = file.metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{file.path}: the architecture is {name!r}; from GGUF llmc supports {', '.join(ARCHITECTURES)}"
        )
    if (count := file.metadata.get("split.count", 1)) > 1:
        raise UnsupportedModelError(
            f"{file.path} is one of {count} parts: join them first (llama-gguf-split --merge FIRST_PART OUT.gguf)"
        )
    architecture = ARCHITECTURES[name]
    left = {
        key.removeprefix(f"{name}."): _shortest(value)
        for key, value in file.metadata.items()
        if key.startswith(f"{name}.")
    }
    config: dict[str, Any] = {
        "architectures": [architecture.name],
        "tie_word_embeddings": "output.weight" not in stored.infos,
    }
    config |= {setting: left.pop(key) for key, setting in _SETTINGS.items() if key in left}
    if "token_embd.weight" in stored.infos:
        config["vocab_size"] = stored.infos["token_embd.weight"].shape[0]
    if window := left.pop("attention.sliding_window", None):
        # llama.cpp's "llama" is Mistral, too, and this is what tells them apart.
        config |= {"architectures": ["MistralForCausalLM"], "sliding_window": window}
    config |= {setting: True for tensor, setting in architecture.switches.items() if tensor in stored.infos}
    config["rope_scaling"] = _rope_scaling(left, config, stored, file.path)
    _refuse_the_rest(left, config, file)
    return config


def _shortest(value: Any) -> Any:
    """A float32 as the shortest decimal that means it: 1e-06, not 9.99999997e-07, as its author wrote it."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _head_dim(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim") or config.get("hidden_size", 0) // config.get("num_attention_heads", 1))


def _rope_scaling(
    left: dict[str, Any], config: Mapping[str, Any], stored: Tensors, where: object
) -> dict[str, Any] | None:
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
        head_dim, theta = _head_dim(config), config.get("rope_theta", 10000.0)
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


def _refuse_the_rest(left: Mapping[str, Any], config: Mapping[str, Any], file: GgufFile) -> None:
    implied = {
        "rope.dimension_count": _head_dim(config),
        "attention.value_length": _head_dim(config),
        "attention.causal": True,
        "expert_count": 0,
        "expert_used_count": 0,
    }
    for key, value in left.items():
        if key in _HARMLESS or implied.get(key) == value:
            continue
        expected = f"; llmc supports {implied[key]!r} alone" if key in implied else ", which llmc does not know"
        raise UnsupportedModelError(
            f"{file.path}: the setting '{file.metadata['general.architecture']}.{key}' is {value!r}{expected}"
        )
