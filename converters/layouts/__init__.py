"""How other projects lay packed weights in a file: one file a layout, each read and written.

A linear of [out, in] that is one `weight` in a folder of floating-point numbers is several tensors in one of these,
named by suffixes: `qweight`, `scales` ... In between stands a `Matrix`, which every layout makes and takes:

    value[r, c] = (codes[r, c] - zero[r, group(c)]) * scale[r, group(c)]      group(c) = c // group_size, or groups[c]

Knows: what a layout has to tell. Does not know: any of them, nor rules, nor checkpoints (packed_export.py,
packed_import.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from llmc.errors import UnsupportedModelError
from llmc.quant.pack import Bytes, Floats, pack_codes, unpack_codes
from llmc.recipe import BLOCKS, ActivationFormat, Kind
from llmc.tensors import Array, TensorInfo

FLOAT16, FLOAT32, INT32 = np.dtype(np.float16), np.dtype(np.float32), np.dtype("<i4")


# Whole numbers with inputs as they are; float8, and what has rounded inputs; block floating point.
Sort = Literal["weights", "rounded", "blocks"]


@dataclass(frozen=True, slots=True)
class Grid:
    """What the codes of a linear are.

    Attributes:
        bits: 4 or 8.
        group_size: Consecutive inputs that share a scale; None: a whole row.
        symmetric: All zero points are 2^(bits - 1).
        kind: Whole numbers, float8 e4m3, or a block floating point format.
        per_tensor: One scale for all rows.
        inputs: What the linear's input is rounded to, None when it is not.
    """

    bits: int
    group_size: int | None
    symmetric: bool = True
    kind: Kind = "int"
    per_tensor: bool = False
    inputs: ActivationFormat | None = None

    @property
    def sort(self) -> Sort:
        """What of a layout is for it."""
        if self.kind in BLOCKS:
            return "blocks"
        return "rounded" if self.kind == "fp8" or self.inputs else "weights"


@dataclass(frozen=True, slots=True)
class Linear:
    """A packed linear of a file.

    Attributes:
        turned: Its family keeps linears as [in, out] (transformers' Conv1D).
        multiplied: Its input is multiplied by a vector before it is rounded.
        ordered: Its groups are scattered over the inputs (act-order).
    """

    out_features: int
    in_features: int
    grid: Grid
    turned: bool = False
    multiplied: bool = False
    ordered: bool = False

    @property
    def groups(self) -> int:
        """Groups in a row; the last one may be shorter."""
        return -(-self.in_features // (self.grid.group_size or self.in_features))

    @property
    def is_ragged(self) -> bool:
        """Whether a row's last group is shorter than the others."""
        return self.groups > 1 and self.in_features % (self.grid.group_size or 1) > 0

    @property
    def runs(self) -> Array:
        """The group of each input where none is scattered: int32 [in]."""
        return np.arange(self.in_features, dtype=INT32) // INT32.type(self.grid.group_size or self.in_features)


@dataclass(frozen=True, slots=True)
class Matrix:
    """A quantized linear, unpacked.

    Attributes:
        codes: uint8 [out, in]; of floating-point codes their bits.
        scale: float32 [out, groups], or [1, 1] per tensor; of blocks in their own type.
        zero: uint8 [out, groups]; 2^(bits - 1) throughout when symmetric.
        input_scale: float32 [1], where all tokens share a scale.
        input_multiply: float32 [in], of a linear that is multiplied.
        groups: int32 [in], the group of each input, of a linear that is ordered.
        scale_2: float32 [1], of blocks whose matrix has a scale as well.
    """

    codes: Bytes
    scale: Array
    zero: Bytes
    input_scale: Floats | None = None
    input_multiply: Floats | None = None
    groups: Array | None = None
    scale_2: Floats | None = None


# What a layout lacks that has no place for linears that are ordered.
SCATTERED = "groups that are scattered over the inputs (act-order)"

# quantization_config, and the other JSON files of a folder by their names.
Config = dict[str, Any]
Files = dict[str, Config]


@dataclass(frozen=True, slots=True)
class Layout:
    """One way to lay packed linears in a file.

    Attributes:
        name: Its own; the first layout of a format has the format's.
        plan: Suffix -> type and shape of each tensor of a linear. Scales of another float type are read as well.
        pack: The tensors of a linear, by suffix.
        unpack: The inverse of `pack`.
        zeros: The suffix of the zero points, and how they are unpacked, None when the layout has none.
        lacks: Why a linear has no place in the layout; None when it has.
        write: Packed linears by their modules' names, names of the other modules with a matrix in the layers, and of
            those outside (embedding, head) -> quantization_config, other files.
        mixes: Whether linears of one model may have different grids.
        optional: Suffixes that a file may leave out.
        holds: The sort of linears that it is for; it has no others.
        multiply: The suffix of what an input is multiplied by, None when the layout has no place for it.
        groups: The suffix of the inputs' groups, None when they are runs of inputs.
    """

    name: str
    plan: Callable[[Linear], dict[str, TensorInfo]]
    pack: Callable[[Matrix, Linear], dict[str, Array]]
    unpack: Callable[[Mapping[str, Array], Linear], Matrix]
    lacks: Callable[[Linear], str | None]
    write: Callable[[Mapping[str, Linear], Sequence[str], Sequence[str]], tuple[Config, Files]]
    scale: str
    zeros: tuple[str, Callable[[Array, Linear], Bytes]] | None = None
    mixes: bool = False
    optional: frozenset[str] = field(default=frozenset())
    holds: Sort = "weights"
    multiply: str | None = None
    groups: str | None = None


def middle(linear: Linear) -> Bytes:
    """The zero points of a symmetric linear: uint8 [out, groups]."""
    return np.full((linear.out_features, linear.groups), 1 << (linear.grid.bits - 1), np.uint8)


def to_words(codes: Bytes, bits: int) -> Array:
    """Codes [rows, count] to int32 [rows, ceil(count * bits / 32)], a row's first code in the lowest bits."""
    packed = pack_codes(codes, bits)
    packed = np.pad(packed, ((0, 0), (0, -packed.shape[1] % 4)))
    return np.ascontiguousarray(packed).view(INT32)


def from_words(words: Array, bits: int, count: int) -> Bytes:
    """The inverse of `to_words`: uint8 [rows, count]."""
    return unpack_codes(np.ascontiguousarray(words).view(np.uint8), bits, count)


def bits_of(config: Mapping[str, Any], key: str, where: object) -> int:
    """Bits of a weight.

    Raises:
        UnsupportedModelError: Neither 4 nor 8.
    """
    bits = config.get(key)
    if bits not in (4, 8):
        raise UnsupportedModelError(f"{where}: '{key}' is {bits!r}: llmc reads packed weights of 4 and 8 bits")
    return int(bits)


def group_of(config: Mapping[str, Any], where: object) -> int | None:
    """Inputs of a group, None when a row has one scale.

    Raises:
        UnsupportedModelError: It is no number of inputs.
    """
    size = config.get("group_size")
    if size in (None, -1):
        return None
    if not isinstance(size, int) or size < 1:
        raise UnsupportedModelError(f"{where}: 'group_size' is {size!r}: expected a number of inputs, or -1")
    return size


def only(config: Mapping[str, Any], key: str, wanted: object, default: object, where: object) -> None:
    """Refuse a setting of any other value.

    Raises:
        UnsupportedModelError: It has one.
    """
    if (met := config.get(key, default)) != wanted:
        raise UnsupportedModelError(f"{where}: '{key}' is {met!r}: llmc reads only {wanted!r}")
