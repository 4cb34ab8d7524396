"""NVIDIA Model Optimizer's unified Hugging Face checkpoint, which TensorRT-LLM and vLLM load.

    W4A16_AWQ  weight  uint8 [out / 2, in]   signed codes; byte r: output 2r low, output 2r + 1 high
               weight_scale  float32 [out, groups]
    W8A16      weight  int8 [out, in]
               weight_scale  float32 [out]   one group a row

One format in a model, symmetric alone; those that round inputs as well are in modelopt_rounded.py, block floating point
in modelopt_blocks.py. The source is modelopt 0.47's torch/export/quant_utils.py (pack_int4_in_uint8,
to_quantized_weight) and convert_hf_config.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from llmc.converters import packed_export
from llmc.converters.layouts import (
    FLOAT32,
    Config,
    Files,
    Grid,
    Layout,
    Linear,
    Matrix,
    group_of,
    middle,
    modelopt_blocks,
    modelopt_rounded,
    only,
)
from llmc.errors import UnsupportedModelError
from llmc.tensors import Array, TensorInfo

_ALGORITHMS = {"W4A16_AWQ": 4, "W8A16": 8}
_NAMED = modelopt_rounded.GRIDS | modelopt_blocks.GRIDS
FILE = "hf_quant_config.json"


def plan(linear: Linear) -> dict[str, TensorInfo]:
    rows, columns = linear.out_features, linear.in_features
    if linear.grid.bits == 8:
        return {"weight": TensorInfo(np.dtype(np.int8), (rows, columns)), "weight_scale": TensorInfo(FLOAT32, (rows,))}
    return {
        "weight": TensorInfo(np.dtype(np.uint8), (rows // 2, columns)),
        "weight_scale": TensorInfo(FLOAT32, (rows, linear.groups)),
    }


def pack(matrix: Matrix, linear: Linear) -> dict[str, Array]:
    # Offset codes with their highest bit turned over are the same numbers in two's complement.
    codes = matrix.codes ^ np.uint8(1 << (linear.grid.bits - 1))
    if linear.grid.bits == 8:
        return {"weight": codes.view(np.int8), "weight_scale": matrix.scale[:, 0]}
    return {"weight": codes[0::2] | codes[1::2] << np.uint8(4), "weight_scale": matrix.scale}


def unpack(parts: Mapping[str, Array], linear: Linear) -> Matrix:
    stored = np.ascontiguousarray(parts["weight"]).view(np.uint8)
    if linear.grid.bits == 4:
        stored = np.stack((stored & np.uint8(15), stored >> np.uint8(4)), axis=1).reshape(-1, linear.in_features)
    scale = parts["weight_scale"].astype(np.float32).reshape(linear.out_features, linear.groups)
    return Matrix(stored ^ np.uint8(1 << (linear.grid.bits - 1)), scale, middle(linear))


def lacks(linear: Linear) -> str | None:
    if not linear.grid.symmetric:
        return "zero points"
    if linear.grid.bits == 8:
        return "several groups in a row of 8 bits" if linear.groups > 1 else None
    if linear.in_features % (linear.grid.group_size or 1):
        return "groups that do not divide the inputs"
    return "an odd number of outputs" if linear.out_features % 2 else None


def write(linears: Mapping[str, Linear], kept: Sequence[str], outside: Sequence[str]) -> tuple[Config, Files]:
    grid = next(iter(linears.values())).grid
    # Loaders know the layout by this name, and the version says which one it is.
    producer = {"name": "modelopt", "version": "0.47.0"}
    named = next((name for name, known in _NAMED.items() if known == grid), None)
    algorithm = named or next(name for name, bits in _ALGORITHMS.items() if bits == grid.bits)
    quantization: Config = {"quant_algo": algorithm, "kv_cache_quant_algo": None}
    if algorithm in modelopt_blocks.GRIDS:
        quantization |= modelopt_blocks.sizes(algorithm)
    elif grid.bits == 4:
        quantization |= {"group_size": grid.group_size, "has_zero_point": False, "pre_quant_scale": False}
    quantization["exclude_modules"] = sorted([*kept, *outside])
    groups = (modelopt_rounded.GROUPS | modelopt_blocks.GROUPS).get(algorithm)
    # modelopt's own config.json has of most of these formats no more than this.
    config: Config = {
        **({"config_groups": {"group_0": groups}} if groups else {}),
        "ignore": quantization["exclude_modules"],
        "quant_algo": quantization["quant_algo"],
        "producer": producer,
        "quant_method": "modelopt",
    }
    return config, {FILE: {"producer": producer, "quantization": quantization}}


LAYOUT = Layout("modelopt", plan, pack, unpack, lacks, write, scale="weight_scale")
ROUNDED = Layout(
    "modelopt-8", modelopt_rounded.plan, modelopt_rounded.pack, modelopt_rounded.unpack, modelopt_rounded.lacks, write,
    scale="weight_scale", holds="rounded", multiply=modelopt_rounded.MULTIPLY,
)  # fmt: skip
IN_BLOCKS = Layout(
    "modelopt-blocks", modelopt_blocks.plan, modelopt_blocks.pack, modelopt_blocks.unpack, modelopt_blocks.lacks, write,
    scale="weight_scale", holds="blocks",
)  # fmt: skip


def read(config: Mapping[str, Any], where: object) -> tuple[Layout, Callable[[str], Grid]]:
    """See llmc/converters/packed_import.py; `config` is what FILE says.

    Raises:
        UnsupportedModelError: The config says something that this layout has no place for.
    """
    algorithm = config.get("quant_algo")
    only(config, "kv_cache_quant_algo", None, None, where)
    if algorithm in _NAMED:
        named = _NAMED[algorithm]
        if named.sort == "blocks":
            only(config, "group_size", named.group_size, named.group_size, where)
        return IN_BLOCKS if named.sort == "blocks" else ROUNDED, lambda _module: named
    if algorithm not in _ALGORITHMS:
        known = ", ".join((*_ALGORITHMS, *_NAMED))
        raise UnsupportedModelError(f"{where}: 'quant_algo' is {algorithm!r}: of modelopt's llmc reads {known}")
    bits = _ALGORITHMS[algorithm]
    grid = Grid(bits, group_of(config, where) if bits == 4 else None)
    return LAYOUT, lambda _module: grid


LAYOUTS = (LAYOUT, ROUNDED, IN_BLOCKS)
export = functools.partial(packed_export.export, LAYOUTS)
