"""Round to nearest: each group's scale from its extremes, each weight to the nearest code. No calibration.

Symmetric formats give the values of nvidia-modelopt's INT4_BLOCKWISE_WEIGHT_ONLY_CFG, and of its int8 weights in
blocks: scale = amax / (2^(bits-1) - 1), ties to even; the lowest code stays unused. Asymmetric ones spread their
codes from the group's minimum to its maximum, zero being always among the values.
"""

from __future__ import annotations

import numpy as np

from llmc.config import Strict
from llmc.quant import fp8
from llmc.quant.algorithm import Transform
from llmc.quant.pack import Bytes, Floats, Packed, over_rows, pack_codes
from llmc.recipe import WeightFormat
from llmc.tensors import Array

CALIBRATES = False


class Options(Strict):
    """There is nothing to choose."""


# A group narrower than this counts as zero: the inverse of its scale would overflow.
_NARROWEST = np.float32(1e-30)


def prepare(*_: object) -> Transform:
    """There is nothing to prepare; see llmc/quant/algorithm.py."""
    return lambda _, values, weight_format: quantize(values, weight_format) if weight_format else values


def quantize(weights: Array, weight_format: WeightFormat) -> Packed:
    """Quantize a matrix [out, in] of any float type, some rows at a time on every core."""
    if weight_format.kind == "fp8":
        return fp8.quantize(weights, weight_format)
    rows, columns = weights.shape
    groups, size, bits = weight_format.groups(columns), weight_format.width(columns), weight_format.bits

    def work(part: slice) -> tuple[Bytes, Floats, Bytes]:
        padded = np.zeros((part.stop - part.start, groups * size), np.float32)
        padded[:, :columns] = weights[part]
        codes, scale, zero = choose_codes(padded.reshape(-1, groups, size), weight_format)
        return pack_codes(codes.reshape(padded.shape), bits), scale, pack_codes(zero, bits)

    qweight, scale, zero = (np.concatenate(blocks) for blocks in zip(*over_rows(work, rows, columns), strict=True))
    return Packed(qweight, scale, None if weight_format.symmetric else zero)


def choose_codes(values: Floats, weight_format: WeightFormat) -> tuple[Bytes, Floats, Bytes]:
    """Codes, scales and zero points of groups.

    Args:
        values: float32 [rows, groups, group_size].

    Returns:
        uint8 [rows, groups, group_size], float32 [rows, groups], uint8 [rows, groups].
    """
    highest = 2**weight_format.bits - 1
    if weight_format.symmetric:
        steps = np.float32(highest // 2)
        span = np.abs(values).max(axis=-1)
    else:
        steps = np.float32(highest)
        low, high = values.min(axis=-1).clip(max=0), values.max(axis=-1).clip(min=0)
        span = high - low
    alive = span > _NARROWEST
    inverse = np.divide(steps, span, where=alive, out=np.zeros_like(span))
    scale = np.where(alive, span / steps, np.float32(1))
    zero = np.full_like(span, highest // 2 + 1) if weight_format.symmetric else np.rint(-low * inverse)
    codes = np.rint(values * inverse[..., None])
    codes += zero[..., None]
    return codes.clip(0, highest, out=codes).astype(np.uint8), scale, zero.astype(np.uint8)
