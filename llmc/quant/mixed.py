"""Mixed precision: which parts of a model get more bits, by what each of them alone costs.

    layers.0    4 bits  KL 0.021 ──► 8 bits  KL 0.021 / 289 ──► kept  0
    layers.1    4 bits  KL 0.004 ──► 8 bits  ...

A step up the ladder saves KL and weighs bytes. KL grows with the square of an error that is small, and a rounding error
with the distance between codes, so 8 bits are taken to cost (15 / 255)^2 = 1 / 289 of what 4 bits were measured to.
Steps are taken in the order of what they save for a byte: within a part the second always comes after the first, so
this is the greedy solution of the fractional knapsack, and what is left of the budget is filled with the next that fit.

Knows: recipes, bytes. Does not know: how sensitivity is measured (llmc/evaluate/quality.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmc import checkpoint as checkpoints
from llmc import names
from llmc.checkpoint import Checkpoint
from llmc.errors import UserError
from llmc.names import parts
from llmc.recipe import QuantRecipe, WeightFormat
from llmc.spec import ModelSpec

# Bits of a part's matrices, as they go up; None is kept as it was.
Level = int | None
_MORE = 8


@dataclass(frozen=True, slots=True)
class Step:
    """More bits for a part.

    Attributes:
        bits: That it then has, None when it is kept as it was.
        saves: KL in nats that is expected to go.
        weighs: Bytes.
    """

    part: str
    bits: Level
    saves: float
    weighs: int


class Mix:
    """A recipe, and the parts that have more bits than it gives them.

    Args:
        recipe: Gives all parts few bits. Matrices to which the user gave more have them until their part is kept.
        sensitivity: Part -> KL when it alone is quantized by that recipe.

    Attributes:
        levels: Part -> its bits, where it has more.
    """

    def __init__(self, checkpoint: Checkpoint, recipe: QuantRecipe, sensitivity: Mapping[str, float]) -> None:
        self.base, self.sensitivity = recipe, sensitivity
        self.levels: dict[str, Level] = {}
        self._checkpoint = checkpoint
        self._inside = matrices_by_part(checkpoint.spec)
        self._waiting = sorted(self._steps(), key=lambda step: -step.saves / max(step.weighs, 1))

    def _steps(self) -> list[Step]:
        """From the bottom of each part's ladder to its top."""
        whole, found = self.bytes(), []
        for part, cost in self.sensitivity.items():
            # Whole numbers alone come in other widths.
            bits = [form.bits if form.kind == "int" else _MORE for form in self._formats(part).values()]
            weight = whole
            for level in (_MORE, None):
                if not bits or (level is not None and min(bits) >= level):
                    continue
                left = 0.0 if level is None else cost * _remaining(min(bits), level)
                heavier = self.bytes({part: level})
                found.append(Step(part, level, cost - left, heavier - weight))
                cost, weight = left, heavier
        return found

    def _formats(self, part: str) -> dict[str, WeightFormat]:
        return {matrix: form for matrix in self._inside[part] if (form := self.base.format_of(matrix))}

    def recipe(self, levels: Mapping[str, Level] | None = None) -> QuantRecipe:
        """The recipe with the levels that were chosen, or with others."""
        overrides: dict[str, WeightFormat] = {}
        keep = list(self.base.keep)
        for part, level in (self.levels if levels is None else levels).items():
            inside, in_layer = self._inside[part], part.startswith("layers.")
            if level is None:
                keep += [f"{part}.*"] if in_layer else [matrix for matrix in inside if matrix not in keep]
                continue
            better = {
                matrix: form.model_copy(update={"bits": level})
                for matrix, form in self._formats(part).items()
                if form.kind == "int" and form.bits < level
            }
            alike = in_layer and len(better) == len(inside) and len(set(better.values())) == 1
            overrides.update({f"{part}.*": next(iter(better.values()))} if alike else better)
        return self.base.model_copy(update={"overrides": {**overrides, **self.base.overrides}, "keep": tuple(keep)})

    def bytes(self, levels: Mapping[str, Level] | None = None) -> int:
        """Of all tensors, scales and all."""
        return size(self._checkpoint, self.recipe(levels))

    def fit(self, bits: float) -> QuantRecipe:
        """Take every step, the best first, that `bits` a parameter have room for; raises what `room` raises."""
        left = room(self._checkpoint, self.base, bits)
        skipped: set[str] = set()
        for step in list(self._waiting):
            if step.part in skipped or step.weighs > left:
                skipped.add(step.part)
                continue
            self._take(step)
            left -= step.weighs
        return self.recipe()

    def reduce(self, share: float) -> QuantRecipe | None:
        """Take the best steps until no more than a share of the expected KL is left: one at least, and half as many as
        there are parts with more bits already. None when nothing would be left that is quantized."""
        allowed = share * self.expected
        fewest = max(1, len(self.levels) // 2)
        while self._waiting and (fewest > 0 or self.expected > allowed):
            self._take(self._waiting[0])
            fewest -= 1
        return self.recipe() if self._waiting else None

    @property
    def expected(self) -> float:
        """KL of all parts together, as far as they add up."""
        return sum(step.saves for step in self._waiting)

    def _take(self, step: Step) -> None:
        self._waiting.remove(step)
        self.levels[step.part] = step.bits


def _remaining(few: int, many: int) -> float:
    """The share of the KL that is left with many bits."""
    return float(((2**few - 1) / (2**many - 1)) ** 2)


def room(checkpoint: Checkpoint, recipe: QuantRecipe, bits: float) -> int:
    """Bytes that `bits` a parameter leave beyond what a recipe needs.

    Raises:
        UserError: It needs more.
    """
    count, needed = parameters(checkpoint.spec), size(checkpoint, recipe)
    left = math.floor(bits * count / 8) - needed
    if left < 0:
        raise UserError(
            f"{bits:g} bits a parameter are not enough: with scales and with what is kept, the recipe has "
            f"{8 * needed / count:.2f} before any part has more. Larger groups (--group-size) have fewer scales",
            param="target_bits",
        )
    return left


def size(checkpoint: Checkpoint, recipe: QuantRecipe) -> int:
    """Bytes of all tensors of a checkpoint by that recipe, scales and all."""
    plan = checkpoints.plan(checkpoint.spec, recipe, checkpoint.infos)
    return sum(info.nbytes for info in plan.values())


def parameters(spec: ModelSpec) -> int:
    """Of a model; a tied matrix counts once."""
    return sum(math.prod(shape) for shape in names.tensors(spec).values())


def matrices_by_part(spec: ModelSpec) -> dict[str, list[str]]:
    """Part -> its matrices, those of a tied model's tail being in front."""
    wanted = {f"{matrix}.weight" for matrix in names.matrices(spec)}
    return {
        part: [name.removesuffix(".weight") for name in inside if name in wanted]
        for part, inside in parts(spec).items()
    }


def bits_by_part(spec: ModelSpec, recipe: QuantRecipe) -> dict[str, list[Level]]:
    """Part -> the widths that its matrices have, None for those that are kept; parts without a matrix are left out."""
    found = {}
    for part, matrices in matrices_by_part(spec).items():
        forms = [recipe.format_of(matrix) for matrix in matrices]
        widths: Sequence[Level] = [form.bits if form else None for form in forms]
        if widths:
            found[part] = sorted(set(widths), key=lambda bits: (bits is None, bits))
    return found
