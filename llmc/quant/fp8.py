"""Weights to the nearest float8 e4m3, scales from the extremes of rows or of the whole matrix. No calibration.

    code = e4m3(w / scale)        scale = amax / 448

Per tensor these are the weights of nvidia-modelopt's FP8_DEFAULT_CFG, per row those of FP8_PER_CHANNEL_PER_TOKEN_CFG.

Knows: arithmetic. Does not know: activations (scaled.py).
"""

from __future__ import annotations

import numpy as np

from llmc.quant.pack import Floats, Packed, over_rows
from llmc.recipe import FP8, WeightFormat
from llmc.tensors import Array

HIGHEST = np.float32(448)  # the largest e4m3 number

_NARROWEST = np.float32(1e-30)


def quantize(weights: Array, weight_format: WeightFormat) -> Packed:
    """Quantize a matrix [out, in] of any float type."""
    rows, columns = weights.shape
    reach = np.concatenate(over_rows(lambda part: _reach(weights[part]), rows, columns))
    if weight_format.per_tensor:
        reach = reach.max(keepdims=True)
    scale = np.where(reach > _NARROWEST, reach / HIGHEST, np.float32(1))
    codes = np.empty((rows, columns), FP8)

    def work(part: slice) -> None:
        by = scale[... if weight_format.per_tensor else part]
        codes[part] = (weights[part].astype(np.float32) / by).clip(-HIGHEST, HIGHEST).astype(FP8)

    over_rows(work, rows, columns)
    return Packed(codes, scale)


def _reach(weights: Array) -> Floats:
    reach: Floats = np.abs(weights.astype(np.float32)).max(axis=1, keepdims=True)
    return reach
