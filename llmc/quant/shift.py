"""Moving the middle of each channel of an input to zero (Wei et al. 2023, Outlier Suppression+, section 4.1).

    z = (max x + min x) / 2        y = W x + b = W (x - z) + (b + W z)

so that a channel that lies to one side needs half of the range. z is taken from the bias of what stands before, where
that is a norm, or the values that attention mixes (whose weights sum to one), and W z goes into the linears' biases;
where there is none of either, or they are stored in too few bits to take it up, the engine subtracts z. PaddleNLP's
`shift` option does the same, with biases added to norms that have none.

Knows: biases. Does not know: what follows (inputs.py).
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from llmc import names
from llmc.checkpoint import Checkpoint
from llmc.names import SmoothingGroup
from llmc.recipe import QuantRecipe


def folds(checkpoint: Checkpoint, group: SmoothingGroup) -> bool:
    """Whether biases can take up a shift of what the group's linears read."""
    is_sum = group.source.endswith(("norm", ".attn.v"))
    biases = [f"{name}.bias" for name in (group.source, *group.targets)]
    infos = checkpoint.infos
    return is_sum and all(name in infos and infos[name].dtype == np.float32 for name in biases)


def left(checkpoint: Checkpoint, recipe: QuantRecipe) -> list[str]:
    """The linears with rounded inputs whose shift the engine must apply."""
    groups = names.smoothing_groups(checkpoint.spec)
    folded = {target for group in groups if folds(checkpoint, group) for target in group.targets}
    return [matrix for matrix in names.matrices(checkpoint.spec) if recipe.inputs_of(matrix) and matrix not in folded]


def fold(values: dict[str, Tensor], group: SmoothingGroup, centre: Tensor, wide: Tensor) -> None:
    """Move a shift into biases, before any scale is moved.

    Args:
        values: float32 tensors by canonical name; biases are replaced.
        centre: [channels of the source].
        wide: The same, [columns of the targets].
    """
    values[f"{group.source}.bias"] = values[f"{group.source}.bias"] - centre
    for target in group.targets:
        values[f"{target}.bias"] = values[f"{target}.bias"] + values[f"{target}.weight"] @ wide
