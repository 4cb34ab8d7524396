"""The layouts "int-quantized" and "float-quantized" of compressed-tensors: a scale for each row, rounded inputs.

    weight        int8 or float8_e4m3fn [out, in]    int8: signed codes
    weight_scale  float32 [out, 1], or [1]           a row, or the whole matrix
    input_scale   float32 [1]                        where all tokens share one

The source is the package's compressors/naive_quantized and quantization/lifecycle. Its own forward takes a token's
scale from its largest value over 127.5, vLLM's kernels over 127, as llmc does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llmc.converters.layouts import FLOAT32, Config, Files, Grid, Layout, Linear, Matrix, middle, only
from llmc.errors import UnsupportedModelError
from llmc.recipe import FP8, ActivationFormat
from llmc.tensors import Array, TensorInfo

_METHOD = "compressed-tensors"
_TYPES = {"int": "int", "int8": "int", "fp8": "float"}
NAMES = ("int-quantized", "float-quantized")


def plan(linear: Linear) -> dict[str, TensorInfo]:
    grid, rows = linear.grid, linear.out_features
    kind = FP8 if grid.kind == "fp8" else np.dtype(np.int8)
    found = {
        "weight": TensorInfo(kind, (rows, linear.in_features)),
        "weight_scale": TensorInfo(FLOAT32, (1,) if grid.per_tensor else (rows, 1)),
    }
    if grid.inputs and not grid.inputs.dynamic:
        found["input_scale"] = TensorInfo(FLOAT32, (1,))
    return found


def pack(matrix: Matrix, linear: Linear) -> dict[str, Array]:
    # Offset codes with their highest bit turned over are the same numbers in two's complement.
    codes = matrix.codes.view(FP8) if linear.grid.kind == "fp8" else (matrix.codes ^ np.uint8(128)).view(np.int8)
    scale = matrix.scale.reshape(1) if linear.grid.per_tensor else matrix.scale
    found = {"weight": codes, "weight_scale": scale}
    return found if matrix.input_scale is None else found | {"input_scale": matrix.input_scale}


def unpack(parts: Mapping[str, Array], linear: Linear) -> Matrix:
    codes = np.ascontiguousarray(parts["weight"]).view(np.uint8)
    codes = codes if linear.grid.kind == "fp8" else codes ^ np.uint8(128)
    scale = parts["weight_scale"].astype(np.float32).reshape(-1, 1)
    inputs = parts.get("input_scale")
    return Matrix(codes, scale, middle(linear), None if inputs is None else inputs.astype(np.float32).reshape(1))


def lacks(linear: Linear) -> str | None:
    if linear.turned:
        return "linears that are kept as [in, out] (Conv1D)"
    if linear.grid.bits != 8 or not linear.grid.symmetric or linear.groups > 1:
        return "rounded inputs of weights in groups"
    return None


def write(linears: Mapping[str, Linear], kept: Sequence[str], outside: Sequence[str]) -> tuple[Config, Files]:
    grid = next(iter(linears.values())).grid
    name = f"{_TYPES[grid.kind]}-quantized"
    group = {"targets": ["Linear"], "weights": _weights(grid), "input_activations": _inputs(grid), "format": name}
    config: Config = {
        "quant_method": _METHOD,
        "format": name,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": [*kept, *outside],
    }
    return config, {}


def _weights(grid: Grid) -> dict[str, Any]:
    strategy = "tensor" if grid.per_tensor else "channel"
    return {"num_bits": 8, "type": _TYPES[grid.kind], "symmetric": True, "strategy": strategy, "dynamic": False}


def _inputs(grid: Grid) -> dict[str, Any] | None:
    if grid.inputs is None:
        return None
    dynamic = grid.inputs.dynamic
    strategy = "token" if dynamic else "tensor"
    kind = _TYPES[grid.inputs.kind]
    return {"num_bits": 8, "type": kind, "symmetric": True, "strategy": strategy, "dynamic": dynamic}


LAYOUT = Layout("compressed-tensors-8", plan, pack, unpack, lacks, write, scale="weight_scale", holds="rounded")


def grid(group: Mapping[str, Any], where: str) -> Grid:
    """What a group of `config_groups` says.

    Raises:
        UnsupportedModelError: Something that this layout, or a recipe, has no place for.
    """
    weights, inputs = group.get("weights") or {}, group.get("input_activations")
    for said, place in ((weights, f"{where}.weights"), *([(inputs, f"{where}.input_activations")] if inputs else [])):
        only(said, "num_bits", 8, None, place)
        only(said, "symmetric", True, True, place)
        only(said, "type", weights.get("type"), "int", place)
    kind = _one_of(weights, "type", ("int", "float"), f"{where}.weights")
    strategy = _one_of(weights, "strategy", ("channel", "tensor"), f"{where}.weights")
    form = None
    if inputs:
        dynamic = bool(inputs.get("dynamic"))
        only(inputs, "strategy", "token" if dynamic else "tensor", None, f"{where}.input_activations")
        form = ActivationFormat(kind="int8" if kind == "int" else "fp8", dynamic=dynamic)
    return Grid(8, None, kind="int" if kind == "int" else "fp8", per_tensor=strategy == "tensor", inputs=form)


def _one_of(config: Mapping[str, Any], key: str, values: Sequence[str], where: str) -> str:
    if (met := config.get(key)) not in values:
        raise UnsupportedModelError(f"{where}: '{key}' is {met!r}: llmc reads {' and '.join(values)}")
    return str(met)
