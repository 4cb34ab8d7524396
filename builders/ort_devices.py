"""What ONNX Runtime computes on a device: the types to choose from, and what of a checkpoint it has no kernel for.

The tables were read from onnxruntime-gpu 1.31.1: its documentation and the kernels that its library names (docs/cuda.md
has them all). Knows checkpoints. Does not know what this machine has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from llmc import names
from llmc.builders import onnx_linear
from llmc.checkpoint import Checkpoint
from llmc.errors import UserError
from llmc.recipe import BLOCKS
from llmc.spec import Alibi

Compute = Literal["float32", "float16"]
Arithmetic = Literal["int8", "float32", "float16"]

# MatMulNBits' accuracy_level by the arithmetic of quantized products.
ACCURACY_LEVELS: dict[Arithmetic, int] = {
    "int8": onnx_linear.INT8_ARITHMETIC,
    "float32": onnx_linear.FLOAT_ARITHMETIC,
    "float16": onnx_linear.HALF_ARITHMETIC,
}

_UNROUNDED = "quantize with --algo rtn, awq or gptq and without --activations, or build with --device cpu"


@dataclass(frozen=True)
class Device:
    """What engines for a device are made of.

    Attributes:
        compute: The type of activations, scales and whatever else is not packed.
        arithmetics: Of products with quantized weights; the first is the default.
        fused_experts: QMoE takes the experts as they are packed; else they are computed one by one.
        refused: What a checkpoint or an option may ask for (`_asked`) -> why there is none, and what to use instead.
    """

    compute: Compute
    arithmetics: tuple[Arithmetic, ...]
    fused_experts: bool
    refused: Mapping[str, str] = field(default_factory=dict)


def _blocks(multiplied_by: str) -> dict[str, str]:
    return {
        kind: f"has {kind} weights, which {multiplied_by} multiplies: export it for an engine on CUDA that does "
        "(llmc export CHECKPOINT OUT --format modelopt), or quantize for this one with rtn, gptq or awq"
        for kind in BLOCKS
    }


DEVICES = {
    "cpu": Device("float32", ("int8", "float32"), fused_experts=True, refused=_blocks("no CPU kernel of ONNX Runtime")),
    "cuda": Device(
        "float16",
        ("float16",),
        # The operator is there, with experts packed in an order of its own.
        fused_experts=False,
        refused={
            **_blocks("no engine of llmc"),
            "int8 rows": f"has int8 weights in whole rows, whose product (MatMulIntegerToFloat) has no CUDA kernel: "
            f"{_UNROUNDED}",
            "rounded inputs": f"rounds what linears read, and MatMulNBits on CUDA does not: {_UNROUNDED}",
            "fp8 weights": f"has fp8 weights, which this engine would only widen again: {_UNROUNDED}",
            "biased scores, int8 cache": "adds biases to attention scores (ALiBi, or a prefix that sees itself whole), "
            "and GroupQueryAttention on CUDA takes them beside a float16 cache only: build with --kv-cache float16",
            "odd zero points": "has zero points of 4 bits in an odd number of groups of the embedding's rows, which "
            "GatherBlockQuantized on CUDA takes from other rows: quantize with --symmetric or another --group-size",
            "adapters": "is asked to serve adapters, which engines for CUDA do not take yet: merge one with "
            "`llmc convert ADAPTER OUT --base MODEL`, or build with --device cpu",
        },
    ),
}


def arithmetic(device: str, wanted: Arithmetic | None) -> Arithmetic:
    """The arithmetic of quantized products: the one that is wanted, else the device's first.

    Raises:
        UserError: The device has no such.
    """
    known = DEVICES[device].arithmetics
    if wanted is not None and wanted not in known:
        raise UserError(f"--arithmetic {wanted} is not for --device {device}: {' or '.join(known)}")
    return wanted or known[0]


def check(device: str, checkpoint: Checkpoint, *, kv_int8: bool, adapters: bool) -> None:
    """Refuse what a device cannot compute.

    Raises:
        UserError: The device has no kernel for something that the checkpoint or an option asks for.
    """
    refused = DEVICES[device].refused
    for asked in _asked(checkpoint, kv_int8=kv_int8, adapters=adapters):
        if asked in refused:
            raise UserError(f"--device {device}: {checkpoint.folder} {refused[asked]}")


def _asked(checkpoint: Checkpoint, *, kv_int8: bool, adapters: bool) -> Iterator[str]:
    spec, recipe = checkpoint.spec, checkpoint.recipe
    if adapters:
        yield "adapters"
    if kv_int8 and (isinstance(spec.position, Alibi) or spec.prefix):
        yield "biased scores, int8 cache"
    if recipe is None:
        return
    form, (_, width) = recipe.format_of("embed"), names.tensors(spec)["embed.weight"]
    if form and (form.kind, form.bits, form.symmetric) == ("int", 4, False) and form.groups(width) % 2:
        yield "odd zero points"
    for matrix in names.matrices(spec):
        form = recipe.format_of(matrix)
        if form and form.blocks:
            yield form.kind
        elif form and form.kind == "fp8":
            yield "fp8 weights"
        elif form and form.group_size == 0:
            yield "int8 rows"
        elif form and recipe.inputs_of(matrix):
            yield "rounded inputs"
