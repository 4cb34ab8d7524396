"""A checkpoint as one GGUF file, which llama.cpp loads: `llmc export --format gguf`.

    OUT/model.gguf      settings, tokenizer, chat template, tensors
    OUT/manifest.json   kind "export"

Matrices are written in the type that is asked for; vectors, learned positions and the routers of experts stay float32,
as llama.cpp has them. Rows that are not whole blocks of a quantized type become float16, as llama.cpp's converter has
it. One tensor of the checkpoint is in memory at a time: the experts of a layer, one tensor in GGUF, are written one
after the other.

Knows: how such a file is written, with the gguf package. Does not know: names (gguf_names.py), keys
(gguf_settings.py), the tokenizer (gguf_vocabulary.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmc import manifest as manifests
from llmc.checkpoint import Checkpoint
from llmc.converters import cast, gguf_names, gguf_settings, gguf_vocabulary
from llmc.converters.rules import Progress, Tensors, from_canonical
from llmc.errors import UserError
from llmc.log import logger
from llmc.manifest import Manifest
from llmc.need import need
from llmc.spec import ModelSpec
from llmc.tensors import Array, TensorInfo

FILE = "model.gguf"
# Name -> ggml's name of the type, and `general.file_type` (llama.cpp, llama.h, llama_ftype).
TYPES = {"f32": ("F32", 0), "f16": ("F16", 1), "bf16": ("BF16", 32), "q8_0": ("Q8_0", 7), "q4_0": ("Q4_0", 2)}
_KEPT = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
_PLAIN = {"F32": cast.FLOATS["float32"], "F16": cast.FLOATS["float16"], "BF16": cast.FLOATS["bfloat16"]}
_SHORTEST = 1e-12  # what torch's normalize divides by at least
# Matrices that llama.cpp wants in float32.
_FULL = ("ffn_gate_inp.weight", gguf_names.VECTOR, "position_embd.weight")


@dataclass(frozen=True, slots=True)
class _Planned:
    """A tensor of the file: its shape, its ggml type, and what it is made of, in order."""

    shape: tuple[int, ...]
    kind: str
    parts: tuple[str, ...]


def export(
    folder: Path, out: Path, *, kind: str | None = None, overwrite: bool = False, progress: Progress | None = None
) -> Manifest:
    """Write a checkpoint as a folder with a GGUF file.

    Args:
        kind: Of number, for the matrices: "f32", "f16", "bf16", "q8_0" or "q4_0"; None keeps the checkpoint's.

    Raises:
        ManifestError: `folder` is not a checkpoint.
        UserError: It is quantized, `kind` is not one, or `out` exists.
        UnsupportedModelError: GGUF has no place for something that the spec or the tokenizer says.
        CheckpointError: A value does not fit the type, or there is no tokenizer.
        MissingDependencyError: The gguf package is not installed.
    """
    found = Checkpoint(folder)
    if found.recipe is not None:
        raise UserError(
            f"{folder} is quantized ({found.recipe.algorithm}): export the checkpoint that it was made from, "
            "with --type q8_0 or q4_0"
        )
    kind = _KEPT[str(found.infos["embed.weight"].dtype)] if kind is None else kind
    if kind not in TYPES:
        raise UserError(f"the type is {kind!r}; choose one of {', '.join(TYPES)}", param="type")
    manifests.check_target(out, overwrite=overwrite)
    metadata = gguf_settings.write(found.spec)
    rules = gguf_names.rules(metadata["general.architecture"])
    theirs = from_canonical(rules, found.spec, Tensors(found.infos, found.__getitem__))
    theirs = _as_computed(theirs, found.spec)
    theirs = _with_factors(theirs, gguf_settings.rope_factors(found.spec))
    gguf_settings.check_written(found.spec, metadata, theirs)
    _tell(found)
    metadata |= {"general.name": folder.resolve().name, "general.file_type": TYPES[kind][1]}
    metadata |= {"general.quantization_version": 2, **gguf_vocabulary.write(folder, found.spec.vocab_size)}
    with manifests.creating(out, overwrite=overwrite) as work:
        _write(work / FILE, metadata, theirs, TYPES[kind][0], progress)
        parents = (manifests.parent(folder),)
        tools, settings = manifests.tools("gguf"), {"format": "gguf", "type": kind}
        return manifests.seal(work, Manifest(kind="export", tools=tools, settings=settings, parents=parents))


def _tell(found: Checkpoint) -> None:
    if found.spec.attention.window and not found.spec.attention.full_layers:
        logger.warning(
            "%s has a sliding window of %d tokens, which llama.cpp does not apply to this architecture: beyond it its "
            "answers are another model's",
            found.folder, found.spec.attention.window,
        )  # fmt: skip


def _as_computed(theirs: Tensors, spec: ModelSpec) -> Tensors:
    """What llama.cpp wants done beforehand, because it does not do it itself.

    The rows of a normalised head are divided by their lengths; read back and divided again they are what they are
    here, to the last bit or two. A norm that adds one to its weight has it added, in float32.
    """

    def load(name: str) -> Array:
        values = theirs.load(name)
        if spec.norm.plus_one and gguf_names.is_norm(name):
            return values.astype(np.float32) + np.float32(1)
        if not spec.normalised_head or name != gguf_names.HEAD:
            return values
        lengths = np.sqrt(np.einsum("ij,ij->i", values, values, dtype=np.float32))
        divided: Array = values / np.maximum(lengths, _SHORTEST)[:, None]
        return divided.astype(values.dtype)

    return Tensors(theirs.infos, load)


def _with_factors(theirs: Tensors, factors: Array | None) -> Tensors:
    if factors is None:
        return theirs
    name = gguf_names.ROPE_FACTORS
    infos = {name: TensorInfo(factors.dtype, factors.shape), **theirs.infos}
    return Tensors(infos, lambda wanted: factors if wanted == name else theirs.load(wanted))


def _plan(infos: Mapping[str, TensorInfo], kind: str) -> dict[str, _Planned]:
    """The tensors of the file; the experts of a layer are one."""
    parts: dict[str, list[str]] = {}
    for name in infos:
        parts.setdefault(gguf_names.stack_name(name) or name, []).append(name)
    planned = {}
    for name, inside in parts.items():
        shape = infos[inside[0]].shape
        own = kind if len(shape) > 1 and not name.endswith(_FULL) else "F32"
        if own not in _PLAIN and shape[-1] % _block(own)[0]:
            logger.warning("'%s' has rows of %d, which are not whole blocks of %s: F16 instead", name, shape[-1], own)
            own = "F16"
        stacked = () if gguf_names.stack_name(inside[0]) is None else (len(inside),)
        planned[name] = _Planned((*stacked, *shape), own, tuple(inside))
    return planned


def _block(kind: str) -> tuple[int, int]:
    """Numbers in a block of a type, and its bytes."""
    constants = need("gguf.constants")
    block, size = constants.GGML_QUANT_SIZES[constants.GGMLQuantizationType[kind]]
    return int(block), int(size)


def _write(path: Path, metadata: Mapping[str, Any], theirs: Tensors, kind: str, progress: Progress | None) -> None:
    gguf = need("gguf")
    writer = gguf.GGUFWriter(path, metadata["general.architecture"])
    for key, value in metadata.items():
        if key != "general.architecture":
            _add(writer, key, value)
    planned = _plan(theirs.infos, kind)
    for name, tensor in planned.items():
        block, size = _block(tensor.kind)
        number = gguf.GGMLQuantizationType[tensor.kind]
        size = math.prod(tensor.shape) // block * size
        # The type is given, so the package takes the shape as it is.
        writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), size, raw_dtype=number)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        (file,) = writer.fout
        writer.write_padding(file, file.tell())
        load = theirs.watched("export", progress)
        for tensor in planned.values():
            began = file.tell()
            for part in tensor.parts:
                for rows in _encoded(part, load(part), tensor.kind):
                    file.write(rows.data)
            writer.write_padding(file, file.tell() - began)
    finally:
        writer.close()


def _encoded(name: str, values: Array, kind: str) -> Iterator[Array]:
    """A tensor's bytes in a type, a block of rows at a time."""
    gguf = need("gguf")
    rows = values.reshape(-1, values.shape[-1])
    step = max(1, cast.BLOCK_BYTES // (4 * rows.shape[1]))
    for first in range(0, len(rows), step):
        block = rows[first : first + step]
        if kind in _PLAIN:
            plain = cast.assemble(name, np.empty(block.shape, _PLAIN[kind]), [block])
            yield plain.reshape(-1).view(np.uint8)
        else:
            yield gguf.quants.quantize(block.astype(np.float32), gguf.GGMLQuantizationType[kind]).reshape(-1)


def _add(writer: Any, key: str, value: Any) -> None:
    """An entry of the metadata; a bool is an int to Python, but not to GGUF."""
    adders = {bool: "add_bool", int: "add_uint32", float: "add_float32", str: "add_string", list: "add_array"}
    getattr(writer, adders[type(value)])(key, value)
