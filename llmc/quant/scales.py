"""Scales and zero points of groups: from their extremes, or from a search that clips extremes where that serves.

    code = clip(round(w / scale) + zero, 0, 2^bits - 1)

A search tries ranges shrunk to `1, 1 - 1/20, ..., 1/2` of the group's own. `searched` keeps for each group of each row
the one with the least error of its share of the output (Lin et al. 2023, AWQ, appendix on clipping). But what clipping
takes has the sign of what it is taken from, so these errors add up in the whole output; `together` looks at that.

Knows: groups. Does not know: which algorithm asks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llmc.quant.gram import grouped
from llmc.quant.pack import Packed, pack_codes
from llmc.recipe import WeightFormat

_NARROWEST = 1e-30
_SHRINKS = [1 - step / 20 for step in range(11)]
_MOST = 1.25  # by which scales are multiplied for the outputs' size
_BLOCK = 1 << 22  # values searched at a time
_ROWS = 2048  # of a matrix, searched together


@dataclass(frozen=True, slots=True)
class Grid:
    """What groups may be rounded to.

    Attributes:
        scale, zero: float32 [rows, groups]; zero is whole.
    """

    scale: Tensor
    zero: Tensor
    highest: int

    def codes(self, values: Tensor) -> Tensor:
        """float32 codes of values [rows, groups, size]."""
        return values.div(self.scale[..., None]).round_().add_(self.zero[..., None]).clamp_(0, self.highest)

    def rounded(self, values: Tensor) -> Tensor:
        """What the codes of values [rows, groups, size] stand for."""
        return self.codes(values).sub_(self.zero[..., None]).mul_(self.scale[..., None])


def from_extremes(values: Tensor, form: WeightFormat, shrink: float = 1.0) -> Grid:
    """The grid of groups [rows, groups, size], as in rtn.py, over a part of their range."""
    highest = 2**form.bits - 1
    if form.symmetric:
        span, steps = values.abs().amax(-1) * shrink, highest // 2
        zero = torch.full_like(span, highest // 2 + 1)
    else:
        low, high = values.amin(-1).clamp(max=0) * shrink, values.amax(-1).clamp(min=0) * shrink
        span, steps = high - low, highest
        zero = (-low * (steps / span.clamp(min=_NARROWEST))).round_().clamp_(0, highest)
    scale = torch.where(span > _NARROWEST, span / steps, torch.ones_like(span))
    return Grid(scale, zero, highest)


def nearest(weight: Tensor, form: WeightFormat) -> Tensor:
    """A matrix rounded to nearest, as values."""
    groups = grouped(weight, form.group_size)
    return from_extremes(groups, form).rounded(groups).flatten(1)[:, : weight.shape[1]]


def searched(values: Tensor, form: WeightFormat, grams: Tensor) -> Grid:
    """The grid with the least output error of each group.

    Args:
        values: [rows, groups, size].
        grams: [groups, size, size], see `gram.diagonal_blocks`.
    """
    rows = max(1, _BLOCK // values[0].numel())
    found = [_search(block, form, grams) for block in torch.split(values, rows)]
    return Grid(torch.cat([x.scale for x in found]), torch.cat([x.zero for x in found]), found[0].highest)


def _search(values: Tensor, form: WeightFormat, grams: Tensor, beside: Tensor | None = None) -> Grid:
    best = from_extremes(values, form)
    least = _errors(values, best, grams, beside)
    for shrink in _SHRINKS[1:]:
        grid = from_extremes(values, form, shrink)
        errors = _errors(values, grid, grams, beside)
        better = errors < least
        least = torch.where(better, errors, least)
        best = Grid(
            torch.where(better, grid.scale, best.scale), torch.where(better, grid.zero, best.zero), grid.highest
        )
    return best


def _errors(values: Tensor, grid: Grid, grams: Tensor, beside: Tensor | None) -> Tensor:
    """What each group [rows, groups] adds to |missing|^2, the error of the output.

    Args:
        beside: missing^T x [rows, groups, size] of the output without the group; None where that is nothing.
    """
    lost = grid.rounded(values).sub_(values).transpose(0, 1)  # [groups, rows, size]
    products = torch.bmm(lost, grams)
    if beside is not None:
        products.add_(beside.transpose(0, 1), alpha=2)
    return products.mul_(lost).sum(-1).T


def together(values: Tensor, form: WeightFormat, rows: Tensor) -> tuple[Tensor, Grid]:
    """Codes, uint8 [rows, groups, size], with a small error of the whole output, and what they stand for.

    Groups are taken in their order, each with the range that is best beside what all others lose at that moment. Then
    a row's scales are multiplied by <y, y> / <y, y'>, so that on the whole y' is as large as y: the least error is
    that of an output which is too small, and layers that follow each other multiply what is missing.

    Args:
        values: [rows, groups, size].
        rows: What the matrix reads, [some, groups, size].
    """
    codes = torch.empty(values.shape, dtype=torch.uint8)
    blocks = zip(torch.split(values, _ROWS), torch.split(codes, _ROWS), strict=True)
    grids = [_together(some, form, rows, out) for some, out in blocks]
    return codes, Grid(torch.cat([x.scale for x in grids]), torch.cat([x.zero for x in grids]), grids[0].highest)


def _together(values: Tensor, form: WeightFormat, rows: Tensor, codes: Tensor) -> Grid:
    best = from_extremes(values, form)
    missing = rows.flatten(1) @ best.rounded(values).sub_(values).flatten(1).T  # [some, rows]: the error of the output
    for group in range(values.shape[1]):
        x, own = rows[:, group], values[:, group : group + 1]
        before = Grid(best.scale[:, group, None], best.zero[:, group, None], best.highest)
        missing.addmm_(x, before.rounded(own).sub_(own)[:, 0].T, alpha=-1)
        found = _search(own, form, (x.T @ x)[None], (missing.T @ x)[:, None])
        missing.addmm_(x, found.rounded(own).sub_(own)[:, 0].T)
        best.scale[:, group], best.zero[:, group] = found.scale[:, 0], found.zero[:, 0]
    whole = rows.flatten(1) @ values.flatten(1).T
    ratio = whole.square().sum(0) / missing.add_(whole).mul_(whole).sum(0)
    usable = (ratio > 1 / _MOST) & (ratio < _MOST)  # not of a row whose outputs are all but zero
    codes.copy_(best.codes(values))  # which would be others with the scales that they get
    best.scale.mul_(torch.where(usable, ratio, torch.ones_like(ratio))[:, None])
    return best


def packed(codes: Tensor, grid: Grid, form: WeightFormat, error: float | None = None) -> Packed:
    """Codes [rows, groups * size] as they are stored."""
    as_bytes = codes.to(torch.uint8).contiguous().numpy()
    zero = None if form.symmetric else pack_codes(grid.zero.to(torch.uint8).contiguous().numpy(), form.bits)
    scale = np.ascontiguousarray(grid.scale.numpy())
    return Packed(pack_codes(as_bytes, form.bits), scale, zero, error)
