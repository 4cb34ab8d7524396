"""PaddleNLP folders: into a canonical checkpoint, and out of one.

    config.json                                 as Hugging Face's, with settings of Paddle's own among them
    model_state.pdparams, or model.safetensors  (or shards of either)
    tokenizer files                             as Hugging Face's

Against Hugging Face, every linear is [in, out], the head too, and the model inside has the family's name: `llama.` for
`model.`. So a family's rules for Paddle are its own with other names, and linears are turned on reading and writing.
Source: `_get_name_mappings` of each family's modeling.py in PaddleNLP 2 and 3.

Knows: those differences. Does not know: Paddle, which need not be installed, nor any family.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Container, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from llmc import checkpoint, tensors
from llmc import manifest as manifests
from llmc.checkpoint import SOURCE, Checkpoint
from llmc.converters import cast, families, hf, hf_tokenizer, json_file, pdparams
from llmc.converters import source as sources
from llmc.converters.rules import Family, Progress, Tensors, bind, from_canonical
from llmc.converters.source import Source
from llmc.errors import CheckpointError, UnsupportedModelError
from llmc.manifest import Manifest, Parent
from llmc.spec import LinearScaling, ModelSpec
from llmc.tensors import Array, TensorInfo

SINGLE, INDEX = "model_state.pdparams", "model_state.pdparams.index.json"
VERSION = "paddlenlp_version"

# Family -> what its tensors begin with in PaddleNLP, where Hugging Face has "model.".
PREFIXES = {
    "llama": "llama.",
    "mixtral": "mixtral.",
    "qwen2": "qwen2.",
    "qwen2_moe": "qwen2_moe.",
}
_THEIRS = "model."

# How a model is trained, split and computed, and not what.
_HARMLESS = frozenset(
    """
    context_parallel_degree enable_recompute fuse_sequence_parallel_allreduce ignore_index
    immediate_clear_past_key_value lm_shift_labels no_recompute_layers num_nextn_predict_layers pipeline_parallel_degree
    pp_recompute_interval recompute_granularity recompute_use_reentrant rope_fusion_level sep_parallel_degree seq_length
    sequence_parallel tensor_parallel_degree tensor_parallel_output tensor_parallel_rank use_flash_attention
    use_flash_attention_for_generation use_fused_rms_norm use_fused_rope use_recompute virtual_pp_degree
    """.split()  # noqa: SIM905 - as in reader.py
) | {VERSION}
_REFUSED = {
    "alibi": "this Baichuan-13B of PaddleNLP's has no place in its LLaMA",
    "fuse_attention_qkv": "llmc does not take apart what PaddleNLP fused",
    "fuse_attention_ffn": "llmc does not take apart what PaddleNLP fused",
    "use_long_sequence_strategies": "llmc does not know them",
}


def is_folder(folder: Path) -> bool:
    """Whether a folder is PaddleNLP's."""
    if (folder / SINGLE).is_file() or (folder / INDEX).is_file():
        return True
    return (folder / hf.CONFIG).is_file() and VERSION in json_file.read(folder / hf.CONFIG)


def convert(
    source: Path, out: Path, *, dtype: str = "keep", overwrite: bool = False, progress: Progress | None = None
) -> Checkpoint:
    """Make a canonical checkpoint of a PaddleNLP folder.

    Args:
        dtype: See `llmc.converters.source.write`.

    Raises:
        UserError: `out` exists, or `dtype` is not a type.
        UnsupportedModelError: The architecture or a setting of it is not supported.
        CheckpointError: A file or tensor is missing, unknown, misshapen or damaged, or a pickle holds more than arrays.
    """
    cast.target_dtype(dtype)
    return sources.write(_open(source), out, dtype=dtype, overwrite=overwrite, progress=progress)


def _open(folder: Path) -> Source:
    config = _read_config(json_file.read(folder / hf.CONFIG), folder / hf.CONFIG)
    family, spec = families.read_spec(config, folder / hf.CONFIG)
    parent = Parent(kind="paddle", sha256=manifests.sha256_of(folder / hf.CONFIG), name=folder.resolve().name)
    if (folder / manifests.NAME).is_file():
        manifests.verify(folder, manifests.read(folder, "export"))
        parent = manifests.parent(folder)
    infos = _read_weights(folder)
    theirs = _of_paddle(family, _prefix(family, infos))
    found = Source(
        where=folder,
        family=theirs,
        spec=spec,
        tensors=functools.partial(_tensors, infos, _linears(theirs, spec)),
        copy=functools.partial(_copy, folder, config),
        parents=(parent,),
    )
    if spec.tied and found.head in infos:
        raise CheckpointError(
            f"{folder}: the config says that head and embedding are tied, but there is a {found.head}"
        )
    return found


def _of_paddle(family: Family, prefix: str) -> Family:
    """A family as PaddleNLP names its tensors, which are still [out, in]."""
    rules = tuple(replace(rule, theirs=_renamed(rule.theirs, prefix)) for rule in family.rules)
    return replace(family, rules=rules, dropped=tuple(_renamed(glob, prefix) for glob in family.dropped), prefix=prefix)


def _renamed(name: str, prefix: str) -> str:
    return prefix + name.removeprefix(_THEIRS) if name.startswith(_THEIRS) else name


def _linears(family: Family, spec: ModelSpec) -> dict[str, str]:
    """What PaddleNLP keeps as [in, out], by its names -> canonical names: all matrices but the embedding."""
    return {
        item.theirs: item.ours[0]
        for item in bind(family.rules, spec)
        if len(item.shapes[0]) == 2 and item.ours[0] != "embed.weight"
    }


def _tensors(infos: Mapping[str, TensorInfo], linears: Container[str], dtype: np.dtype[Any] | None) -> Tensors:
    """Tensors of a PaddleNLP folder, the linears as [out, in]."""
    plain = cast.on_disk(infos, dtype)

    def load(name: str) -> Array:
        return _turned(name, infos[name], plain.infos[name].dtype) if name in linears else plain.load(name)

    met = {
        name: replace(info, shape=info.shape[::-1]) if name in linears else info for name, info in plain.infos.items()
    }
    return Tensors(met, load)


def _turned(name: str, info: TensorInfo, dtype: np.dtype[Any]) -> Array:
    """A matrix in a file, transposed and cast a block of rows at a time."""
    values = np.empty(info.shape[::-1], dtype)
    done = 0
    for block in map(tensors.read_tensor, cast.blocks(info)):
        values[:, done : done + len(block)] = cast.assemble(name, np.empty(block.shape, dtype), [block]).T
        done += len(block)
    return values


def _prefix(family: Family, infos: Mapping[str, TensorInfo]) -> str:
    """What the tensors of this folder begin with; older versions of PaddleNLP had "model." for some families."""
    for prefix in (PREFIXES.get(family.name), _THEIRS):
        if prefix and any(name.startswith(prefix) for name in infos):
            return prefix
    raise _unsupported(family)


def _unsupported(family: Family) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"llmc knows PaddleNLP's layout of {', '.join(PREFIXES)}, and not that of {family.name}: "
        "go through Hugging Face's format"
    )


def _read_config(config: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """The settings in Hugging Face's words."""
    for key, reason in _REFUSED.items():
        if config.get(key):
            raise UnsupportedModelError(f"{where}: '{key}' is {config[key]!r}; llmc supports false alone ({reason})")
    kind, factor = config.get("rope_scaling_type"), config.get("rope_scaling_factor", 1.0)
    if kind not in (None, "linear"):
        raise UnsupportedModelError(f"{where}: 'rope_scaling_type' is {kind!r}; llmc supports 'linear' and null")
    gone = _HARMLESS | _REFUSED.keys() | {"rope_scaling_type", "rope_scaling_factor"}
    found = {key: value for key, value in config.items() if key not in gone}
    return found | ({"rope_scaling": {"rope_type": "linear", "factor": factor}} if kind else {})


def _read_weights(folder: Path) -> dict[str, TensorInfo]:
    if (folder / SINGLE).is_file():
        return pdparams.read_file(folder / SINGLE)
    if not (folder / INDEX).is_file():
        if not hf.has_weights(folder):
            raise CheckpointError(f"{folder} has no weights: expected {SINGLE} or {hf.WEIGHTS}, or shards of either")
        return tensors.read_folder(folder)
    weight_map = json_file.read(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(Path(str(name)).name == name for name in weight_map.values()):
        raise CheckpointError(f"{folder / INDEX} is not an index of shards")
    found: dict[str, TensorInfo] = {}
    for name in sorted(set(weight_map.values())):
        found |= pdparams.read_file(folder / name)
    return found


def _copy(folder: Path, config: Mapping[str, Any], work: Path) -> None:
    """The tokenizer, and the config in Hugging Face's words: exporting to that format takes it from there."""
    hf_tokenizer.copy(folder, work, config)
    (work / SOURCE).mkdir()
    (work / SOURCE / hf.CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def export(folder: Path, out: Path, *, overwrite: bool = False, progress: Progress | None = None) -> Manifest:
    """Write a checkpoint as a PaddleNLP folder with safetensors, the tensors unchanged but for their layout.

    Raises:
        ManifestError: `folder` is not a checkpoint.
        UserError: It is quantized, or `out` exists.
        UnsupportedModelError: PaddleNLP's layout of this family is not known, or its config cannot say this model.
    """
    found = hf.open_checkpoint(folder)
    family = families.by_name(found.spec.family)
    if family.name not in PREFIXES:
        raise _unsupported(family)
    config = _write_config(found, family)
    paddles = _of_paddle(family, PREFIXES[family.name])
    linears = _linears(paddles, found.spec)
    theirs = from_canonical(paddles.rules, found.spec, Tensors(found.infos, found.__getitem__))

    def load(name: str) -> Array:
        if name not in linears:
            return theirs.load(name)
        info = found.infos[linears[name]]
        return _turned(name, info, info.dtype)

    turned = {
        name: replace(info, shape=info.shape[::-1]) if name in linears else info for name, info in theirs.infos.items()
    }
    with manifests.creating(out, overwrite=overwrite) as work:
        watched = Tensors(turned, load).watched("export", progress)
        values = ((name, watched(name)) for name in turned)
        # PaddleNLP takes "np" for its own layout, and transposes "pt" on loading.
        hashes = tensors.write_sharded(work, turned, values, max_bytes=checkpoint.SHARD_BYTES, layout="np")
        checkpoint.copy_tokenizer(folder, work)
        (work / hf.CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        parents = (manifests.parent(folder),)
        settings = {"format": "paddle"}
        made = Manifest(kind="export", tools=manifests.tools(), settings=settings, parents=parents)
        return manifests.seal(work, made, hashes)


def _write_config(found: Checkpoint, family: Family) -> dict[str, Any]:
    spec, scaling = found.spec, found.spec.rope.scaling
    for is_there, what in (
        (scaling is not None and not isinstance(scaling, LinearScaling), "rope scaling other than linear"),
        (spec.attention.head_dim * spec.attention.num_heads != spec.hidden_size, "a head size of its own"),
        (spec.attention.o_bias or spec.mlp.bias, "biases of o and of the MLP"),
        (spec.moe is not None and spec.moe.shared_size and not spec.attention.qkv_bias, "q, k and v without biases"),
        (spec.moe is not None and spec.moe.dense_layers, "layers without experts among others"),
        (spec.attention.window is not None, "sliding windows"),
        (spec.score is not None, "a scoring head"),
    ):
        if is_there:
            raise UnsupportedModelError(f"llmc does not know how PaddleNLP's {family.name} would say {what}")
    config = family.write(found.spec) | {VERSION: None, "dtype": str(found.infos["embed.weight"].dtype)}
    for key in ("rope_scaling", "head_dim", "attention_bias", "mlp_bias"):
        config.pop(key, None)
    if isinstance(scaling, LinearScaling):
        config |= {"rope_scaling_type": "linear", "rope_scaling_factor": scaling.factor}
    generation = json_file.read(found.folder / hf.GENERATION, required=False)
    return config | {key: generation.get(key) for key in hf_tokenizer.TOKEN_IDS}
