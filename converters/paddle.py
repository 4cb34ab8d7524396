"""PaddleNLP folders: into a canonical checkpoint, and out of one.

    config.json                                 as Hugging Face's, with settings of Paddle's own among them
    model_state.pdparams, or model.safetensors  (or shards of either)
    tokenizer files                             as Hugging Face's

Every linear is [in, out] there, the head too unless it is the embedding; they are turned on reading and writing. Names
of tensors and settings are those of paddle_layouts.py.

Knows: the files. Does not know: Paddle, which need not be installed, nor any family.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Container, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from llmc import checkpoint, json_file, tensors
from llmc import manifest as manifests
from llmc.checkpoint import SOURCE, Checkpoint
from llmc.converters import cast, families, hf, hf_tokenizer, native, pdparams
from llmc.converters import source as sources
from llmc.converters.ops import TRANSPOSED
from llmc.converters.paddle_layouts import LAYOUTS, Layout, renamed
from llmc.converters.rules import Family, Progress, Rule, Tensors, bind, from_canonical
from llmc.converters.source import Source
from llmc.errors import CheckpointError, UnsupportedModelError
from llmc.manifest import Manifest, Parent
from llmc.spec import LinearScaling, ModelSpec, Rope
from llmc.tensors import Array, TensorInfo

SINGLE, INDEX = "model_state.pdparams", "model_state.pdparams.index.json"
VERSION = "paddlenlp_version"

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
    layout, config = _read_config(json_file.read(folder / hf.CONFIG), folder / hf.CONFIG)
    family, spec = families.read_spec(config, folder / hf.CONFIG)
    parent = Parent(kind="paddle", sha256=manifests.sha256_of(folder / hf.CONFIG), name=folder.resolve().name)
    if (folder / manifests.NAME).is_file():
        manifests.verify(folder, manifests.read(folder, "export"))
        parent = manifests.parent(folder)
    infos = _read_weights(folder)
    theirs = replace(family, rules=_rules(layout, infos), dropped=layout.dropped)
    found = Source(
        where=folder,
        family=theirs,
        spec=spec,
        tensors=functools.partial(_tensors, infos, _linears(theirs, spec)),
        copy=functools.partial(_copy, folder, config),
        parents=(parent,),
    )
    if spec.tied and found.head in infos and "tie_word_embeddings" not in layout.fixed:
        raise CheckpointError(
            f"{folder}: the config says that head and embedding are tied, but there is a {found.head}"
        )
    return found


def _rules(layout: Layout, infos: Mapping[str, TensorInfo]) -> tuple[Rule, ...]:
    """The rules by the names of this folder; older versions of PaddleNLP had "model." in place of some families'."""
    prefix = f"{layout.model_type}."
    is_older = not any(name.startswith(prefix) for name in infos)
    return renamed(layout.rules, prefix, "model.") if is_older else layout.rules


def _linears(family: Family, spec: ModelSpec) -> dict[str, tuple[str, ...]]:
    """What PaddleNLP keeps as [in, out], by its names -> canonical names: all matrices but embeddings."""
    return {
        item.theirs: item.ours
        for item in bind(family.rules, spec)
        if len(item.shapes[0]) == 2 and item.ours[0] not in ("embed.weight", "positions.weight")
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


def _read_config(config: Mapping[str, Any], where: Path) -> tuple[Layout, dict[str, Any]]:
    """The layout of a folder, and its settings in the authors' words."""
    layout = _layout_of(config, where)
    refused: dict[str, Any] = dict.fromkeys(_REFUSED, False) | {"alibi": False} | layout.said
    for key, value in refused.items():
        if config.get(key) not in (None, value):
            reason = f" ({_REFUSED[key]})" if key in _REFUSED else ""
            raise UnsupportedModelError(f"{where}: '{key}' is {config[key]!r}; llmc supports {value!r} alone{reason}")
    kind, factor = config.get("rope_scaling_type"), config.get("rope_scaling_factor", 1.0)
    if kind not in (None, "linear"):
        raise UnsupportedModelError(f"{where}: 'rope_scaling_type' is {kind!r}; llmc supports 'linear' and null")
    gone = _HARMLESS | layout.harmless | refused.keys() | {"rope_scaling_type", "rope_scaling_factor"}
    kept = {key: value for key, value in config.items() if key in layout.words or key not in gone}
    found = {layout.words.get(key, key): value for key, value in kept.items()}
    for key, value in layout.fixed.items():
        if found.get(key) not in (None, value):
            raise UnsupportedModelError(f"{where}: '{key}' is {found[key]!r}; llmc supports {value!r} alone")
    found |= layout.fixed | {"architectures": list(layout.family.architectures[:1])}
    return layout, found | ({"rope_scaling": {"rope_type": "linear", "factor": factor}} if kind else {})


def _layout_of(config: Mapping[str, Any], where: Path) -> Layout:
    """The layout that a config names; of several with one class the one whose own settings it has."""
    met = config.get("architectures") or []
    named = [layout for layout in LAYOUTS.values() if set(layout.architectures) & set(map(str, met))]
    for layout in sorted(named, key=lambda layout: -len(layout.said)):
        if all(config.get(key) == value for key, value in layout.said.items()) or len(named) == 1:
            return layout
    if named:
        return next(layout for layout in named if not layout.said)
    known = ", ".join(layout.architectures[0] for layout in LAYOUTS.values())
    raise UnsupportedModelError(
        f"{where}: 'architectures' is {met!r}; llmc knows PaddleNLP's layout of {known}, and of no other: go through "
        "Hugging Face's format"
    )


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
    layout, config = _write_config(found)
    paddles = replace(layout.family, rules=layout.rules)
    linears = _linears(paddles, found.spec)
    source = Tensors(found.infos, found.__getitem__)
    theirs = from_canonical(paddles.rules, found.spec, source)

    def load(name: str) -> Array:
        if name not in linears:
            return theirs.load(name)
        if len(linears[name]) > 1:
            return TRANSPOSED.join([theirs.load(name)], found.spec)
        info = found.infos[linears[name][0]]
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


def _write_config(found: Checkpoint) -> tuple[Layout, dict[str, Any]]:
    """The layout that can say a checkpoint's model: its family's own, or that of the family that computes the same."""
    family = families.by_name(found.spec.family)
    names = [name for name in (family.name, family.native) if name in LAYOUTS]
    if not names:
        raise UnsupportedModelError(
            f"llmc knows PaddleNLP's layout of {', '.join(LAYOUTS)}, and not that of {family.name}: "
            "go through Hugging Face's format"
        )
    reasons = []
    for name in names:
        try:
            config = _config_of(LAYOUTS[name], found.spec.model_copy(update={"family": name}))
        except UnsupportedModelError as error:
            reasons.append(error)
            continue
        generation = json_file.read(found.folder / hf.GENERATION, required=False)
        config |= {VERSION: None, "dtype": str(found.infos["embed.weight"].dtype)}
        return LAYOUTS[name], {key: generation.get(key) for key in hf_tokenizer.TOKEN_IDS} | config
    raise reasons[0]


def _config_of(layout: Layout, spec: ModelSpec) -> dict[str, Any]:
    """A spec in PaddleNLP's words.

    Raises:
        UnsupportedModelError: It has no word for something.
    """
    family = layout.family
    if spec.score is not None:
        raise UnsupportedModelError(f"llmc does not know how PaddleNLP's {family.name} would say a scoring head")
    if not native.can_say(family, spec):
        raise UnsupportedModelError(f"this model is no {family.name}")
    config = family.write(spec)
    for key, value in layout.fixed.items():
        if config.pop(key, None) != value:
            raise UnsupportedModelError(
                f"llmc does not know how PaddleNLP's {family.name} would say '{key}' other than {value!r}"
            )
    scaling = spec.position.scaling if isinstance(spec.position, Rope) else None
    if scaling is not None and not isinstance(scaling, LinearScaling):
        raise UnsupportedModelError(f"llmc knows no rope scaling of PaddleNLP's {family.name} other than linear")
    if "head_dim" in config and config.pop("head_dim") * spec.attention.num_heads != spec.hidden_size:
        raise UnsupportedModelError(f"PaddleNLP's {family.name} has no head size of its own")
    config.pop("rope_scaling", None)
    if isinstance(scaling, LinearScaling):
        config |= {"rope_scaling_type": "linear", "rope_scaling_factor": scaling.factor}
    words = {ours: theirs for theirs, ours in layout.words.items()}
    said = {words.get(key, key): value for key, value in config.items()}
    for key, value in layout.said.items():
        if said.setdefault(key, value) != value:
            raise UnsupportedModelError(f"PaddleNLP's {family.name} has '{key}' {value!r} alone, not {said[key]!r}")
    return said | {"architectures": [layout.architectures[0]], "model_type": layout.model_type}
