"""AWQ (Lin et al. 2023): channels that the text uses most are scaled up before rounding, and so lose least of it.

    for each smoothing group:   s = mean|x|^a / mean(|w| / max of its group)^b
                                a of a grid, b 0 or 1 - a, s over the geometric middle of its extremes;
                                the s with the least |X W^T - Q(W s) (X / s)|^2, summed over the linears
    then:                       fold s into the norm or the linear before (smoothing.py), choose ranges (scales.py)

Each linear's error counts relative to what it is with s = 1: in a plain sum q, whose outputs are large, chooses the
scale and v pays for it (docs/quantization-measured.md has figures). b = 0 is the paper's search, b = 1 - a that of
nvidia-modelopt's awq_lite and of AutoAWQ. The channels' means are over all of the calibration text, the outputs that
are compared over some of its tokens, spread evenly over it, and both as the unquantized model computes them, as in the
authors' code. The variants are named as nvidia-modelopt's: `lite` searches scales, `clip` ranges, `full` both. Here the
ranges of a row are chosen together, and q and k, which the authors leave alone, gain by it; gate and up are left alone,
since Qwen2.5-0.5B does worse when theirs are searched, although each of them does better by itself. The embedding is
rounded to nearest; the head has no norm of its own to fold into: with 4 bits its ranges are searched in every variant.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from pydantic import PositiveInt
from torch import Tensor

from llmc import names
from llmc.checkpoint import Checkpoint
from llmc.config import Strict
from llmc.layerwise import States
from llmc.names import SmoothingGroup
from llmc.quant import scales, smoothing
from llmc.quant.algorithm import Transform
from llmc.quant.by_layer import ByLayer, Found, Part
from llmc.quant.gram import grouped, values_of
from llmc.quant.observed import Observed
from llmc.quant.pack import Packed
from llmc.recipe import QuantRecipe, WeightFormat
from llmc.runtime import Tokens

CALIBRATES = True

_SMALLEST = 1e-4  # of a scale before it is divided by its middle: a dead channel must not win everything
_NOT_CLIPPED = (".gate", ".up")
_EVERY = 4  # of the tokens whose outputs are compared, one is in the search of scales, which tries many


class Options(Strict):
    """What may be chosen.

    Attributes:
        steps: Of the grid of a, from 0 to 1.
        variant: What is searched in layers: scales, ranges, or both.
        rows: Tokens whose outputs are compared.
    """

    steps: PositiveInt = 10
    variant: Literal["lite", "clip", "full"] = "full"
    rows: PositiveInt = 2048


def prepare(checkpoint: Checkpoint, recipe: QuantRecipe, windows: Sequence[Tokens]) -> Transform:
    """See llmc/quant/algorithm.py."""
    options = Options(**recipe.options)
    every = -(-sum(map(len, windows)) // options.rows)
    return ByLayer(checkpoint, recipe, windows, Awq(checkpoint, options, every))


class Awq:
    """A Method of llmc/quant/by_layer.py.

    Args:
        every: Of how many tokens one has its outputs compared.
    """

    def __init__(self, checkpoint: Checkpoint, options: Options, every: int) -> None:
        self.options = options
        self._every = every
        self._infos = checkpoint.infos
        self._heads = checkpoint.spec.attention.num_kv_heads
        self._groups: dict[str, list[SmoothingGroup]] = {}
        for group in names.smoothing_groups(checkpoint.spec):
            self._groups.setdefault(".".join(group.source.split(".")[:2]), []).append(group)

    def layer(self, part: Part) -> Found:
        """See Method."""
        inputs = Observed(self._every)
        watched = dict.fromkeys(
            [*part.formats, *(target for group in self._groups.get(part.name, []) for target in group.targets)]
        )
        leaders = part.walker.observe(part.name, part.layer, part.states, watched, inputs.see, advance=True)
        values = {f"{part.name}.{name}": x for name, x in part.layer.state_dict().items()}
        factors: dict[str, Tensor] = {}
        for group in self._groups.get(part.name, []):
            # Without a rounded target there is nothing to gain; without inputs nothing to go by.
            useful = any(target in part.formats for target in group.targets) and set(group.targets) & set(leaders)
            if useful and self.options.variant != "clip":
                scale = self._search(part, group, leaders, inputs)
                wide = smoothing.fold(values, group, scale, heads=self._heads)
                factors.update(dict.fromkeys(group.targets, wide))
        return dict(self._rounded(part, values, factors, leaders, inputs))

    def _search(self, part: Part, group: SmoothingGroup, leaders: dict[str, str], inputs: Observed) -> Tensor:
        """The best scale over the source's channels."""
        met = [target for target in group.targets if target in leaders]
        rounded = [target for target in met if target in part.formats]
        magnitude = inputs.mean(list(dict.fromkeys(leaders[target] for target in met)))
        magnitude = smoothing.gather(magnitude, group.repeat, self._heads)
        share = torch.cat([shares(part.weight(target), part.formats[target]) for target in rounded]).mean(0)
        share = smoothing.gather(share, group.repeat, self._heads)
        rows = {leader: inputs.rows(leader, _EVERY) for leader in {leaders[target] for target in rounded}}
        unscaled: dict[str, float] = {}

        def loss(scale: Tensor) -> float:
            wide = smoothing.spread(scale, group.repeat, self._heads)
            total = 0.0
            for target in rounded:
                weight, form = part.weight(target), part.formats[target]
                lost = scales.nearest(weight * wide, form).div_(wide).sub_(weight)
                error = float((rows[leaders[target]] @ lost.T).square().sum())
                total += error / max(unscaled.setdefault(target, error), 1e-30)  # ones are tried first
            return total

        dtype, source = self._infos[f"{group.source}.weight"].dtype, part.weight(group.source)
        tried = candidates(magnitude, share, self.options.steps)
        found = [smoothing.representable(scale, source, dtype) for scale in tried]
        return min(found, key=loss)

    def _rounded(
        self,
        part: Part,
        values: dict[str, Tensor],
        factors: dict[str, Tensor],
        leaders: dict[str, str],
        inputs: Observed,
    ) -> Iterator[tuple[str, Packed | np.ndarray]]:
        for name, x in values.items():
            matrix = name.removesuffix(".weight")
            form = part.formats.get(matrix)
            if form is None:
                yield name, x.numpy().astype(self._infos[name].dtype)
                continue
            # An expert that met no token is judged by inputs that are all alike, and not clipped.
            rows = inputs.rows(leaders[matrix]) if matrix in leaders else torch.eye(x.shape[1])
            clip = self.options.variant != "lite" and matrix in leaders and not matrix.endswith(_NOT_CLIPPED)
            yield name, rounded(x, rows / factors.get(matrix, torch.ones(1)), form, clip=clip)

    def head(self, matrix: str, weight: Tensor, states: Sequence[Tensor] | States, form: WeightFormat) -> Packed:
        """See Method."""
        inputs = Observed(self._every)
        for state in states:
            inputs.see(matrix, state.flatten(0, -2))
        return rounded(weight, inputs.rows(matrix), form, clip=form.bits < 8)


def shares(weight: Tensor, form: WeightFormat) -> Tensor:
    """Each weight's magnitude as a share of the largest of its group: [out, in]."""
    groups = grouped(weight.abs(), form.group_size)
    return (groups / groups.amax(-1, keepdim=True).clamp(min=1e-30)).flatten(1)[:, : weight.shape[1]]


def candidates(magnitude: Tensor, share: Tensor, steps: int) -> Iterator[Tensor]:
    """Scales to try, each over the geometric middle of its extremes; the first changes nothing.

    Args:
        magnitude: Mean |x| of each channel.
        share: Mean of `shares` of each channel.
    """
    yield torch.ones_like(magnitude)
    for step in range(steps + 1):
        a = step / steps
        for b in {0.0, 1 - a}:
            if a or b:
                scale = (magnitude.pow(a) / share.pow(b).clamp(min=1e-30)).clamp(_SMALLEST, 1 / _SMALLEST)
                yield scale / (scale.amax() * scale.amin()).sqrt()


def rounded(weight: Tensor, rows: Tensor, form: WeightFormat, *, clip: bool) -> Packed:
    """Quantize a matrix that reads `rows` [some, in]."""
    groups = grouped(weight, form.group_size)
    if clip:
        codes, grid = scales.together(groups, form, grouped(rows, form.group_size))
    else:
        grid = scales.from_extremes(groups, form)
        codes = grid.codes(groups)
    result = scales.packed(codes.flatten(1), grid, form)
    lost = values_of(result, form, weight.shape[1]).sub_(weight)
    whole = _energy(rows, weight)
    error = (_energy(rows, lost) / whole) ** 0.5 if whole else 0.0
    return Packed(result.qweight, result.scale, result.zero, error)


def _energy(rows: Tensor, weight: Tensor) -> float:
    """|X W^T|^2, some thousand outputs at a time: a head has many."""
    return sum(float((rows @ some.T).square().sum()) for some in torch.split(weight, 8192))
