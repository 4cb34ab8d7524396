"""GPTQ (Frantar et al. 2022): columns are rounded one after another, and what each loses the rest make up for.

    H = X^T X + damping * mean(diag) * 1             H^-1 = U^T U, U upper triangular
    for column i:   e = (w_i - round(w_i)) / U_ii    w_j -= e U_ij for all j > i

in blocks, so that columns beyond a block are updated once, by a product of matrices (their section 3.3). U comes from
one Cholesky factorisation of H with rows and columns reversed and one triangular inverse: H = R R^T with R upper
triangular, so H^-1 = R^-T R^-1.

Layers see the text as the quantized layers before them pass it on. Groups take their scales from the columns as they
are when the group's turn comes; with `act_order`, where columns come by their size in the text and a group's are
scattered, from the original ones. The embedding is rounded to nearest: it has no inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated

import numpy as np
import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from llmc.checkpoint import Checkpoint
from llmc.config import Strict
from llmc.layerwise import States, replace
from llmc.quant import scales
from llmc.quant.algorithm import Transform
from llmc.quant.by_layer import ByLayer, Found, Part
from llmc.quant.gram import Grams, diagonal_blocks, energy, grouped, values_of
from llmc.quant.pack import Packed
from llmc.quant.scales import Grid
from llmc.recipe import QuantRecipe, WeightFormat
from llmc.runtime import Tokens

CALIBRATES = True

# Columns worked on together; a multiple or a divisor of every group size.
_BLOCK = 128

# Rows worked on together.
_ROWS = 2048


class Options(Strict):
    """What may be chosen.

    Attributes:
        damping: Added to the diagonal, as a share of its mean.
        act_order: Columns with the largest inputs first.
        search: Search each group's scale for the least error, instead of taking it from the extremes.
    """

    damping: Annotated[PositiveFloat, Field(le=1)] = 0.01
    act_order: bool = True
    search: bool = True


def prepare(checkpoint: Checkpoint, recipe: QuantRecipe, windows: Sequence[Tokens]) -> Transform:
    """See llmc/quant/algorithm.py."""
    return ByLayer(checkpoint, recipe, windows, Gptq(Options(**recipe.options)))


class Gptq:
    """A Method of llmc/quant/by_layer.py."""

    def __init__(self, options: Options) -> None:
        self.options = options

    def layer(self, part: Part) -> Found:
        """See Method."""
        grams = Grams()
        leaders = part.walker.observe(part.name, part.layer, part.states, part.formats, grams.see)
        found: Found = {}
        # An expert that met no token has nothing to go by: it is rounded to nearest.
        for leader in dict.fromkeys(leaders.values()):
            alike = [matrix for matrix in part.formats if leaders.get(matrix) == leader]
            linears = {f"{matrix}.weight": (part.weight(matrix), part.formats[matrix]) for matrix in alike}
            found.update(solve(linears, grams.take(leader), self.options))
        values = {
            name: values_of(packed, part.formats[name.removesuffix(".weight")], part.weight(name[:-7]).shape[1])
            for name, packed in found.items()
            if isinstance(packed, Packed)
        }
        replace(part.layer, part.name, values)
        part.walker.advance(part.layer, part.states)
        return found

    def head(self, matrix: str, weight: Tensor, states: Sequence[Tensor] | States, form: WeightFormat) -> Packed:
        """See Method."""
        grams = Grams()
        for state in states:
            grams.see(matrix, state.flatten(0, -2))
        return solve({matrix: (weight, form)}, grams.take(matrix), self.options)[matrix]


def solve(linears: Mapping[str, tuple[Tensor, WeightFormat]], gram: Tensor, options: Options) -> dict[str, Packed]:
    """Quantize matrices that read the same inputs.

    Args:
        linears: Name -> float32 [out, in], and its format.
        gram: float32 [in, in], of the inputs; used up, since with 11,008 of them each copy is as large as a layer.
    """
    wholes = {name: energy(weight, gram) for name, (weight, _) in linears.items()}
    solver = _Solver(gram, {form.group_size for _, form in linears.values()}, options)
    return {name: solver.matrix(weight, form, wholes[name]) for name, (weight, form) in linears.items()}


class _Solver:
    """What all rows of all matrices share. It uses up the gram matrix."""

    def __init__(self, gram: Tensor, sizes: Iterable[int], options: Options) -> None:
        self.act_order = options.act_order
        importance = gram.diagonal().clone()
        self.never = importance == 0
        self.order = torch.arange(len(gram))
        if self.act_order:
            self.order = importance.argsort(descending=True, stable=True)
        self.blocks = {size: diagonal_blocks(gram, size) for size in sizes} if options.search else {}
        damped = dampen(rearrange(gram, self.order), options.damping)
        self.added = float((damped.diagonal() - importance[self.order]).min())
        self.factor = inverse_factor(damped)

    def matrix(self, weight: Tensor, form: WeightFormat, whole: float) -> Packed:
        """A matrix, some thousand rows at a time: what a row loses is made up for in the same row.

        Args:
            whole: |X W^T|^2.
        """
        pieces, losses = zip(*(self.rows(rows, form) for rows in torch.split(weight, _ROWS)), strict=True)
        zeros = [piece.zero for piece in pieces if piece.zero is not None]
        return Packed(
            np.concatenate([piece.qweight for piece in pieces]),
            np.concatenate([piece.scale for piece in pieces]),
            np.concatenate(zeros) if zeros else None,
            error=math.sqrt(max(sum(losses), 0.0) / whole) if whole > 0 else 0.0,
        )

    def rows(self, weight: Tensor, form: WeightFormat) -> tuple[Packed, float]:
        """Some rows [some, in], and tr((W - W') gram (W - W')^T)."""
        (count, columns), size = weight.shape, form.group_size
        weight = weight.masked_fill(self.never, 0)  # what is never met may as well cost nothing
        empty = torch.ones(count, form.groups(columns))
        grid = self._grid(weight, form, slice(None)) if self.act_order else Grid(empty, empty.clone(), 2**form.bits - 1)

        def begin(column: int, rest: Tensor) -> None:
            """At the beginning of a group whose grid is open: from its columns [size, some] as they are now."""
            if column % size == 0 and not self.act_order:
                group = column // size
                found = self._grid(rest[:size].T, form, slice(group, group + 1))
                grid.scale[:, group], grid.zero[:, group] = found.scale[:, 0], found.zero[:, 0]

        groups = (self.order // size).tolist()
        codes, loss = _solve(weight.T[self.order].contiguous(), self.factor, grid, groups, begin)
        # Padding has the code of zero.
        stored = grid.zero[:, :, None].repeat(1, 1, size).flatten(1)
        stored[:, self.order] = codes.T
        packed = scales.packed(stored, grid, form)
        # The sum of e^2 is what was lost, and the damping's part in it.
        lost = values_of(packed, form, columns).sub_(weight)
        return packed, loss - self.added * float(lost.square().sum(dtype=torch.float64))

    def _grid(self, values: Tensor, form: WeightFormat, group: slice) -> Grid:
        groups = grouped(values, form.group_size)
        if not self.blocks:
            return scales.from_extremes(groups, form)
        return scales.searched(groups, form, self.blocks[form.group_size][group])


def dampen(gram: Tensor, damping: float) -> Tensor:
    """Make H of a gram matrix, in place, to which even channels that never came have something to say."""
    diagonal = gram.diagonal()
    diagonal[diagonal == 0] = diagonal.mean().clamp(min=1e-6)
    diagonal += damping * diagonal.mean()
    return gram


def rearrange(matrix: Tensor, order: Tensor) -> Tensor:
    """Put the rows and columns of a square matrix into another order, in place."""
    for rows in torch.split(matrix, _BLOCK):
        rows.copy_(rows[:, order])
    for columns in torch.split(matrix, _BLOCK, dim=1):
        columns.copy_(columns[order])
    return matrix


def inverse_factor(damped: Tensor) -> Tensor:
    """The upper triangular U with U^T U = H^-1, in the place of H."""
    backwards = torch.arange(len(damped) - 1, -1, -1)
    rearrange(damped, backwards)
    # LAPACK writes columns, so the transpose, which H is of itself, is what it can write into.
    torch.linalg.cholesky(damped.T, out=damped.T)
    return rearrange(invert_upper(damped), backwards).T


def invert_upper(matrix: Tensor) -> Tensor:
    """Invert an upper triangular matrix in place: [[A, B], [0, C]] to [[A^-1, -A^-1 B C^-1], [0, C^-1]]."""
    size = len(matrix)
    if size <= 256:
        return matrix.copy_(torch.linalg.solve_triangular(matrix, torch.eye(size, dtype=matrix.dtype), upper=True))
    half = size // 2
    first, last, beside = matrix[:half, :half], matrix[half:, half:], matrix[:half, half:]
    beside.copy_((invert_upper(first) @ beside) @ invert_upper(last)).neg_()
    return matrix


def _solve(
    work: Tensor, factor: Tensor, grid: Grid, group_of: list[int], begin: Callable[[int, Tensor], None]
) -> tuple[Tensor, float]:
    """Round columns in the order in which they lie in `work` [in, out], which is used up.

    Returns:
        Codes, float32 [in, out], and the sum of e^2, which is tr((W - W') H (W - W')^T).
    """
    columns, loss = len(work), 0.0
    codes = torch.empty_like(work)
    for start in range(0, columns, _BLOCK):
        end = min(start + _BLOCK, columns)
        lost = torch.empty_like(work[start:end])
        for column in range(start, end):
            begin(column, work[column:])
            scale, zero = grid.scale[:, group_of[column]], grid.zero[:, group_of[column]]
            torch.div(work[column], scale, out=codes[column])
            codes[column].round_().add_(zero).clamp_(0, grid.highest)
            error = lost[column - start]
            torch.sub(codes[column], zero, out=error).mul_(scale).sub_(work[column]).div_(-factor[column, column])
            work[column + 1 : end].addr_(factor[column, column + 1 : end], error, alpha=-1)
        work[end:].addmm_(factor[start:end, end:].T, lost, alpha=-1)
        loss += float(lost.square().sum(dtype=torch.float64))
    return codes, loss
