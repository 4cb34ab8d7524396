"""Moving a scale per channel from the inputs of linears into what produces them; the function stays the same.

    y = W x = (W s) (x / s)        x / s comes from the source: a norm's weight and bias, or a linear's rows, over s

Knows: smoothing groups (llmc/names.py). Does not know: how scales are chosen.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from llmc.names import SmoothingGroup

_NARROW = {np.dtype(np.float16): torch.float16, np.dtype(ml_dtypes.bfloat16): torch.bfloat16}


def fold(values: dict[str, Tensor], group: SmoothingGroup, scale: Tensor, *, heads: int = 1) -> Tensor:
    """Divide the source by `scale` and multiply the targets' columns by it.

    Args:
        values: float32 tensors by canonical name: the source's weight and bias, the targets' weights; replaced.
        scale: [channels of the source].
        heads: Of a repeated source: it has that many blocks of channels, each of which is repeated as a whole.

    Returns:
        The factor of each of the targets' columns.
    """
    weight = values[f"{group.source}.weight"]
    values[f"{group.source}.weight"] = weight / (scale[:, None] if weight.dim() == 2 else scale)
    if (bias := values.get(f"{group.source}.bias")) is not None:
        values[f"{group.source}.bias"] = bias / scale
    wide = spread(scale, group.repeat, heads)
    for target in group.targets:
        values[f"{target}.weight"] = values[f"{target}.weight"] * wide
    return wide


def spread(scale: Tensor, repeat: int, heads: int) -> Tensor:
    """A vector over a source's channels as one over the targets' columns: each head's block `repeat` times."""
    return scale.view(heads, 1, -1).expand(-1, repeat, -1).flatten() if repeat > 1 else scale


def gather(columns: Tensor, repeat: int, heads: int) -> Tensor:
    """The mean over the columns that one channel feeds: the way back of `spread`."""
    return columns.view(heads, repeat, -1).mean(1).flatten() if repeat > 1 else columns


def largest(columns: Tensor, repeat: int, heads: int) -> Tensor:
    """The largest of the columns that one channel feeds."""
    return columns.view(heads, repeat, -1).amax(1).flatten() if repeat > 1 else columns


def representable(scale: Tensor, source: Tensor, dtype: np.dtype[Any]) -> Tensor:
    """The scale nearest to `scale` by which a source is divided without loss.

    A norm of 16 bits would be rounded by the division; the targets, which are rounded anyhow, can take up the
    difference. A linear before takes any scale, and so does a norm of float32.

    Args:
        scale: [channels of the source].
        source: The weight of a norm [channels], or of a linear [channels, in].
        dtype: What that is stored as.
    """
    if source.dim() == 2 or dtype not in _NARROW:
        return scale
    stored = (source / scale).to(_NARROW[dtype]).float()
    exact = source / stored
    usable = torch.isfinite(exact) & (exact > 0)
    return torch.where(usable, exact, torch.ones_like(scale))
