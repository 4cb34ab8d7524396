"""Linears that read rounded inputs, as a quantized engine does: the definition of every format of activations.

    x ── [- input_shift] ── [* input_multiply] ── code = round(x / scale) ── code * scale ── W^T ── + bias ──►

    scale     static: M.input_scale          dynamic: a token's largest magnitude / the largest code

Codes are -128 to 127, or float8 e4m3.

Knows: recipes, checkpoints, one linear. Does not know: what stands around it (llmc/model.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from llmc.checkpoint import Checkpoint
from llmc.recipe import ActivationFormat

HIGHEST = {"int8": 127.0, "fp8": 448.0}

# A token of zeros has this scale, which keeps divisions finite.
SMALLEST = 1e-20


@dataclass(frozen=True, slots=True)
class Rounding:
    """What becomes of a linear's input.

    Attributes:
        group: Inputs that share a dynamic scale, 0 for all of a token.
        scale: float32 [1], None where it is dynamic.
        shift, multiply: float32 [in].
        bias: float32 [out], what the shift takes from the outputs.
    """

    form: ActivationFormat
    group: int = 0
    scale: Tensor | None = None
    shift: Tensor | None = None
    multiply: Tensor | None = None
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Inputs [..., in] as the products see them."""
        if self.shift is not None:
            x = x - self.shift
        if self.multiply is not None:
            x = x * self.multiply
        if self.scale is not None:
            return rounded(x, self.scale, self.form)
        width = self.group or x.shape[-1]
        padded = functional.pad(x, (0, -x.shape[-1] % width))
        groups = padded.view(*x.shape[:-1], padded.shape[-1] // width, width)
        scale = groups.abs().amax(-1, keepdim=True) * (1 / HIGHEST[self.form.kind])
        return rounded(groups, scale.clamp(min=SMALLEST), self.form).flatten(-2)[..., : x.shape[-1]]


def rounded(x: Tensor, scale: Tensor, form: ActivationFormat) -> Tensor:
    """The values nearest to x that have a code."""
    codes = x / scale
    if form.kind == "int8":
        return codes.round().clamp(-128, 127) * scale
    return codes.clamp(-HIGHEST["fp8"], HIGHEST["fp8"]).to(torch.float8_e4m3fn).to(x.dtype) * scale


class Linear(nn.Linear):
    """x W^T + b, of rounded inputs where `rounding` is set."""

    rounding: Rounding | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]"""
        if self.rounding is None:
            return super().forward(x)
        y = functional.linear(self.rounding(x), self.weight, self.bias)
        return y if self.rounding.bias is None else y + self.rounding.bias


def read(checkpoint: Checkpoint, matrices: Iterable[str]) -> dict[str, Rounding]:
    """The roundings of those matrices that have one."""
    recipe, found = checkpoint.recipe, {}
    for matrix in matrices if recipe and recipe.activations else ():
        form, weights = (recipe.inputs_of(matrix), recipe.format_of(matrix)) if recipe else (None, None)
        if form is None or weights is None:
            continue
        kinds = {"scale": "input_scale", "shift": "input_shift", "multiply": "input_multiply", "bias": "input_bias"}
        stored = {
            name: torch.from_numpy(checkpoint[f"{matrix}.{kind}"])
            for name, kind in kinds.items()
            if f"{matrix}.{kind}" in checkpoint
        }
        found[matrix] = Rounding(form, weights.group_size if form.kind == "int8" else 0, **stored)
    return found
