"""A low-rank adapter as a server keeps it: what is added to which linears of a model (LoRA, Hu et al. 2021).

    y = x W^T + (x a^T) b               a [rank, in], b [rank, out], in which the scale is already

And how an engine's graph takes adapters, of any number and rank, beside its own weights: those of all adapters lie one
behind the other, and a mask says which of their rows hold for which token.

    lora.<modules>.a  [rank, in]        lora.<modules>.b  [rank, out]           modules: "layers.0.attn.q+k+v"
    lora.mask.<kind>  [tokens, rank]    0 or 1                                  kind: "attn.q+k+v", of all layers

Modules whose product the engine computes as one have one pair, in which each module has rows of its own.

Knows: canonical names. Does not know: whose format an adapter came in (converters/lora.py), nor any runtime.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

_LINEAR = re.compile(r"layers\.(\d+)\.((?:attn|mlp)\.\w+)")


@dataclass(frozen=True, slots=True)
class Adapter:
    """One adapter.

    Attributes:
        name: By which clients ask for it.
        factors: Canonical module ("layers.0.attn.q") -> a and b, see above.
    """

    name: str
    factors: Mapping[str, tuple[Floats, Floats]]


def is_adaptable(module: str) -> bool:
    """Whether an engine takes adapters for a module: the linears of attention and MLP, experts aside."""
    return _LINEAR.fullmatch(module) is not None


def joined(modules: Sequence[str]) -> str:
    """Modules of one input by one name: "layers.0.attn.q+k+v"."""
    first, *others = modules
    return "+".join([first, *(other.rpartition(".")[2] for other in others)])


def separate(name: str) -> list[str]:
    """The inverse of `joined`."""
    first, *others = name.split("+")
    return [first, *(f"{first.rpartition('.')[0]}.{other}" for other in others)]


def kind_of(name: str) -> str:
    """What joined modules are in any layer: "layers.0.attn.q+k+v" -> "attn.q+k+v"."""
    return name.split(".", 2)[2]


def stacked(adapter: Adapter, modules: Sequence[str], outs: Sequence[int], width: int) -> tuple[Floats, Floats]:
    """An adapter's factors of modules whose outputs stand side by side.

    Args:
        outs: Outputs of each module.
        width: Inputs of all of them.

    Returns:
        a [rank, width] and b [rank, sum of outs], the rank being the sum of the modules'; b has zeros where a row's
        module is not.
    """
    parts = [adapter.factors.get(module) for module in modules]
    rank = sum(len(part[0]) for part in parts if part)
    a, b = np.zeros((rank, width), np.float32), np.zeros((rank, sum(outs)), np.float32)
    row = column = 0
    for part, out in zip(parts, outs, strict=True):
        if part:
            count = len(part[0])
            a[row : row + count] = part[0]
            b[row : row + count, column : column + out] = part[1]
            row += count
        column += out
    return a, b
