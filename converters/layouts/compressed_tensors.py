"""The layout "pack-quantized" of compressed-tensors, which transformers and vLLM load.

    weight_packed      int32   [out, ceil(in * bits / 32)]     codes in a row's order, the first lowest
    weight_scale       float   [out, groups]
    weight_zero_point  int32   [ceil(out * bits / 32), groups] likewise along the outputs; absent when symmetric
    weight_shape       int64   [2]                             out, in
    weight_g_idx       int32   [in]                            each input's group, where `actorder` is "group"

With an `actorder` of "weight" groups are runs of inputs; "group" is read, and not written, because 0.20 has it no more.
A row that is one group is of strategy "channel". Scales stay float32: a loader makes of them what it computes with.
The source is the package's compressors/pack_quantized (its codes are signed, and stored with 2^(bits - 1) added, which
makes them ours) and quantization/quant_config.py.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from llmc.converters import packed_export
from llmc.converters.layouts import (
    FLOAT32,
    INT32,
    SCATTERED,
    Config,
    Files,
    Grid,
    Layout,
    Linear,
    Matrix,
    bits_of,
    compressed_rounded,
    from_words,
    group_of,
    middle,
    only,
    to_words,
)
from llmc.errors import CheckpointError, UnsupportedModelError
from llmc.quant.pack import Bytes
from llmc.tensors import Array, TensorInfo

_METHOD, _FORMAT = "compressed-tensors", "pack-quantized"
_ZERO, _GROUPS = "weight_zero_point", "weight_g_idx"


def plan(linear: Linear) -> dict[str, TensorInfo]:
    rows, columns, bits, groups = linear.out_features, linear.in_features, linear.grid.bits, linear.groups
    found = {
        "weight_packed": TensorInfo(INT32, (rows, -(-columns * bits // 32))),
        "weight_scale": TensorInfo(FLOAT32, (rows, groups)),
        "weight_shape": TensorInfo(np.dtype(np.int64), (2,)),
    }
    if not linear.grid.symmetric:
        found[_ZERO] = TensorInfo(INT32, (-(-rows * bits // 32), groups))
    if linear.ordered:
        found[_GROUPS] = TensorInfo(INT32, (columns,))
    return found


def pack(matrix: Matrix, linear: Linear) -> dict[str, Array]:
    bits = linear.grid.bits
    found = {
        "weight_packed": to_words(matrix.codes, bits),
        "weight_scale": matrix.scale,
        "weight_shape": np.array([linear.out_features, linear.in_features], np.int64),
    }
    if not linear.grid.symmetric:
        found[_ZERO] = np.ascontiguousarray(to_words(np.ascontiguousarray(matrix.zero.T), bits).T)
    return found


def _zeros(words: Array, linear: Linear) -> Bytes:
    return from_words(words.T, linear.grid.bits, linear.out_features).T


def unpack(parts: Mapping[str, Array], linear: Linear) -> Matrix:
    if parts["weight_shape"].tolist() != [linear.out_features, linear.in_features]:
        raise CheckpointError(f"'weight_shape' is {parts['weight_shape'].tolist()}, which the other tensors are not")
    codes = from_words(parts["weight_packed"], linear.grid.bits, linear.in_features)
    zero = _zeros(parts[_ZERO], linear) if _ZERO in parts else middle(linear)
    groups = parts[_GROUPS] if linear.ordered else None
    return Matrix(codes, parts["weight_scale"].astype(np.float32), zero, groups=groups)


def lacks(linear: Linear) -> str | None:
    if linear.turned:
        return "linears that are kept as [in, out] (Conv1D)"
    if linear.ordered:
        return SCATTERED
    return "groups that do not divide the inputs" if linear.is_ragged else None


def write(linears: Mapping[str, Linear], kept: Sequence[str], outside: Sequence[str]) -> tuple[Config, Files]:
    schemes: dict[tuple[int, int | None, bool], list[str]] = {}
    for module, linear in linears.items():
        size = linear.grid.group_size if linear.groups > 1 or linear.in_features == linear.grid.group_size else None
        schemes.setdefault((linear.grid.bits, size, linear.grid.symmetric), []).append(module)
    groups = {}
    for index, ((bits, size, symmetric), modules) in enumerate(schemes.items()):
        weights = {
            "num_bits": bits,
            "type": "int",
            "symmetric": symmetric,
            "strategy": "channel" if size is None else "group",
            "group_size": size,
            "dynamic": False,
        }
        # Names, where not all linears are alike.
        targets = ["Linear"] if len(schemes) == 1 else modules
        groups[f"group_{index}"] = {"targets": targets, "weights": weights, "format": _FORMAT}
    config: Config = {
        "quant_method": _METHOD,
        "format": _FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [*kept, *outside],
    }
    return config, {}


LAYOUT = Layout(
    _METHOD, plan, pack, unpack, lacks, write, scale="weight_scale", zeros=(_ZERO, _zeros), mixes=True, groups=_GROUPS
)  # fmt: skip


def read(config: Mapping[str, Any], where: object) -> tuple[Layout, Callable[[str], Grid]]:
    """See llmc/converters/packed_import.py.

    Raises:
        UnsupportedModelError: The config says something that this layout has no place for.
    """
    only(config, "kv_cache_scheme", None, None, where)
    only(config, "quantization_status", "compressed", "compressed", where)
    schemes: dict[str, tuple[list[str], Grid]] = {}
    rounded: set[bool] = set()
    for name, group in (config.get("config_groups") or {}).items():
        place = f"{where}: config_groups.{name}"
        only(group, "output_activations", None, None, place)
        form = group.get("format") or config.get("format")
        rounded.add(form in compressed_rounded.NAMES)
        found = compressed_rounded.grid(group, place) if form in compressed_rounded.NAMES else _grid(group, form, place)
        schemes[name] = list(group.get("targets") or []), found
    if len(rounded) > 1:
        raise UnsupportedModelError(f"{where}: 'config_groups' has weights in groups and such of whole rows")

    def grid(module: str) -> Grid:
        by_name = [found for targets, found in schemes.values() if any(_is_named(module, name) for name in targets)]
        by_class = [found for targets, found in schemes.values() if "Linear" in targets]
        if not by_name and not by_class:
            raise UnsupportedModelError(f"{where}: no group of 'config_groups' has the target '{module}'")
        return (by_name or by_class)[0]

    return compressed_rounded.LAYOUT if True in rounded else LAYOUT, grid


def _grid(group: Mapping[str, Any], form: object, where: str) -> Grid:
    only({"format": form}, "format", _FORMAT, None, where)
    only(group, "input_activations", None, None, where)
    weights = group.get("weights") or {}
    only(weights, "type", "int", "int", where)
    bits, symmetric = bits_of(weights, "num_bits", where), bool(weights.get("symmetric", True))
    return Grid(bits, group_of(weights, where), symmetric)


def _is_named(module: str, target: str) -> bool:
    return re.match(target[3:], module) is not None if target.startswith("re:") else module == target


LAYOUTS = (LAYOUT, compressed_rounded.LAYOUT)
export = functools.partial(packed_export.export, LAYOUTS)
