"""What a quantization algorithm is: one module of llmc/quant, one row in the table below.

It decides what every tensor becomes; llmc/quant/quantize.py does the rest. See docs/adding-an-algorithm.md.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Protocol, cast

from llmc.checkpoint import Checkpoint
from llmc.config import Strict
from llmc.errors import UserError
from llmc.need import installed
from llmc.quant.pack import Packed
from llmc.recipe import BLOCKS, QuantRecipe, WeightFormat
from llmc.runtime import Tokens
from llmc.tensors import Array

# name -> module under llmc.quant
ALGORITHMS = {
    "rtn": "rtn",
    "gptq": "gptq",
    "awq": "awq",
    "w8a8": "scaled",
    "smoothquant": "smoothquant",
    "fp8": "scaled",
    **dict.fromkeys(BLOCKS, "block_float"),
}

# Those that know rows as well as groups, and those that find static scales of activations.
_ROWS = {"rtn", "w8a8", "smoothquant", "fp8"}
_STATIC = {"w8a8", "smoothquant", "fp8"}

# Of the same kind as some above, and not offered -> what is nearest.
_REFUSED = {
    "mxfp6": "mxfp8 or mxfp4 where CUDA is, else fp8 (8 bits stored, computed in float32) or gptq with 8 bits",
    "mxint8": "rtn with 8 bits in groups of 32, whose scales are not only powers of two",
    "nvfp4_awq": "nvfp4 where CUDA is, else awq with 4 bits",
}
_ON_CPU = (
    "w8a8 or smoothquant (int8 products), fp8 (8 bits stored, computed in float32), or rtn, gptq or awq with 4 bits"
)

# (canonical name, values, format) -> Packed where there is a format, else the values to keep. Called once for each
# tensor of the model, in canonical order.
Transform = Callable[[str, Array, WeightFormat | None], "Packed | Array"]


class Algorithm(Protocol):
    """The face of such a module.

    Attributes:
        CALIBRATES: It needs text whatever the recipe says (static activations need it always).
        Options: What `QuantRecipe.options` may hold.
    """

    CALIBRATES: bool
    Options: type[Strict]

    # A module may also have `complete(checkpoint, recipe) -> QuantRecipe`, which adds what it will do to inputs.

    def prepare(self, checkpoint: Checkpoint, recipe: QuantRecipe, windows: Sequence[Tokens]) -> Transform:
        """Find out what there is to know before the first tensor is transformed.

        Args:
            windows: Calibration text, int64 [tokens] each; empty for an algorithm that does not calibrate.
        """
        ...


def algorithm(name: str) -> Algorithm:
    """The algorithm of that name.

    Raises:
        UserError: There is none, or what comes of it runs on CUDA alone and there is no CUDA device.
    """
    if name in _REFUSED:
        raise UserError(f"llmc does not have {name}: choose {_REFUSED[name]}", param="algo")
    if name in BLOCKS and not has_cuda():
        raise UserError(
            f"{name} is for CUDA, and PyTorch sees no CUDA device: ONNX Runtime has no CPU kernel that multiplies "
            f"such weights, so no engine on this machine could run what comes of it. Choose {_ON_CPU}",
            param="algo",
        )
    if name not in ALGORITHMS:
        raise UserError(f"there is no algorithm '{name}'; there are {', '.join(ALGORITHMS)}", param="algo")
    return cast(Algorithm, importlib.import_module(f"llmc.quant.{ALGORITHMS[name]}"))


def has_cuda() -> bool:
    """Whether PyTorch is installed and sees a CUDA device."""
    if not installed("torch"):
        return False
    import torch

    return torch.cuda.is_available()


def check_formats(recipe: QuantRecipe) -> None:
    """Refuse a recipe whose formats its algorithm cannot choose values for.

    Raises:
        UserError: Naming those that can.
    """
    name, activations = recipe.algorithm, recipe.activations
    forms = [form for form in (recipe.weights, *recipe.overrides.values()) if form]
    if others := {form.kind for form in forms if form.blocks and form.kind != name}:
        raise UserError(f"{name} chooses no values of {', '.join(sorted(others))}: the algorithm of that name does")
    if any(form.group_size == 0 for form in forms) and name not in _ROWS:
        raise UserError(f"{name} needs a group size: scales for whole rows go with {', '.join(sorted(_ROWS))}")
    if activations and not activations.dynamic and name not in _STATIC:
        raise UserError(
            f"{name} finds no static scales of activations: {', '.join(sorted(_STATIC))} do, or use dynamic"
        )
