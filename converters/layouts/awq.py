"""AutoAWQ's layout "gemm", which transformers, vLLM and others load.

    qweight  int32   [in, out / 8]        outputs 0 2 4 6 1 3 5 7 of each eight in a word, the first lowest
    qzeros   int32   [groups, out / 8]    likewise
    scales   float16 [groups, out]

4 bits alone, one size of group in a model, and always with zero points: symmetric ones are written out. The source is
AutoAWQ's awq/modules/linear/gemm.py (from_linear) and awq/utils/packing_utils.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from llmc.converters import packed_export
from llmc.converters.layouts import (
    FLOAT16,
    INT32,
    Config,
    Files,
    Grid,
    Layout,
    Linear,
    Matrix,
    from_words,
    group_of,
    only,
    to_words,
)
from llmc.quant.pack import Bytes
from llmc.tensors import Array, TensorInfo

_BITS, _WORD = 4, 8
_ORDER = np.array([0, 2, 4, 6, 1, 3, 5, 7])
_INVERSE = np.argsort(_ORDER)


def plan(linear: Linear) -> dict[str, TensorInfo]:
    rows, columns, groups = linear.in_features, linear.out_features, linear.groups
    return {
        "qweight": TensorInfo(INT32, (rows, columns // _WORD)),
        "qzeros": TensorInfo(INT32, (groups, columns // _WORD)),
        "scales": TensorInfo(FLOAT16, (groups, columns)),
    }


def _words(codes: Bytes) -> Array:
    """[out, rows] -> int32 [rows, out / 8]"""
    eights = codes.T.reshape(codes.shape[1], -1, _WORD)[:, :, _ORDER]
    return to_words(eights.reshape(codes.shape[1], -1), _BITS)


def _codes(words: Array, out_features: int) -> Bytes:
    """The inverse of `_words`."""
    eights = from_words(words, _BITS, out_features).reshape(len(words), -1, _WORD)[:, :, _INVERSE]
    return np.ascontiguousarray(eights.reshape(len(words), -1).T)


def pack(matrix: Matrix, _linear: Linear) -> dict[str, Array]:
    return {
        "qweight": _words(matrix.codes),
        "qzeros": _words(matrix.zero),
        "scales": matrix.scale.T.astype(FLOAT16),
    }


def _zeros(words: Array, linear: Linear) -> Bytes:
    return _codes(words, linear.out_features)


def unpack(parts: Mapping[str, Array], linear: Linear) -> Matrix:
    codes = _codes(parts["qweight"], linear.out_features)
    return Matrix(codes, parts["scales"].T.astype(np.float32), _zeros(parts["qzeros"], linear))


def lacks(linear: Linear) -> str | None:
    if linear.turned:
        return "linears that are kept as [in, out] (Conv1D)"
    if linear.grid.bits != _BITS:
        return f"{linear.grid.bits} bits"
    if linear.in_features % (linear.grid.group_size or 1):
        return "groups that do not divide the inputs"
    return f"outputs that are no multiple of {_WORD}" if linear.out_features % _WORD else None


def write(linears: Mapping[str, Linear], kept: Sequence[str], outside: Sequence[str]) -> tuple[Config, Files]:
    grid = next(iter(linears.values())).grid
    config: Config = {
        "quant_method": "awq",
        "version": "gemm",
        "bits": grid.bits,
        "group_size": grid.group_size,
        "zero_point": True,
        "modules_to_not_convert": [*kept, *outside],
    }
    return config, {}


LAYOUT = Layout("awq", plan, pack, unpack, lacks, write, scale="scales", zeros=("qzeros", _zeros))


def read(config: Mapping[str, Any], where: object) -> tuple[Layout, Callable[[str], Grid]]:
    """See llmc/converters/packed_import.py.

    Raises:
        UnsupportedModelError: The config says something that this layout has no place for.
    """
    # AutoAWQ's own files say w_bit and q_group_size.
    named = {"bits": config.get("w_bit"), "group_size": config.get("q_group_size")} | dict(config)
    only(named, "bits", _BITS, _BITS, where)
    only({"version": str(named.get("version", "gemm")).lower()}, "version", "gemm", "gemm", where)
    grid = Grid(_BITS, group_of(named, where))
    return LAYOUT, lambda _module: grid


LAYOUTS = (LAYOUT,)
export = functools.partial(packed_export.export, LAYOUTS)
