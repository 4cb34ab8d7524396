"""AutoGPTQ's layout, which GPTQModel, transformers, vLLM and others load.

    qweight  int32   [in * bits / 32, out]      8 (4 bits) or 4 consecutive inputs in a word, the first lowest
    qzeros   int32   [groups, out * bits / 32]  likewise along the outputs; in format "gptq" one less than they are
    scales   float16 [groups, out]
    g_idx    int32   [in]                       each input's group

The source is AutoGPTQ's auto_gptq/nn_modules/qlinear/qlinear_cuda_old.py (pack and forward). "One less" wraps around
in AutoGPTQ's kernels and carries over into the neighbour in others' (GPTQModel's utils/model.py), so zero points that
may be 0 go into format "gptq_v2", which has them as they are; symmetric ones, all in the middle, into "gptq".

With act-order (`desc_act`) the groups are scattered over the inputs, and g_idx says how; unless it is in order all the
same (static groups, a group a row).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from llmc import __version__
from llmc.converters import packed_export
from llmc.converters.layouts import (
    FLOAT16,
    INT32,
    Config,
    Files,
    Grid,
    Layout,
    Linear,
    Matrix,
    bits_of,
    from_words,
    group_of,
    only,
    to_words,
)
from llmc.errors import UnsupportedModelError
from llmc.quant.pack import Bytes
from llmc.tensors import Array, TensorInfo

_WORD = 32  # AutoGPTQ packs 32 inputs, and 32 outputs, at a time


def plan(linear: Linear) -> dict[str, TensorInfo]:
    rows, columns, bits, groups = linear.in_features, linear.out_features, linear.grid.bits, linear.groups
    return {
        "qweight": TensorInfo(INT32, (rows * bits // 32, columns)),
        "qzeros": TensorInfo(INT32, (groups, columns * bits // 32)),
        "scales": TensorInfo(FLOAT16, (groups, columns)),
        "g_idx": TensorInfo(INT32, (rows,)),
    }


def _pack(matrix: Matrix, linear: Linear, *, less: int) -> dict[str, Array]:
    bits = linear.grid.bits
    zero = (matrix.zero.T - np.uint8(less)) & np.uint8((1 << bits) - 1)
    return {
        "qweight": np.ascontiguousarray(to_words(matrix.codes, bits).T),
        "qzeros": to_words(zero, bits),
        "scales": matrix.scale.T.astype(FLOAT16),
        "g_idx": linear.runs if matrix.groups is None else matrix.groups,
    }


def _zeros(words: Array, linear: Linear, *, less: int) -> Bytes:
    bits = linear.grid.bits
    zero = from_words(words, bits, linear.out_features).T
    return (zero + np.uint8(less)) & np.uint8((1 << bits) - 1)


def _unpack(parts: Mapping[str, Array], linear: Linear, *, less: int) -> Matrix:
    codes = from_words(parts["qweight"].T, linear.grid.bits, linear.in_features)
    zero = _zeros(parts["qzeros"], linear, less=less)
    return Matrix(codes, parts["scales"].T.astype(np.float32), zero, groups=parts["g_idx"] if linear.ordered else None)


def _lacks(linear: Linear, *, less: int) -> str | None:
    if linear.in_features % _WORD or linear.out_features % _WORD:
        return "sizes that are no multiple of 32"
    if less and not linear.grid.symmetric:
        return "zero points"
    return None


def _write(
    linears: Mapping[str, Linear], kept: Sequence[str], _outside: Sequence[str], *, name: str
) -> tuple[Config, Files]:
    grids = [linear.grid for linear in linears.values()]
    main = max(dict.fromkeys(grids), key=grids.count)
    config: Config = {
        "bits": main.bits,
        "group_size": main.group_size,
        "desc_act": any(linear.ordered for linear in linears.values()),
        "static_groups": False,
        "sym": main.symmetric,
        "true_sequential": True,
        "damp_percent": 0.01,
        "lm_head": False,
        "quant_method": "gptq",
        "checkpoint_format": name,
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"llmc:{__version__}"]},
    }
    # GPTQModel's, which vLLM reads, too: what is otherwise than the rest, and (-:) what is not packed.
    others = {
        f"^{re.escape(module)}$": {"bits": linear.grid.bits, "group_size": linear.grid.group_size}
        for module, linear in linears.items()
        if linear.grid != main
    }
    rules: Config = {f"-:^{re.escape(module)}$": {} for module in kept} | others
    config |= {"dynamic": rules} if rules else {}
    return config, {"quantize_config.json": config}


def _layout(name: str, less: int) -> Layout:
    return Layout(
        name,
        plan,
        functools.partial(_pack, less=less),
        functools.partial(_unpack, less=less),
        functools.partial(_lacks, less=less),
        functools.partial(_write, name=name),
        scale="scales",
        zeros=("qzeros", functools.partial(_zeros, less=less)),
        mixes=True,
        optional=frozenset({"g_idx"}),
        groups="g_idx",
    )


V1, V2 = _layout("gptq", 1), _layout("gptq_v2", 0)


def read(config: Mapping[str, Any], where: object) -> tuple[Layout, Callable[[str], Grid]]:
    """See llmc/converters/packed_import.py.

    Raises:
        UnsupportedModelError: The config says something that this layout has no place for.
    """
    name = config.get("checkpoint_format", config.get("format", "gptq"))
    known = {layout.name: layout for layout in (V1, V2)}
    if name not in known:
        raise UnsupportedModelError(f"{where}: 'checkpoint_format' is {name!r}: llmc reads {', '.join(known)}")
    only(config, "pack_dtype", "int32", "int32", where)
    main = Grid(bits_of(config, "bits", where), group_of(config, where))
    rules = config.get("dynamic") or {}

    def grid(module: str) -> Grid:
        for pattern, other in rules.items():
            if not pattern.startswith("-:") and re.match(pattern.removeprefix("+:"), module):
                merged = {"bits": main.bits, "group_size": main.group_size} | other
                return Grid(bits_of(merged, "bits", where), group_of(merged, where))
        return main

    return known[name], grid


LAYOUTS = (V1, V2)
export = functools.partial(packed_export.export, LAYOUTS)
