"""Model Optimizer's block floating point formats, of weights alone.

    W4A16_NVFP4  weight  uint8 [out, in / 2]         weight_scale  float8_e4m3fn [out, in / 16]
                 weight_scale_2  float32 []          the matrix's scale
    mxfp4        weight  uint8 [out, in / 2]         weight_scale  uint8 [out, in / 32]   exponents + 127
    MXFP8        weight  float8_e4m3fn [out, in]     weight_scale  uint8 [out, in / 32]   exponents + 127

Of two codes in a byte the first is the low half. modelopt calls MXFP8 both what rounds inputs and what does not, and
has for MXFP4 no name but its own inner one. The source is modelopt 0.47's torch/export/quant_utils.py
(to_quantized_weight, process_layer_quant_config) and convert_hf_config.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from llmc.converters.layouts import FLOAT32, Grid, Linear, Matrix, middle
from llmc.quant.pack import pack_codes, unpack_codes
from llmc.recipe import BLOCKS, E8M0, FP8
from llmc.tensors import Array, TensorInfo

GRIDS = {
    "W4A16_NVFP4": Grid(4, 16, kind="nvfp4"),
    "mxfp4": Grid(4, 32, kind="mxfp4"),
    "MXFP8": Grid(8, 32, kind="mxfp8"),
}
# modelopt's own config.json names the groups of this one alone.
GROUPS: dict[str, dict[str, Any]] = {
    "W4A16_NVFP4": {
        "weights": {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16},
        "targets": ["Linear"],
    }
}


def plan(linear: Linear) -> dict[str, TensorInfo]:
    blocks, rows = BLOCKS[linear.grid.kind], linear.out_features
    codes = FP8 if blocks.codes == FP8 else np.dtype(np.uint8)
    scales = np.dtype(np.uint8) if blocks.scales == E8M0 else blocks.scales
    found = {
        "weight": TensorInfo(codes, (rows, linear.in_features * blocks.bits // 8)),
        "weight_scale": TensorInfo(scales, (rows, linear.groups)),
    }
    return found | ({"weight_scale_2": TensorInfo(FLOAT32, ())} if blocks.two_scales else {})


def pack(matrix: Matrix, linear: Linear) -> dict[str, Array]:
    codes = pack_codes(matrix.codes, linear.grid.bits)
    found: dict[str, Array] = {"weight": codes, "weight_scale": np.ascontiguousarray(matrix.scale)}
    if matrix.scale_2 is not None:
        found["weight_scale_2"] = matrix.scale_2
    return {suffix: found[suffix].view(info.dtype).reshape(info.shape) for suffix, info in plan(linear).items()}


def unpack(parts: Mapping[str, Array], linear: Linear) -> Matrix:
    blocks = BLOCKS[linear.grid.kind]
    codes = unpack_codes(np.ascontiguousarray(parts["weight"]).view(np.uint8), blocks.bits, linear.in_features)
    scale_2 = parts["weight_scale_2"].astype(np.float32).reshape(1) if blocks.two_scales else None
    return Matrix(codes, parts["weight_scale"].view(blocks.scales), middle(linear), scale_2=scale_2)


def lacks(linear: Linear) -> str | None:
    return "blocks that do not divide the inputs" if linear.in_features % (linear.grid.group_size or 1) else None


def sizes(algorithm: str) -> dict[str, Any]:
    """What the config says of an algorithm beside its name: modelopt has it of those that it has a name for."""
    return {} if algorithm == "mxfp4" else {"group_size": GRIDS[algorithm].group_size}
