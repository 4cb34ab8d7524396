"""`w8a8` and `fp8`: weights to nearest, inputs rounded by a scale that every token has, or that all share.

    dynamic     nothing to find out: llmc/quant/rtn.py
    static      scale = the largest input of the calibration text / the largest code

The figures of nvidia-modelopt's INT8_DEFAULT_CFG and FP8_DEFAULT_CFG (static), and of FP8_PER_CHANNEL_PER_TOKEN_CFG.
"""

from __future__ import annotations

from collections.abc import Sequence

from llmc.checkpoint import Checkpoint
from llmc.config import Strict
from llmc.quant import rtn
from llmc.quant.algorithm import Transform
from llmc.recipe import QuantRecipe
from llmc.runtime import Tokens

CALIBRATES = False  # unless static


class Options(Strict):
    """There is nothing to choose."""


def prepare(checkpoint: Checkpoint, recipe: QuantRecipe, windows: Sequence[Tokens]) -> Transform:
    """See llmc/quant/algorithm.py."""
    if recipe.activations is None or recipe.activations.dynamic:
        return rtn.prepare()
    from llmc.quant.by_layer import ByLayer  # and with it PyTorch, which dynamic scales do not need
    from llmc.quant.inputs import ByInputs

    return ByLayer(checkpoint, recipe, windows, ByInputs(checkpoint, recipe, windows))
