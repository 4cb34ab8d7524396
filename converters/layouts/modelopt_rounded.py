"""Model Optimizer's formats of 8 bits with rounded inputs: float8, and int8 of SmoothQuant.

    FP8                        weight  float8_e4m3fn [out, in]   weight_scale  float32 []      input_scale  float32 []
    FP8_PER_CHANNEL_PER_TOKEN  weight  float8_e4m3fn [out, in]   weight_scale  float32 [out]
    W8A8_SQ_PER_CHANNEL        weight  int8 [out, in]            weight_scale  float32 [out]   input_scale  float32 []
                               pre_quant_scale  float32 [in]     where an input is multiplied before it is rounded

SmoothQuant's own export has pre_quant_scale everywhere; here most are in the norm or linear before, and those are left
out. The source is modelopt 0.47's torch/export/quant_utils.py and convert_hf_config.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from llmc.converters.layouts import FLOAT32, Grid, Linear, Matrix, compressed_rounded
from llmc.recipe import ActivationFormat
from llmc.tensors import Array, TensorInfo

GRIDS = {
    "FP8": Grid(8, None, kind="fp8", per_tensor=True, inputs=ActivationFormat(kind="fp8", dynamic=False)),
    "FP8_PER_CHANNEL_PER_TOKEN": Grid(8, None, kind="fp8", inputs=ActivationFormat(kind="fp8")),
    "W8A8_SQ_PER_CHANNEL": Grid(8, None, inputs=ActivationFormat(dynamic=False)),
}
# modelopt's own config.json names the groups of this one alone.
GROUPS: dict[str, dict[str, Any]] = {
    "FP8": {
        "input_activations": {"dynamic": False, "num_bits": 8, "type": "float"},
        "weights": {"dynamic": False, "num_bits": 8, "type": "float"},
        "targets": ["Linear"],
    }
}
MULTIPLY = "pre_quant_scale"


def plan(linear: Linear) -> dict[str, TensorInfo]:
    found = compressed_rounded.plan(linear)
    shapes = {"weight_scale": () if linear.grid.per_tensor else (linear.out_features,), "input_scale": ()}
    found |= {suffix: TensorInfo(FLOAT32, shape) for suffix, shape in shapes.items() if suffix in found}
    return found | ({MULTIPLY: TensorInfo(FLOAT32, (linear.in_features,))} if linear.multiplied else {})


def pack(matrix: Matrix, linear: Linear) -> dict[str, Array]:
    found = compressed_rounded.pack(matrix, linear)
    if matrix.input_multiply is not None:
        found[MULTIPLY] = matrix.input_multiply
    return {suffix: found[suffix].reshape(info.shape) for suffix, info in plan(linear).items()}


def unpack(parts: Mapping[str, Array], linear: Linear) -> Matrix:
    found = compressed_rounded.unpack(parts, linear)
    multiply = parts[MULTIPLY].astype(np.float32) if MULTIPLY in parts else None
    return Matrix(found.codes, found.scale, found.zero, found.input_scale, multiply)


def algorithm(grid: Grid) -> str | None:
    """What modelopt calls a grid, None when it has no name for it."""
    return next((name for name, of in GRIDS.items() if of == grid), None)


def lacks(linear: Linear) -> str | None:
    if algorithm(linear.grid):
        return None
    return "rounded inputs but for static int8, and float8 with one scale each or with those of rows and tokens"
