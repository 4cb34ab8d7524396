"""QuantRecipe: what is quantized, to which format, by which algorithm. The same for every algorithm and every builder.

Knows: which tensors a quantized checkpoint has. Does not know: how their values are found (one file an algorithm
in llmc/quant) or what runs them (builders).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np
from pydantic import model_validator

from llmc import names
from llmc.config import Strict
from llmc.tensors import TensorInfo

FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
_FLOAT, _INT32 = np.dtype(np.float32), np.dtype(np.int32)
E2M1 = np.dtype(ml_dtypes.float4_e2m1fn)
E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)


@dataclass(frozen=True, slots=True)
class Blocks:
    """A block floating point format: a block of a row shares a scale of 8 bits.

    Attributes:
        bits: Of a code.
        size: Inputs of a block.
        codes: e2m1 (0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives) or e4m3.
        highest: Of the codes.
        scales: e4m3, or e8m0: powers of two from 2^-127 to 2^127.
        two_scales: The matrix has a scale as well, of float32.
    """

    bits: Literal[4, 8]
    size: Literal[16, 32]
    codes: np.dtype[Any]
    highest: int
    scales: np.dtype[Any]
    two_scales: bool = False


# NVIDIA's format, and two of the Open Compute Project's Microscaling Formats (MX) 1.0.
BLOCKS = {
    "nvfp4": Blocks(4, 16, E2M1, 6, FP8, two_scales=True),
    "mxfp4": Blocks(4, 32, E2M1, 6, E8M0),
    "mxfp8": Blocks(8, 32, FP8, 448, E8M0),
}


Kind = Literal["int", "fp8", "nvfp4", "mxfp4", "mxfp8"]


class WeightFormat(Strict):
    """Groups of consecutive inputs of a row share a scale, and a zero point unless symmetric.

    int: value = (code - zero) * scale, codes unsigned, `bits` wide; when symmetric, zero = 2^(bits-1) is implied.
    fp8: value = code * scale, codes float8 e4m3 (4 bits of exponent, 3 of mantissa, up to 448, no infinities).
    nvfp4, mxfp4, mxfp8: value = code * scale [* the matrix's scale], types and sizes as in BLOCKS.

    Attributes:
        group_size: 0 for whole rows, without padding.
        per_tensor: fp8 only: one scale for all rows.
    """

    kind: Kind = "int"
    bits: Literal[4, 8]
    group_size: Literal[0, 16, 32, 64, 128, 256]
    symmetric: bool = True
    per_tensor: bool = False

    @model_validator(mode="after")
    def _is_stored(self) -> WeightFormat:
        if self.kind == "fp8" and (self.bits, self.group_size, self.symmetric) != (8, 0, True):
            raise ValueError("fp8 has 8 bits, no groups and no zero points")
        if self.kind != "fp8" and self.per_tensor:
            raise ValueError("only fp8 has one scale for a whole matrix")
        blocks = self.blocks
        if blocks and (self.bits, self.group_size, self.symmetric) != (blocks.bits, blocks.size, True):
            raise ValueError(f"{self.kind} has {blocks.bits} bits in blocks of {blocks.size} and no zero points")
        if self.group_size == 0 and (self.bits, self.symmetric) != (8, True):
            raise ValueError("a scale for a whole row takes 8 bits and no zero points: choose a group size")
        return self

    @property
    def blocks(self) -> Blocks | None:
        """What the blocks are of a block floating point format; None of others."""
        return BLOCKS.get(self.kind)

    @property
    def two_scales(self) -> bool:
        """Whether the matrix has a scale beside those of its blocks."""
        return self.blocks is not None and self.blocks.two_scales

    def groups(self, in_features: int) -> int:
        """Groups in a row; the last one may be partly padding."""
        return -(-in_features // self.width(in_features))

    def width(self, in_features: int) -> int:
        """Inputs of a group."""
        return self.group_size or in_features


class ActivationFormat(Strict):
    """What the inputs of linears are rounded to: value = code * scale, codes int8 or float8 e4m3.

    Attributes:
        dynamic: Each token has a scale of its own, from the largest of its values; with int8, one for each group of
            inputs that share a scale of the weights. Otherwise all tokens share one that was calibrated.
    """

    kind: Literal["int8", "fp8"] = "int8"
    dynamic: bool = True


class KVCacheFormat(Strict):
    """8-bit keys and values: value = code * scale. Which of them an engine can keep is its backend's to say.

    Attributes:
        kind: Codes -127 to 127, or numbers of float8 e4m3 up to 448.
        scale: One for each channel of each kv head, or one for each kv head, found in a text and stored; or dynamic:
            one for each token and head, from its own largest magnitude when it is written.
        observer: Of stored scales: from the largest magnitude of the whole text, or from the mean of the windows'
            largest, which clips what is rare.
    """

    kind: Literal["int8", "fp8"] = "int8"
    scale: Literal["channel", "head", "dynamic"] = "channel"
    observer: Literal["max", "average"] = "max"

    @model_validator(mode="after")
    def _observes_something(self) -> KVCacheFormat:
        if self.scale == "dynamic" and self.observer != "max":
            raise ValueError("dynamic scales are found when a token is written: no text is observed for them")
        return self

    @property
    def highest(self) -> int:
        """What the largest magnitude becomes."""
        return 127 if self.kind == "int8" else 448


class QuantRecipe(Strict):
    """How a checkpoint was quantized.

    Attributes:
        algorithm: Who chose the codes.
        weights: Format of every matrix that is not kept; None keeps all.
        keep: Globs over the names of matrices ("head", "layers.0.*") that stay as they were.
        overrides: Globs with another format than `weights`; the first that fits counts.
        outside: Format of embedding and head, and what stands beside them; by default `weights`.
        activations: Format of what the quantized linears of the layers read, None for the compute type.
        multiplied: Globs of those linears whose input is multiplied by a vector before it is rounded.
        shifted: Globs of those whose input has a vector taken away first.
        ordered: Globs of linears whose groups are of inputs in another order than the model's (GPTQ's act-order).
        kv_cache: Format of the KV cache, None for the compute type.
        options: What else the algorithm was told.
    """

    algorithm: str
    weights: WeightFormat | None = None
    keep: tuple[str, ...] = ()
    overrides: dict[str, WeightFormat] = {}
    outside: WeightFormat | None = None
    activations: ActivationFormat | None = None
    multiplied: tuple[str, ...] = ()
    shifted: tuple[str, ...] = ()
    ordered: tuple[str, ...] = ()
    kv_cache: KVCacheFormat | None = None
    options: dict[str, Any] = {}

    @model_validator(mode="after")
    def _does_something(self) -> QuantRecipe:
        if self.weights is None and self.kv_cache is None:
            raise ValueError("nothing is quantized: neither weights nor the KV cache have a format")
        return self

    @model_validator(mode="after")
    def _is_computed(self) -> QuantRecipe:
        """Only what some kernel computes."""
        if self.ordered and self.activations:
            raise ValueError("inputs that are rounded are in the model's own order")
        if self.activations is None:
            if self.multiplied or self.shifted:
                raise ValueError("inputs that are not rounded need no factor")
            forms = (self.weights, *self.overrides.values(), self.outside)
            if any(form and form.kind == "int" and form.group_size == 0 for form in forms):
                raise ValueError("int8 weights with a scale for a whole row need rounded activations")
            return self
        if self.weights is None:
            raise ValueError("activations are rounded where weights are quantized, and none are")
        for form in (self.weights, *self.overrides.values()):
            if form.blocks:
                raise ValueError(f"{form.kind} rounds weights alone: its linears read inputs as they are")
            if self.activations.kind == "int8" and form.kind == "fp8":
                raise ValueError("fp8 weights go with fp8 activations")
            if self.activations.kind == "int8" and not self.activations.dynamic and form.group_size:
                raise ValueError("static int8 activations need weights with a scale for a whole row")
            if self.activations.kind == "fp8" and form.kind == "int" and form.group_size == 0:
                raise ValueError("int8 weights with a scale for a whole row go with int8 activations")
        return self

    def format_of(self, matrix: str) -> WeightFormat | None:
        """The format of a matrix by its name without `.weight`, None when it stays as it was."""
        if self.weights is None or _fits(matrix, self.keep):
            return None
        for glob, override in self.overrides.items():
            if fnmatch.fnmatchcase(matrix, glob):
                return override
        return self.weights if matrix.startswith("layers.") else self.outside or self.weights

    def inputs_of(self, matrix: str) -> ActivationFormat | None:
        """The format of what a linear reads, None when it reads it as it is."""
        return self.activations if matrix.startswith("layers.") and self.format_of(matrix) else None

    def is_multiplied(self, matrix: str) -> bool:
        """Whether a linear's input is multiplied first."""
        return self.inputs_of(matrix) is not None and _fits(matrix, self.multiplied)

    def is_shifted(self, matrix: str) -> bool:
        """Whether a linear's input is shifted first."""
        return self.inputs_of(matrix) is not None and _fits(matrix, self.shifted)

    def is_ordered(self, matrix: str) -> bool:
        """Whether a linear's input is put into another order first. The embedding's input has none."""
        form = self.format_of(matrix) if matrix != "embed" else None
        return form is not None and form.group_size > 0 and _fits(matrix, self.ordered)


def _fits(matrix: str, globs: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(matrix, glob) for glob in globs)


def packed_plan(
    recipe: QuantRecipe | None, name: str, shape: tuple[int, ...], info: TensorInfo | None
) -> dict[str, TensorInfo]:
    """The tensors that stand for the tensor `name` of `shape` in a checkpoint of this recipe.

    Matrices in a format become (in = the row's length, padded to whole groups):

        M.qweight         uint8   [out, groups * group_size * bits / 8]   low bits first, a row's groups in order
                          or float8_e4m3fn [out, in], of mxfp8 [out, groups * 32]
        M.scale           float32 [out, groups], or [1, 1] per tensor; of blocks float8_e4m3fn or float8_e8m0fnu
        M.scale_2         float32 [1]     of nvfp4
        M.zero            uint8   [out, ceil(groups * bits / 8)]          unless symmetric
        M.input_shift     float32 [in]    where the recipe says so: the linear computes, before weights are rounded,
        M.input_bias      float32 [out]   ((x - input_shift) * input_multiply) W^T + bias + input_bias
        M.input_multiply  float32 [in]    where the recipe says so
        M.input_scale     float32 [1]     where activations have a static scale
        M.input_order     int32   [in]    where the recipe says so: columns of codes are those of x[input_order]

    and a layer's k and v projections are followed by `layers.N.attn.{k,v}_scale` float32 [kv_heads * head_dim] when
    the KV cache has a format with stored scales (all channels of a head have the same when it has one). All else stays.
    """
    module, _, kind = name.rpartition(".")
    found: dict[str, TensorInfo] = {}
    weight_format = recipe.format_of(module) if recipe and names.is_matrix(name, shape) else None
    if recipe is None or weight_format is None:
        found[name] = TensorInfo(info.dtype if info else np.dtype(np.float32), shape)
    else:
        found.update(_packed(module, shape, weight_format))
        found.update({f"{module}.{kind}": each for kind, each in _inputs(recipe, module, shape)})
    is_kv = kind == "weight" and module.endswith((".attn.k", ".attn.v"))
    if recipe and recipe.kv_cache and recipe.kv_cache.scale != "dynamic" and is_kv:
        found[f"{module}_scale"] = TensorInfo(np.dtype(np.float32), (shape[0],))
    return found


def _packed(module: str, shape: tuple[int, ...], form: WeightFormat) -> Iterator[tuple[str, TensorInfo]]:
    (rows, columns), groups = shape, form.groups(shape[1])
    if form.kind == "fp8":
        yield f"{module}.qweight", TensorInfo(FP8, (rows, columns))
        yield f"{module}.scale", TensorInfo(_FLOAT, (1 if form.per_tensor else rows, 1))
        return
    row_bytes, blocks = groups * form.width(columns) * form.bits // 8, form.blocks
    codes = FP8 if blocks and blocks.codes == FP8 else np.dtype(np.uint8)
    yield f"{module}.qweight", TensorInfo(codes, (rows, row_bytes))
    yield f"{module}.scale", TensorInfo(blocks.scales if blocks else _FLOAT, (rows, groups))
    if form.two_scales:
        yield f"{module}.scale_2", TensorInfo(_FLOAT, (1,))
    if not form.symmetric:
        yield f"{module}.zero", TensorInfo(np.dtype(np.uint8), (rows, -(-groups * form.bits // 8)))


def _inputs(recipe: QuantRecipe, module: str, shape: tuple[int, ...]) -> Iterator[tuple[str, TensorInfo]]:
    rows, columns = shape
    if recipe.is_shifted(module):
        yield "input_shift", TensorInfo(_FLOAT, (columns,))
        yield "input_bias", TensorInfo(_FLOAT, (rows,))
    if recipe.is_multiplied(module):
        yield "input_multiply", TensorInfo(_FLOAT, (columns,))
    form = recipe.inputs_of(module)
    if form and not form.dynamic:
        yield "input_scale", TensorInfo(_FLOAT, (1,))
    if recipe.is_ordered(module):
        yield "input_order", TensorInfo(_INT32, (columns,))
