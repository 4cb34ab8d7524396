"""Sums of products of inputs, and the error that they give to a rounded matrix.

    gram = X^T X                     X: all inputs of a linear, [tokens, in]
    |X W^T - X W'^T|^2 = tr((W - W') gram (W - W')^T)

so the loss on any amount of text costs the same once the gram matrix is there. Frantar et al. 2022 call 2 X^T X the
Hessian. Groups of columns have gram matrices of their own on the diagonal.

Knows: arithmetic. Does not know: models.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llmc.quant import pack
from llmc.quant.pack import Packed
from llmc.recipe import WeightFormat

_BLOCK = 512


class Grams:
    """Gram matrices by name, float32 [in, in], summed as inputs come.

    They are symmetric: what is summed is their upper triangle, in blocks of columns, which is half of the work.
    """

    def __init__(self) -> None:
        self._upper: dict[str, Tensor] = {}

    def see(self, name: str, x: Tensor) -> None:
        """Add inputs [rows, in]."""
        columns = x.shape[1]
        if name not in self._upper:
            self._upper[name] = torch.zeros(columns, columns)
        for start in range(0, columns, _BLOCK):
            block = slice(start, start + _BLOCK)
            self._upper[name][block, start:].addmm_(x[:, block].T, x[:, start:])

    def take(self, name: str) -> Tensor:
        """A sum, which is forgotten."""
        found = self._upper.pop(name)
        for start in range(0, len(found), _BLOCK):
            block, rest = slice(start, start + _BLOCK), slice(start + _BLOCK, None)
            found[rest, block] = found[block, rest].T
            # Which was summed as a whole, and may differ in its last bits.
            found[block, block] = found[block, block].triu() + found[block, block].triu(1).T
        return found


def energy(weight: Tensor, gram: Tensor) -> float:
    """|X W^T|^2, some rows at a time."""
    return math.fsum(float(torch.sum((rows @ gram) * rows, dtype=torch.float64)) for rows in torch.split(weight, 4096))


def values_of(packed: Packed, form: WeightFormat, columns: int) -> Tensor:
    """What a packed matrix stands for."""
    return torch.from_numpy(pack.dequantize(packed.qweight, packed.scale, packed.zero, form, columns))


def grouped(matrix: Tensor, size: int) -> Tensor:
    """[rows, columns] -> [rows, groups, size], the last group filled with zeros; size 0 is a whole row."""
    size = size or matrix.shape[1]
    missing = -matrix.shape[1] % size
    return torch.nn.functional.pad(matrix, (0, missing)).view(len(matrix), -1, size)


def diagonal_blocks(gram: Tensor, size: int) -> Tensor:
    """The gram matrices of groups of `size` columns: [groups, size, size], filled with zeros."""
    missing = -len(gram) % size
    padded = torch.nn.functional.pad(gram, (0, missing, 0, missing))
    starts = range(0, len(padded), size)
    return torch.stack([padded[at : at + size, at : at + size] for at in starts])
