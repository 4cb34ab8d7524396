"""The gate: what a result must hold, and more bits when it does not.

Knows: verdicts. Does not know: how a verdict is reached (llmc/evaluate/quality.py), which parts get more bits
(mixed.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from llmc.checkpoint import Checkpoint
from llmc.errors import GateError
from llmc.quant.mixed import Mix
from llmc.recipe import QuantRecipe
from llmc.runtime import Tokens


class Verdict(Protocol):
    """What was measured of a result.

    Attributes:
        increase: Of the perplexity, as a share of the original's.
    """

    @property
    def increase(self) -> float: ...

    def figures(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        ...


# (the original, a result) -> what was measured
Judge = Callable[[Checkpoint, Checkpoint], Verdict]

# (the original, a result, a text) -> part of the model -> what quantizing it alone costs: KL in nats
Probe = Callable[[Checkpoint, Checkpoint, Sequence[Tokens]], Mapping[str, float]]

# Tokens that are probed in one window, and windows.
PROBED = 128, 4


def probes(windows: Sequence[Tokens]) -> list[Tokens]:
    """The beginnings of a few windows, spread over a text: each costs a walk for every part of the model."""
    length, count = PROBED
    every = max(1, len(windows) // count)
    return [window[:length] for window in windows[::every][:count]]


def refine(mix: Mix, verdict: Verdict, limit: float) -> QuantRecipe:
    """More bits for the parts that cost most for their size, as many as the increase seems to need.

    Raises:
        GateError: Nothing is left that is quantized, or could have more bits.
    """
    recipe = mix.reduce(limit / verdict.increase)
    if recipe is None:
        raise GateError(
            f"perplexity rises by {verdict.increase:.2%}, {limit:.2%} is allowed, and with more bits nothing would be "
            "left that is quantized: nothing was written. Choose smaller groups, keep matrices (--keep), or calibrate "
            "on more text"
        )
    return recipe
