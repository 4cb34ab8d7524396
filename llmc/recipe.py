"""QuantRecipe: what is quantized, to which format, by which algorithm. The same for every algorithm and every builder.

Knows: which tensors a quantized checkpoint has. Does not know: how their values are found (one file an algorithm
in llmc/quant) or what runs them (builders).
"""

from __future__ import annotations

import fnmatch
from typing import Any, Literal

import numpy as np
from pydantic import model_validator

from llmc import names
from llmc.config import Strict
from llmc.tensors import TensorInfo


class WeightFormat(Strict):
    """Groups of consecutive inputs of a row share a scale, and a zero point unless symmetric.

    value = (code - zero) * scale, codes unsigned, `bits` wide; when symmetric, zero = 2^(bits-1) is implied.
    """

    kind: Literal["int"] = "int"
    bits: Literal[4, 8]
    group_size: Literal[16, 32, 64, 128, 256]
    symmetric: bool = True

    def groups(self, in_features: int) -> int:
        """Groups in a row; the last one may be partly padding."""
        return -(-in_features // self.group_size)


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
        kv_cache: Format of the KV cache, None for the compute type.
        options: What else the algorithm was told.
    """

    algorithm: str
    weights: WeightFormat | None = None
    keep: tuple[str, ...] = ()
    overrides: dict[str, WeightFormat] = {}
    kv_cache: KVCacheFormat | None = None
    options: dict[str, Any] = {}

    @model_validator(mode="after")
    def _does_something(self) -> QuantRecipe:
        if self.weights is None and self.kv_cache is None:
            raise ValueError("nothing is quantized: neither weights nor the KV cache have a format")
        return self

    def format_of(self, matrix: str) -> WeightFormat | None:
        """The format of a matrix by its name without `.weight`, None when it stays as it was."""
        if self.weights is None or any(fnmatch.fnmatchcase(matrix, glob) for glob in self.keep):
            return None
        for glob, override in self.overrides.items():
            if fnmatch.fnmatchcase(matrix, glob):
                return override
        return self.weights


def packed_plan(
    recipe: QuantRecipe | None, name: str, shape: tuple[int, ...], info: TensorInfo | None
) -> dict[str, TensorInfo]:
    """The tensors that stand for the tensor `name` of `shape` in a checkpoint of this recipe.

    Matrices in a format become (in = the row's length, padded to whole groups):

        M.qweight   uint8   [out, groups * group_size * bits / 8]   low bits first, a row's groups one after another
        M.scale     float32 [out, groups]
        M.zero      uint8   [out, ceil(groups * bits / 8)]          unless symmetric

    and a layer's k and v projections are followed by `layers.N.attn.{k,v}_scale` float32 [kv_heads * head_dim] when
    the KV cache has a format with stored scales (all channels of a head have the same when it has one). All else stays.
    """
    module, _, kind = name.rpartition(".")
    found: dict[str, TensorInfo] = {}
    weight_format = recipe.format_of(module) if recipe and names.is_matrix(name, shape) else None
    if weight_format is None:
        found[name] = TensorInfo(info.dtype if info else np.dtype(np.float32), shape)
    else:
        bits, groups = weight_format.bits, weight_format.groups(shape[1])
        rows, row_bytes = shape[0], groups * weight_format.group_size * bits // 8
        found[f"{module}.qweight"] = TensorInfo(np.dtype(np.uint8), (rows, row_bytes))
        found[f"{module}.scale"] = TensorInfo(np.dtype(np.float32), (rows, groups))
        if not weight_format.symmetric:
            found[f"{module}.zero"] = TensorInfo(np.dtype(np.uint8), (rows, -(-groups * bits // 8)))
    is_kv = kind == "weight" and module.endswith((".attn.k", ".attn.v"))
    if recipe and recipe.kv_cache and recipe.kv_cache.scale != "dynamic" and is_kv:
        found[f"{module}_scale"] = TensorInfo(np.dtype(np.float32), (shape[0],))
    return found
