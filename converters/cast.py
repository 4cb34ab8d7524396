"""Tensors of a source read in another floating-point type, a block of rows at a time.

So that no more than the result and one block are in memory, whatever the two types are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal, get_args

import ml_dtypes
import numpy as np

from llmc.converters.rules import Tensors
from llmc.errors import CheckpointError, UserError
from llmc.tensors import Array, TensorInfo, read_tensor

DType = Literal["keep", "float32", "float16", "bfloat16"]

FLOATS: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
BLOCK_BYTES = 32 << 20


def target_dtype(dtype: str) -> np.dtype[Any] | None:
    """The type behind a name of `DType`; None keeps each tensor's own.

    Raises:
        UserError: There is no such name.
    """
    if dtype not in get_args(DType):
        raise UserError(f"dtype is {dtype!r}; choose one of {', '.join(get_args(DType))}", param="dtype")
    return FLOATS.get(dtype)


def on_disk(infos: Mapping[str, TensorInfo], dtype: np.dtype[Any] | None) -> Tensors:
    """Tensors that lie in files, as `dtype` (None: as they are).

    Raises:
        CheckpointError: One is neither float32, float16 nor bfloat16 (float64 may only be cast); at once. On loading:
            a value does not fit the new type.
    """
    for name, info in infos.items():
        if info.dtype not in FLOATS.values() and not (dtype is not None and info.dtype == np.float64):
            raise CheckpointError(
                f"{info.path}: '{name}' is {info.dtype}, and llmc converts float32, float16 and bfloat16 "
                "(float64 with --dtype): it looks quantized, and no quantization_config says how"
            )

    def load(name: str) -> Array:
        info = infos[name]
        if dtype is None or dtype == info.dtype:
            return read_tensor(info)
        return assemble(name, np.empty(info.shape, dtype), map(read_tensor, blocks(info)))

    found = {name: info if dtype is None else TensorInfo(dtype, info.shape) for name, info in infos.items()}
    return Tensors(found, load)


def blocks(info: TensorInfo) -> Iterator[TensorInfo]:
    """Consecutive rows of a tensor in a file, as tensors of at most about BLOCK_BYTES."""
    rows, row_bytes = _rows(info.shape), max(1, info.nbytes // max(1, _rows(info.shape)))
    step = max(1, BLOCK_BYTES // row_bytes)
    for first in range(0, rows, step):
        shape = (min(step, rows - first), *info.shape[1:])
        yield replace(info, shape=shape, offset=info.offset + first * row_bytes)


def _rows(shape: tuple[int, ...]) -> int:
    return shape[0] if shape else 1


def assemble(name: str, into: Array, parts: Iterable[Array]) -> Array:
    """Fill a tensor with blocks of its rows, cast on the way; returns it.

    Args:
        name: For errors.
        into: Its memory; a part may be a view of the rows that it fills.

    Raises:
        CheckpointError: A finite value is beyond the range of the tensor's type.
    """
    values = into.reshape(_rows(into.shape), math.prod(into.shape[1:]))
    done = 0
    for block in parts if values.size else ():
        flat = block.reshape(-1, values.shape[1])
        with np.errstate(over="ignore"):
            values[done : done + len(flat)] = flat
        if (np.isinf(values[done : done + len(flat)]) & np.isfinite(flat)).any():
            raise CheckpointError(f"'{name}' has values that {into.dtype} cannot hold: convert with --dtype bfloat16")
        done += len(flat)
    return into
