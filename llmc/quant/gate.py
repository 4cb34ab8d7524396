"""The gate: what a result must hold, and which parts get more bits when it does not.

Knows: recipes and verdicts. Does not know: how a verdict is reached (llmc/evaluate/quality.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from llmc.checkpoint import Checkpoint
from llmc.errors import GateError
from llmc.names import parts
from llmc.recipe import QuantRecipe, WeightFormat
from llmc.spec import ModelSpec


class Verdict(Protocol):
    """What was measured of a result.

    Attributes:
        increase: Of the perplexity, as a share of the original's.
        sensitivity: Part of the model -> what it alone costs, where that was asked for.
    """

    @property
    def increase(self) -> float: ...

    @property
    def sensitivity(self) -> Mapping[str, float]: ...

    def figures(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        ...


# (the original, a result, whether sensitivity is needed) -> what was measured
Judge = Callable[[Checkpoint, Checkpoint, bool], Verdict]


def refine(
    recipe: QuantRecipe,
    inside: Mapping[str, list[str]],
    sensitivity: Mapping[str, float],
    verdict: Verdict,
    limit: float,
) -> QuantRecipe:
    """Give 8 bits to the parts that cost most: to one at first, then to twice as many every time.

    Args:
        inside: Part -> its matrices.

    Raises:
        GateError: Nothing is left that has fewer.
    """
    small = {part: _fewer_bits(recipe, inside[part]) for part in sensitivity}
    waiting = sorted((part for part in small if small[part]), key=lambda part: -sensitivity[part])
    raised = sum(1 for part in small if inside[part] and not small[part])
    more: dict[str, WeightFormat] = {}
    for part in waiting[: max(1, raised)]:
        better = {matrix: form.model_copy(update={"bits": 8}) for matrix, form in small[part].items()}
        alike = part.startswith("layers.") and len(better) == len(inside[part]) and len(set(better.values())) == 1
        more.update({f"{part}.*": next(iter(better.values()))} if alike else better)
    if not more:
        raise GateError(
            f"perplexity rises by {verdict.increase:.2%} with 8 bits everywhere, {limit:.2%} is allowed: nothing was "
            "written. Choose smaller groups, keep matrices (--keep), or calibrate on more text"
        )
    return recipe.model_copy(update={"overrides": {**more, **recipe.overrides}})


def _fewer_bits(recipe: QuantRecipe, matrices: list[str]) -> dict[str, WeightFormat]:
    forms = ((matrix, recipe.format_of(matrix)) for matrix in matrices)
    return {matrix: form for matrix, form in forms if form and form.bits < 8}


def matrices_by_part(spec: ModelSpec, matrices: list[str]) -> dict[str, list[str]]:
    """Part -> its matrices."""
    wanted = {f"{matrix}.weight" for matrix in matrices}
    return {
        part: [name.removesuffix(".weight") for name in inside if name in wanted]
        for part, inside in parts(spec).items()
    }
