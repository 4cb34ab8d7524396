"""What is remembered of the inputs of linears while a text passes a layer: their means, and some of their rows.

Knows: names and rows. Does not know: models, nor which algorithm looks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Observed:
    """Inputs of linears, by name.

    Args:
        every: One row of so many is kept.
    """

    def __init__(self, every: int) -> None:
        self._every = every
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._rows: dict[str, list[Tensor]] = {}

    def see(self, name: str, x: Tensor) -> None:
        """Add a window's inputs [rows, in]."""
        self._sums[name] = self._sums.get(name, torch.zeros(x.shape[1])) + x.abs().sum(0)
        self._counts[name] = self._counts.get(name, 0) + len(x)
        kept = self._rows.setdefault(name, [])
        kept.append(x[len(kept) % self._every :: self._every].clone())

    def rows(self, name: str, every: int = 1) -> Tensor:
        """Those that were kept, or one of so many of them: [some, in].

        They begin with the first in the first window, the second in the second, and so on: a window's first token,
        whose channels can be a thousand times as large as any other's, has no more than its share.
        """
        kept = self._rows[name]
        return torch.cat([rows[at // self._every % every :: every] for at, rows in enumerate(kept)])

    def mean(self, wanted: Sequence[str]) -> Tensor:
        """Mean magnitude of each channel over all inputs of several linears: [in]."""
        total: Tensor = torch.stack([self._sums[name] for name in wanted]).sum(0)
        return total / sum(self._counts[name] for name in wanted)
