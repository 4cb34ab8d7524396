"""What a quantization algorithm is: one module of llmc/quant, one row in the table below.

It decides what every tensor becomes; llmc/quant/quantize.py does the rest. See docs/adding-an-algorithm.md.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Protocol, cast

from llmc.checkpoint import Checkpoint
from llmc.config import Strict
from llmc.errors import UserError
from llmc.quant.pack import Packed
from llmc.recipe import QuantRecipe, WeightFormat
from llmc.runtime import Tokens
from llmc.tensors import Array

# name -> module under llmc.quant
ALGORITHMS = {"rtn": "rtn", "gptq": "gptq", "awq": "awq"}

# (canonical name, values, format) -> Packed where there is a format, else the values to keep. Called once for each
# tensor of the model, in canonical order.
Transform = Callable[[str, Array, WeightFormat | None], "Packed | Array"]


class Algorithm(Protocol):
    """The face of such a module.

    Attributes:
        CALIBRATES: It needs text.
        Options: What `QuantRecipe.options` may hold.
    """

    CALIBRATES: bool
    Options: type[Strict]

    def prepare(self, checkpoint: Checkpoint, recipe: QuantRecipe, windows: Sequence[Tokens]) -> Transform:
        """Find out what there is to know before the first tensor is transformed.

        Args:
            windows: Calibration text, int64 [tokens] each; empty for an algorithm that does not calibrate.
        """
        ...


def algorithm(name: str) -> Algorithm:
    """The algorithm of that name.

    Raises:
        UserError: There is none.
    """
    if name not in ALGORITHMS:
        raise UserError(f"there is no algorithm '{name}'; there are {', '.join(ALGORITHMS)}", param="algo")
    return cast(Algorithm, importlib.import_module(f"llmc.quant.{ALGORITHMS[name]}"))
