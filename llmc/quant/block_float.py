"""`nvfp4`, `mxfp4` and `mxfp8`: floating-point codes in blocks, a scale each from its largest weight. No calibration.

    nvfp4   scale_2 = amax of the matrix / (6 * 448)    scale = e4m3(amax of the block / 6 / scale_2)
    mx...   scale = 2^ceil(log2(amax of the block / the largest code))

    code = the nearest to w / scale [/ scale_2], ties to even

These are the tensors of nvidia-modelopt 0.47 (torch/quantization/qtensor: nvfp4_tensor.py, mxfp4_tensor.py,
mxfp8_tensor.py), where mxfp4's ties alone go towards zero. The MX specification (Open Compute Project, 1.0) rounds log2
down, which cuts a block's largest weights off; modelopt rounds it up, so that none is. Linears that engines multiply as
one share scale_2, as in modelopt's own export: vLLM takes one for them all.

Knows: arithmetic. Does not know: activations, which stay as they are; what multiplies such weights, which is CUDA's.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llmc import names
from llmc.checkpoint import Checkpoint
from llmc.config import Strict
from llmc.quant import rtn
from llmc.quant.algorithm import Transform
from llmc.quant.pack import Bytes, Floats, Packed, over_rows, pack_codes
from llmc.recipe import FP8, Blocks, QuantRecipe, WeightFormat
from llmc.runtime import Tokens
from llmc.tensors import Array

CALIBRATES = False

_TOGETHER = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate_up", "up": "gate_up"}

# The smallest scale of a block: what e4m3 has next to zero.
_SMALLEST = np.float32(2**-9)
_HIGHEST_SCALE = np.float32(448)

# What counts as zero, as in llmc/quant/rtn.py.
_NARROWEST = np.float32(1e-30)


class Options(Strict):
    """There is nothing to choose."""


def prepare(checkpoint: Checkpoint, recipe: QuantRecipe, _: Sequence[Tokens]) -> Transform:
    """See llmc/quant/algorithm.py."""
    reach = _reach(checkpoint, recipe)

    def transform(name: str, values: Array, form: WeightFormat | None) -> Packed | Array:
        if form is None:
            return values
        # Embedding and head are whole numbers.
        return quantize(values, form, reach.get(_product(name))) if form.blocks else rtn.quantize(values, form)

    return transform


def _product(name: str) -> str:
    """Of which product a matrix is a part, in engines that multiply q, k and v as one."""
    parent, _, linear = name.removesuffix(".weight").rpartition(".")
    return f"{parent}.{_TOGETHER.get(linear, linear)}"


def _reach(checkpoint: Checkpoint, recipe: QuantRecipe) -> dict[str, float]:
    """The largest magnitude of each product whose matrices have a scale of their own."""
    found: dict[str, float] = {}
    for matrix in names.matrices(checkpoint.spec):
        form = recipe.format_of(matrix)
        if form and form.two_scales:
            product = _product(matrix)
            found[product] = max(found.get(product, 0.0), largest(checkpoint[f"{matrix}.weight"]))
    return found


def largest(weights: Array) -> float:
    """The largest magnitude in a matrix [out, in]."""
    return max(over_rows(lambda part: float(np.abs(weights[part].astype(np.float32)).max()), *weights.shape))


def quantize(weights: Array, form: WeightFormat, reach: float | None = None) -> Packed:
    """Quantize a matrix [out, in] of any float type.

    Args:
        reach: The largest magnitude that scale_2 is for; by default the matrix's own.

    Raises:
        ValueError: The format has no blocks.
    """
    blocks = form.blocks
    if blocks is None:
        raise ValueError(f"{form.kind} has no blocks")
    rows, columns = weights.shape
    groups = form.groups(columns)
    scale_2 = _scale_2(largest(weights) if reach is None else reach, blocks) if form.two_scales else None
    highest = np.float32(blocks.highest)

    def work(part: slice) -> tuple[Bytes, Array]:
        padded = np.zeros((part.stop - part.start, groups * blocks.size), np.float32)
        padded[:, :columns] = weights[part]
        values = padded.reshape(-1, groups, blocks.size)
        amax: Floats = np.abs(values).max(axis=-1)
        scale = _powers(amax / highest, blocks) if scale_2 is None else _fractions(amax, highest * scale_2)
        wide = scale.astype(np.float32) * (np.float32(1) if scale_2 is None else scale_2)
        values /= wide[..., None]
        codes = values.clip(-highest, highest, out=values).astype(blocks.codes)
        return pack_codes(codes.view(np.uint8).reshape(padded.shape), blocks.bits), scale

    qweight, scale = (np.concatenate(pieces) for pieces in zip(*over_rows(work, rows, columns), strict=True))
    return Packed(qweight.view(FP8) if blocks.codes == FP8 else qweight, scale, scale_2=scale_2)


def _scale_2(reach: float, blocks: Blocks) -> Floats:
    """float32 [1]; 1 for a matrix of zeros."""
    product = np.float32(blocks.highest) * _HIGHEST_SCALE
    return np.array([reach if reach > _NARROWEST else product], np.float32) / product


def _fractions(amax: Floats, unit: Floats) -> Array:
    """float8_e4m3fn [rows, blocks], 1 where a block is zero."""
    exact = np.where(amax > 0, amax / unit, np.float32(1))
    return exact.clip(_SMALLEST, _HIGHEST_SCALE).astype(FP8)


def _powers(least: Floats, blocks: Blocks) -> Array:
    """The smallest powers of two that are not below float32 [rows, blocks]: float8_e8m0fnu, whose bytes are the
    exponents + 127."""
    mantissa, exponent = np.frexp(least)  # 0.5 <= mantissa < 1, or 0
    found = np.where(mantissa == 0, -127, exponent - (mantissa == 0.5)).clip(-127, 127)
    return (found + 127).astype(np.uint8).view(blocks.scales)
