"""PieceWiseSearch: channels of like size form a piece, and each piece has an alpha, or a scale, of its own.

    pieces    k means of max|x|, from the smallest to the largest
    each      tries s = max|x|^a / max|w|^(1 - a), a = 0.2 ... 0.8, and s = 1, 1.5 ... 5 for all of its channels;
              pieces that wait have what serves all channels best together

The search of PaddleNLP's post-training quantization (its docs/quantization.md, and piecewise_search.py of PaddleSlim,
whose steps of alpha are finer). There, pieces that wait have s = 1, so that the first is searched beside channels that
are still too large, and several pieces can lose more than one; here they lose no more. SmoothQuant's one alpha makes
the few largest channels and all others pay for each other.

Knows: a trial. Does not know: models.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmc.quant.inputs import Trial

_ALPHAS = [0.2 + 0.05 * step for step in range(13)]
_SCALES = [1 + 0.5 * step for step in range(9)]
_ROUNDS = 100  # of k means at most


def search(trial: Trial, count: int) -> Tensor:
    """The scale [channels] of `count` pieces (or of fewer, where channels are fewer or alike)."""
    reach, weight_reach = trial.reach, trial.weight_reach.clamp(min=1e-12)
    tried = [(reach.pow(a) / weight_reach.pow(1 - a)).clamp(1e-5, 1e5) for a in _ALPHAS]
    tried += [torch.full_like(reach, scale) for scale in _SCALES]
    found = min(tried, key=trial.loss)
    for piece in pieces(reach, count) if count > 1 else ():
        found = min((found, *(torch.where(piece, scale, found) for scale in tried)), key=trial.loss)
    return found


def pieces(reach: Tensor, count: int) -> list[Tensor]:
    """Masks of channels, from the smallest to the largest: k means on a line, begun at evenly spaced ranks."""
    ordered = reach.sort().values
    centres = ordered[torch.linspace(0, len(ordered) - 1, min(count, len(ordered))).long()]
    centres = torch.unique(centres)
    for _ in range(_ROUNDS):
        nearest = (reach[:, None] - centres).abs().argmin(1)
        moved = torch.stack([reach[nearest == at].mean() for at in range(len(centres)) if (nearest == at).any()])
        if torch.equal(moved, centres):
            break
        centres = moved
    nearest = (reach[:, None] - centres).abs().argmin(1)
    return [nearest == at for at in range(len(centres)) if (nearest == at).any()]
