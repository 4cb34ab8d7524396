"""SmoothQuant (Xiao et al. 2023): large channels of an input are made smaller, and the weights that meet them larger.

    s = max|x|^a / max|w|^(1 - a)        y = (x / s) (W s)

a is one number, or for each site (inputs.py) the one of a grid that loses least of the outputs when inputs and weights
are rounded; a scale of one is always tried, too. With `pieces` the search is that of piecewise.py, with `shift` each
channel is centred first (shift.py). Scales move into the norm or the linear before; where there is none that can take
them, the engine multiplies: so every linear is smoothed.

For a given alpha these are the scales of nvidia-modelopt's INT8_SMOOTHQUANT_CFG, of which all linears that read the
same input share one, as its exporter makes them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import NonNegativeInt, PositiveInt, field_validator
from torch import Tensor

from llmc import names
from llmc.checkpoint import Checkpoint
from llmc.config import Strict
from llmc.errors import UserError
from llmc.quant import piecewise, shift
from llmc.quant.algorithm import Transform
from llmc.quant.by_layer import ByLayer
from llmc.quant.inputs import ByInputs, Trial
from llmc.recipe import QuantRecipe
from llmc.runtime import Tokens

CALIBRATES = True


class Options(Strict):
    """What may be chosen.

    Attributes:
        alpha: Between 0 (the weights decide) and 1 (the inputs do), or "search".
        steps: Of the grid of alphas.
        shift: Centre each channel first.
        pieces: Of channels of like size, each with an alpha or a scale of its own; 0 for one alpha for all.
    """

    alpha: float | str = "search"
    steps: PositiveInt = 20
    shift: bool = False
    pieces: NonNegativeInt = 0

    @field_validator("alpha")
    @classmethod
    def _is_a_share(cls, alpha: float | str) -> float | str:
        if alpha != "search" and not (isinstance(alpha, float) and 0 <= alpha <= 1):
            raise ValueError("a number from 0 to 1, or search")
        return alpha


def complete(checkpoint: Checkpoint, recipe: QuantRecipe) -> QuantRecipe:
    """The recipe with the inputs that the engine multiplies or shifts.

    Raises:
        UserError: It rounds no inputs to int8.
    """
    if recipe.activations is None or recipe.activations.kind != "int8":
        raise UserError("smoothquant makes inputs easier to round to int8: choose dynamic or static activations")
    options = Options(**recipe.options)
    folded = {target for group in names.smoothing_groups(checkpoint.spec) for target in group.targets}
    rounded = [matrix for matrix in names.matrices(checkpoint.spec) if recipe.inputs_of(matrix)]
    update = {"multiplied": tuple(names.kinds(matrix for matrix in rounded if matrix not in folded))}
    if options.shift:
        update["shifted"] = tuple(names.kinds(shift.left(checkpoint, recipe)))
    return recipe.model_copy(update=update)


def prepare(checkpoint: Checkpoint, recipe: QuantRecipe, windows: Sequence[Tokens]) -> Transform:
    """See llmc/quant/algorithm.py."""
    options = Options(**recipe.options)

    def choose(trial: Trial) -> Tensor:
        if options.pieces:
            return piecewise.search(trial, options.pieces)
        if isinstance(options.alpha, float):
            return smooth(trial.reach, trial.weight_reach, options.alpha)
        return search(trial, options.steps)

    return ByLayer(checkpoint, recipe, windows, ByInputs(checkpoint, recipe, windows, choose, centred=options.shift))


def smooth(reach: Tensor, weight_reach: Tensor, alpha: float) -> Tensor:
    """The formula above; channels that are always zero keep their scale."""
    scale = (reach.pow(alpha) / weight_reach.pow(1 - alpha)).clamp(1e-4, 1e4)
    return torch.where(reach > 2**-31, scale, torch.ones_like(scale))


def search(trial: Trial, steps: int) -> Tensor:
    """The scale of the grid that loses least."""
    weight_reach = trial.weight_reach
    scales = [torch.ones_like(trial.reach)]
    scales += [smooth(trial.reach, weight_reach, step / steps) for step in range(steps + 1)]
    return min(scales, key=trial.loss)
