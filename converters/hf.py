"""Hugging Face folders: into a canonical checkpoint, and back.

    config.json                      -> spec.json, and as it is in source/
    model.safetensors (or shards)    -> model.safetensors under canonical names
    tokenizer.json ...               -> the same

Knows: the files of such a folder. Does not know: any family (converters/families), nor how a tensor is renamed
(converters/rules.py). One tensor is in memory at a time.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from llmc import checkpoint, json_file, tensors
from llmc import manifest as manifests
from llmc.checkpoint import SOURCE, Checkpoint
from llmc.converters import cast, families, hf_tokenizer, own, packed_import, pickled
from llmc.converters import source as sources
from llmc.converters.rules import Family, Progress, Tensors, from_canonical
from llmc.converters.source import Source
from llmc.errors import CheckpointError, UserError
from llmc.log import logger
from llmc.manifest import Manifest, Parent
from llmc.spec import ModelSpec
from llmc.tensors import Array, TensorInfo

CONFIG, GENERATION = "config.json", "generation_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def convert(
    source: Path,
    out: Path,
    *,
    dtype: str = "keep",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Checkpoint:
    """Make a canonical checkpoint of a Hugging Face folder, or of the model in a training run's folder.

    Args:
        dtype: "keep" leaves each tensor in the type that it has; else "float32", "float16" or "bfloat16" for all.

    Raises:
        UserError: `out` exists, or `dtype` is not a type.
        UnsupportedModelError: The architecture or a setting of it is not supported.
        CheckpointError: A file or tensor is missing, unknown, misshapen or damaged.
    """
    cast.target_dtype(dtype)
    return sources.write(open_source(source), out, dtype=dtype, overwrite=overwrite, progress=progress)


def open_source(source: Path) -> Source:
    """See such a folder as a model; no tensor is read, but for the head of one that is said to be tied.

    Raises:
        UserError: `source` is not such a folder.
        UnsupportedModelError: The architecture or a setting of it is not supported.
        CheckpointError: A file is missing or damaged.
    """
    folder, parent = _locate(source)
    config = json_file.read(folder / CONFIG)
    packing = packed_import.find(folder, config)
    config.pop(packed_import.CONFIG_KEY, None)
    family, spec = families.read_spec(config, folder / CONFIG)
    if "auto_map" in config:
        logger.warning(f"{folder / CONFIG}: 'auto_map' names code that came with the model: llmc does not run it")
    infos, has_pickles = _read_weights(folder)
    infos = _with_prefix(family, infos)
    found = Source(
        where=folder,
        family=family,
        spec=spec,
        tensors=functools.partial(cast.on_disk, infos),
        copy=functools.partial(copy_words, folder, config),
        parents=(parent,),
        packages=("torch",) if has_pickles else (),
        packed=(packing, infos) if packing else None,
    )
    return replace(found, spec=_untie_if_different(found, infos))


def copy_words(folder: Path, config: Mapping[str, Any], work: Path) -> None:
    """Copy the tokenizer and the configs of a Hugging Face folder into a checkpoint."""
    hf_tokenizer.copy(folder, work, config)
    (work / SOURCE).mkdir()
    # llmc's own config is no word of the authors'.
    for name in (GENERATION,) if config.get("model_type") == own.MODEL_TYPE else (CONFIG, GENERATION):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, work / SOURCE / name)
    if packed_import.CONFIG_KEY in json_file.read(folder / CONFIG, required=False):
        # It told of the tensors of that folder; of the checkpoint's, its recipe does.
        _write(work / SOURCE / CONFIG, config)


def _locate(source: Path) -> tuple[Path, Parent]:
    """The Hugging Face folder that `source` means, and how a child names its parent."""
    if not source.is_dir():
        raise UserError(f"{source} is not a folder: expected a Hugging Face model, a training run, or a .gguf file")
    folder = source
    if (source / manifests.NAME).is_file():
        manifest = manifests.read(source)
        if manifest.kind not in ("run", "export"):
            raise UserError(f"{source} is the output of {manifests.MADE_BY[manifest.kind]}, and needs no converting")
        manifests.verify(source, manifest)
        folder = source / "model" if manifest.kind == "run" else source
        return folder, manifests.parent(source)
    if not (folder / CONFIG).is_file():
        inside = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise UserError(f"{folder} has no {CONFIG}, so it is not a Hugging Face model (it holds {inside})")
    sha256 = manifests.sha256_of(folder / CONFIG)
    return folder, Parent(kind="hf", sha256=sha256, name=folder.resolve().name)


def has_weights(folder: Path) -> bool:
    """Whether a folder has a model's weights in one of Hugging Face's forms."""
    return any((folder / name).is_file() for name in (WEIGHTS, INDEX, pickled.SINGLE, pickled.INDEX))


def _read_weights(folder: Path) -> tuple[dict[str, TensorInfo], bool]:
    """All tensors, and whether they are in pickles; safetensors are preferred where a folder has both."""
    if (folder / WEIGHTS).is_file() or (folder / INDEX).is_file():
        return tensors.read_folder(folder), False
    if (folder / pickled.SINGLE).is_file() or (folder / pickled.INDEX).is_file():
        return pickled.read_folder(folder), True
    raise CheckpointError(f"{folder} has no weights: expected {WEIGHTS}, {INDEX}, {pickled.SINGLE} or {pickled.INDEX}")


def _with_prefix(family: Family, infos: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors of a model that was saved without its head, under the names that they have beside a head."""
    if any(name.startswith(family.prefix) for name in infos):
        return infos
    return {name if name.startswith("lm_head.") else family.prefix + name: info for name, info in infos.items()}


def _untie_if_different(source: Source, infos: Mapping[str, TensorInfo]) -> ModelSpec:
    """A model that says it is tied, and holds a head that is not the embedding, is not tied.

    transformers decides so as well (modeling_utils.py, tie_weights).
    """
    if not source.spec.tied or source.head not in infos:
        return source.spec
    head, embedding = infos[source.head], infos.get(source.embedding)
    if embedding is None or _are_equal(head, embedding):
        return source.spec
    logger.warning("the config says that head and embedding are tied, but they differ: kept apart")
    return source.spec.model_copy(update={"tied": False})


def _are_equal(left: TensorInfo, right: TensorInfo) -> bool:
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    pairs = zip(cast.blocks(left), cast.blocks(right), strict=True)
    return all(
        np.array_equal(tensors.read_tensor(a).view(np.uint8), tensors.read_tensor(b).view(np.uint8)) for a, b in pairs
    )


def open_checkpoint(folder: Path) -> Checkpoint:
    """A checkpoint that can be exported.

    Raises:
        ManifestError: `folder` is not a checkpoint.
        UserError: It is quantized.
    """
    found = Checkpoint(folder)
    if found.recipe is not None:
        names = ", ".join(parent.name for parent in found.manifest.parents) or "its parent"
        raise UserError(
            f"{folder} is quantized ({found.recipe.algorithm}), and the format has no place for that: export the "
            f"checkpoint that it was made from (llmc export {names} OUT), or choose --format gptq, awq, "
            "compressed-tensors or modelopt"
        )
    return found


def export(folder: Path, out: Path, *, overwrite: bool = False, progress: Progress | None = None) -> Manifest:
    """Write a checkpoint as its authors publish it, the tensors bit-equal to what it was converted from.

    The config is the authors' own where the checkpoint has it (source/config.json), else one written from the spec.

    Raises:
        ManifestError: `folder` is not a checkpoint.
        UserError: It is quantized, or `out` exists.
    """
    found = open_checkpoint(folder)
    family = families.by_name(found.spec.family)
    return write(found, family, found.spec, out, overwrite=overwrite, progress=progress)


def write(
    found: Checkpoint,
    family: Family,
    spec: ModelSpec,
    out: Path,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Write a checkpoint under a family's names.

    Args:
        family: The checkpoint's own, another that can say the same model, or llmc's own form.
        spec: The checkpoint's, with the name of that family.
    """
    theirs = from_canonical(family.rules, spec, Tensors(found.infos, found.__getitem__))
    load = theirs.watched("export", progress)
    values = ((name, load(name)) for name in theirs.infos)
    return write_folder(found, family, spec, out, theirs.infos, values, overwrite=overwrite)


def write_folder(
    found: Checkpoint,
    family: Family,
    spec: ModelSpec,
    out: Path,
    infos: Mapping[str, TensorInfo],
    values: Iterable[tuple[str, Array]],
    *,
    quantization: Mapping[str, Any] | None = None,
    files: Mapping[str, Mapping[str, Any]] | None = None,
    settings: Mapping[str, Any] | None = None,
    notes: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Write a folder of a checkpoint's config and tokenizer, and of any tensors.

    Args:
        infos, values: The tensors under the family's names, in order.
        quantization: What the config says of packed tensors.
        files: JSON files to stand beside the config.
        settings, notes: Of the manifest; notes may change until the last tensor is written.
    """
    with manifests.creating(out, overwrite=overwrite) as work:
        hashes = tensors.write_sharded(work, infos, values, max_bytes=checkpoint.SHARD_BYTES)
        checkpoint.copy_tokenizer(found.folder, work)
        _write_config(found, family, spec, work, quantization)
        for name, content in (files or {}).items():
            _write(work / name, content)
        made = Manifest(
            kind="export",
            tools=manifests.tools(),
            settings=dict(settings or {}),
            parents=(manifests.parent(found.folder),),
            notes=dict(notes or {}),
        )
        return manifests.seal(work, made, hashes)


def _write_config(
    found: Checkpoint, family: Family, spec: ModelSpec, work: Path, quantization: Mapping[str, Any] | None
) -> None:
    # The embedding may be packed; a norm never is.
    source, dtype = found.folder / SOURCE, str(found.infos["layers.0.attn_norm.weight"].dtype)
    if (source / GENERATION).is_file():
        shutil.copyfile(source / GENERATION, work / GENERATION)
    packed = {"quantization_config": quantization} if quantization else {}
    if not (source / CONFIG).is_file() or family != families.by_name(found.spec.family):
        config = families.write_config(family, spec) | {"dtype": dtype, "torch_dtype": dtype}
        generation = json_file.read(work / GENERATION) if (work / GENERATION).is_file() else {}
        # Written even when null: transformers has ids of its own for some families when they are absent.
        config |= {key: generation.get(key, config.get(key)) for key in hf_tokenizer.TOKEN_IDS}
        _write(work / CONFIG, config | packed)
    elif found.manifest.settings.get("dtype", "keep") == "keep" and not packed:
        shutil.copyfile(source / CONFIG, work / CONFIG)
    else:
        # The type was changed on purpose; transformers loads in the type that the config names.
        config = json_file.read(source / CONFIG)
        config |= {key: dtype for key in ("dtype", "torch_dtype") if key in config} or {"dtype": dtype}
        _write(work / CONFIG, config | packed)


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
