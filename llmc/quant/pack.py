"""Packed weights: codes to bytes and back, and what they stand for.

    value[r, c] = (code[r, c] - zero[r, c // group]) * scale[r, c // group]          whole numbers
    value[r, c] = code[r, c] * (scale[r, c // block] [* scale_2])                    floating-point numbers

    codes of a row, 4 bits    c0 c1 c2 c3 ...        padded with the zero point to whole groups
    bytes                     c1c0  c3c2  ...        low bits first

The layout is that of ONNX Runtime's MatMulNBits (onnxruntime, docs/ContribOperators.md: B, scales, zero_points) with
the dimensions of groups and bytes within a group laid into one, so a builder only reshapes.

Knows: layouts. Does not know: how codes are chosen (rtn.py and its neighbours).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from llmc.recipe import WeightFormat
from llmc.tensors import Array

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

Result = TypeVar("Result")

_BLOCK = 1 << 21  # values worked on at a time by a thread: 8 MiB of fp32, so temporaries stay near the cache


@dataclass(frozen=True, slots=True)
class Packed:
    """One quantized matrix [out, in] as it is stored (shapes: llmc/recipe.py, packed_plan).

    Attributes:
        qweight: uint8 [out, groups * group_size * bits / 8], or float8_e4m3fn [out, in].
        scale: float32 [out, groups], or [1, 1]; of blocks float8_e4m3fn or float8_e8m0fnu.
        zero: uint8 [out, ceil(groups * bits / 8)], None when symmetric.
        inputs: What the linear's input goes through, by kind (`input_scale`, ...), in the order of packed_plan.
        error: |X W^T - X W'^T| / |X W^T| on the calibration text X, where the algorithm knows it. Not stored.
        scale_2: float32 [1], of blocks whose matrix has a scale as well.
    """

    qweight: Array
    scale: Array
    zero: Bytes | None = None
    error: float | None = None
    inputs: Mapping[str, Array] = field(default_factory=dict)
    scale_2: Floats | None = None

    def pieces(self, module: str) -> Iterator[tuple[str, Array]]:
        """The tensors under their canonical names."""
        yield f"{module}.qweight", self.qweight
        yield f"{module}.scale", self.scale
        if self.scale_2 is not None:
            yield f"{module}.scale_2", self.scale_2
        if self.zero is not None:
            yield f"{module}.zero", self.zero
        for kind, values in self.inputs.items():
            yield f"{module}.{kind}", values


def pack_codes(codes: Bytes, bits: int) -> Bytes:
    """Codes [rows, count], each below 2^bits, to bytes [rows, ceil(count * bits / 8)], low bits first."""
    if bits == 8:
        return codes
    if codes.shape[1] % 2:
        codes = np.pad(codes, ((0, 0), (0, 1)))
    packed = codes[:, 1::2] << np.uint8(4)
    packed |= codes[:, ::2]
    return packed


def unpack_codes(packed: Bytes, bits: int, count: int) -> Bytes:
    """The first `count` codes of each row: the inverse of `pack_codes`."""
    if bits == 8:
        return packed[:, :count]
    codes = np.empty((len(packed), 2 * packed.shape[1]), np.uint8)
    codes[:, ::2], codes[:, 1::2] = packed & 0x0F, packed >> 4
    return codes[:, :count]


def dequantize(
    qweight: Array,
    scale: Array,
    zero: Bytes | None,
    weight_format: WeightFormat,
    in_features: int,
    *,
    order: Array | None = None,
    scale_2: Floats | None = None,
) -> Floats:
    """What a packed matrix stands for.

    Args:
        qweight, scale, zero, scale_2: See `Packed`.
        order: int32 [in_features], the input of each column as it is packed; None: they are in order.

    Returns:
        float32 [out, in_features].
    """
    packed = Packed(qweight, scale, zero, scale_2=scale_2)
    values = np.empty((len(qweight), in_features), np.float32)
    columns = slice(None) if order is None else order

    def work(part: slice) -> None:
        values[part, columns] = dequantize_rows(packed, weight_format, in_features, part)

    over_rows(work, len(qweight), in_features)
    return values


def dequantize_rows(packed: Packed, weight_format: WeightFormat, in_features: int, part: slice) -> Floats:
    """Some rows of `dequantize`, on this thread."""
    if weight_format.kind == "fp8":
        return packed.qweight[part].astype(np.float32) * packed.scale[... if weight_format.per_tensor else part]
    size, bits, blocks = weight_format.width(in_features), weight_format.bits, weight_format.blocks
    scale = packed.scale[part, :, None].astype(np.float32, copy=False)
    if packed.scale_2 is not None:
        scale = scale * packed.scale_2
    rows, groups, _ = scale.shape
    stored = unpack_codes(packed.qweight[part].view(np.uint8), bits, groups * size).reshape(rows, groups, size)
    codes = (stored.view(blocks.codes) if blocks else stored).astype(np.float32)
    if packed.zero is not None:
        codes -= unpack_codes(packed.zero[part], bits, groups)[:, :, None]
    elif blocks is None:
        codes -= np.float32(1 << (bits - 1))
    codes *= scale
    return codes.reshape(rows, groups * size)[:, :in_features]


def over_rows(work: Callable[[slice], Result], rows: int, columns: int) -> list[Result]:
    """Call `work` on slices of the rows of a matrix, on all cores (numpy lets go of the interpreter lock)."""
    step = max(1, _BLOCK // columns)
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        return list(pool.map(work, (slice(start, min(start + step, rows)) for start in range(0, rows, step))))
