"""The tensors of a GGUF file as floating-point numbers, a block of rows at a time.

ggml's quantized types are dequantized by the gguf package.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from llmc.converters import cast, gguf_names
from llmc.converters.gguf_file import GgufFile, StoredTensor
from llmc.converters.rules import Tensors
from llmc.errors import CheckpointError, UnsupportedModelError
from llmc.need import need
from llmc.tensors import Array, TensorInfo

# What needs no dequantizing, and the beginnings of the names of all types that do.
_PLAIN = {"F32": cast.FLOATS["float32"], "F16": cast.FLOATS["float16"], "BF16": cast.FLOATS["bfloat16"]}
_QUANTIZED = ("Q", "IQ", "TQ", "MXFP4", "NVFP4")


@dataclass(frozen=True, slots=True)
class _Type:
    """A type of ggml.

    Attributes:
        block: Numbers that are stored together, in `block_bytes`.
        dtype: numpy's type of a plain one, None for a quantized one.
    """

    name: str
    block: int
    block_bytes: int
    dtype: np.dtype[Any] | None

    def row_bytes(self, columns: int) -> int:
        return columns // self.block * self.block_bytes


def unstacked(file: GgufFile) -> GgufFile:
    """The file with each stack of experts as its experts, and vectors without the ones that some files have before.

    Blocks of numbers lie within rows, so an expert's bytes are those of a tensor of its own.
    """
    types = _types()
    found: dict[str, StoredTensor] = {}
    for name, tensor in file.tensors.items():
        if gguf_names.expert_name(name, 0) is None or len(tensor.shape) != 3:
            is_row = len(tensor.shape) == 2 and tensor.shape[0] == 1 and name.endswith(gguf_names.VECTOR)
            found[name] = replace(tensor, shape=tensor.shape[1:]) if is_row else tensor
            continue
        kind, shape = _check(file, tensor, types), tensor.shape[1:]
        for expert in range(tensor.shape[0]):
            own = str(gguf_names.expert_name(name, expert))
            offset = tensor.offset + expert * shape[0] * kind.row_bytes(shape[1])
            found[own] = StoredTensor(own, shape, tensor.kind, offset)
    return replace(file, tensors=found)


def open_tensors(file: GgufFile, target: np.dtype[Any] | None) -> Tensors:
    """All tensors, nothing read yet.

    Args:
        target: The type of all of them; None gives float32 for quantized ones and leaves the rest.

    Raises:
        UnsupportedModelError: One is of a type that is not a number or not known to the gguf package.
        CheckpointError: One does not lie within the file, in whole blocks.
    """
    types = _types()
    infos = {}
    for name, tensor in file.tensors.items():
        own = _check(file, tensor, types).dtype
        kept = cast.FLOATS["float32"] if own is None else own
        infos[name] = TensorInfo(kept if target is None else target, tensor.shape)

    def load(name: str) -> Array:
        tensor = file.tensors[name]
        into = np.empty(tensor.shape, infos[name].dtype)
        return cast.assemble(name, into, _blocks(file.path, tensor, types[tensor.kind]))

    return Tensors(infos, load)


def _types() -> dict[int, _Type]:
    constants = need("gguf.constants")
    return {
        int(kind): _Type(kind.name, block, block_bytes, _PLAIN.get(kind.name))
        for kind, (block, block_bytes) in constants.GGML_QUANT_SIZES.items()
        if kind.name in _PLAIN or kind.name.startswith(_QUANTIZED)
    }


def _check(file: GgufFile, tensor: StoredTensor, types: dict[int, _Type]) -> _Type:
    if tensor.kind not in types:
        known = ", ".join(kind.name for kind in types.values())
        raise UnsupportedModelError(f"{file.path}: '{tensor.name}' is of ggml's type {tensor.kind}; llmc reads {known}")
    kind = types[tensor.kind]
    if not tensor.shape or tensor.shape[-1] % kind.block:
        raise CheckpointError(
            f"{file.path}: the rows of '{tensor.name}' {list(tensor.shape)} are not whole blocks of {kind.name}"
        )
    if tensor.offset + math.prod(tensor.shape[:-1]) * kind.row_bytes(tensor.shape[-1]) > file.size:
        raise CheckpointError(f"{file.path} is cut short: '{tensor.name}' ends past the file's {file.size} bytes")
    return kind


def _blocks(path: Path, tensor: StoredTensor, kind: _Type) -> Iterator[Array]:
    """Consecutive rows: plain ones as they are, quantized ones in float32."""
    quants = need("gguf.quants")
    columns = tensor.shape[-1]
    rows, row_bytes = math.prod(tensor.shape[:-1]), kind.row_bytes(columns)
    step = max(1, cast.BLOCK_BYTES // (4 * columns))
    with path.open("rb") as file:
        file.seek(tensor.offset)
        for first in range(0, rows, step):
            count = min(step, rows - first)
            raw = np.fromfile(file, np.uint8, count * row_bytes).reshape(count, row_bytes)
            if kind.dtype is not None:
                yield raw.view(kind.dtype)
                continue
            try:
                yield quants.dequantize(raw, tensor.kind)
            except NotImplementedError as error:
                raise UnsupportedModelError(f"{path}: '{tensor.name}' ({kind.name}): {error}") from None
