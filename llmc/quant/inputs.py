"""A layer whose linears read rounded inputs: what comes in is looked at, smoothed where asked for, and given scales.

    observe ─► for each site: [centre] ─► [scale] ─► fold, or keep for the engine ─► round weights, scales of inputs

A *site* is one output of a norm or a linear with all linears that read it. Its centre and scale move into what stands
before where the model allows (llmc/names.py, smoothing.py, shift.py); where not, the engine applies them.

Knows: sites and their statistics. Does not know: how a scale is chosen (smoothquant.py, piecewise.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from llmc import names
from llmc.checkpoint import Checkpoint
from llmc.layerwise import States
from llmc.names import SmoothingGroup
from llmc.quant import rtn, scales, shift, smoothing
from llmc.quant.by_layer import Found, Part
from llmc.quant.gram import values_of
from llmc.quant.observed import Observed
from llmc.quant.pack import Floats, Packed
from llmc.recipe import ActivationFormat, QuantRecipe, WeightFormat
from llmc.rounding import HIGHEST, Rounding
from llmc.runtime import Tokens

_ROWS = 512  # tokens whose outputs are compared
_NARROWEST = 1e-12


class Seen(Observed):
    """Inputs of linears: some rows, and each channel's extremes."""

    def __init__(self, every: int) -> None:
        super().__init__(every)
        self.low: dict[str, Tensor] = {}
        self.high: dict[str, Tensor] = {}

    def see(self, name: str, x: Tensor) -> None:
        """Add inputs [rows, in]."""
        super().see(name, x)
        self.low[name] = torch.minimum(self.low.get(name, x.amin(0)), x.amin(0))
        self.high[name] = torch.maximum(self.high.get(name, x.amax(0)), x.amax(0))


@dataclass(frozen=True, slots=True)
class Product:
    """A linear of a site: its weights [out, in], and some of what it reads, centred, [rows, in]."""

    weight: Tensor
    rows: Tensor
    form: WeightFormat


@dataclass(slots=True)
class Trial:
    """A site, for whoever chooses its scale.

    Attributes:
        reach: Each channel's largest input, centred: [channels of the source].
        products: Those of its linears that are rounded and met a token.
        widen, narrow: From channels to columns of the linears, and back to the largest of a channel's columns.
    """

    form: ActivationFormat
    reach: Tensor
    products: list[Product]
    widen: Callable[[Tensor], Tensor]
    narrow: Callable[[Tensor], Tensor]
    _exact: list[Tensor] = field(default_factory=list)

    @property
    def weight_reach(self) -> Tensor:
        """Each channel's largest weight."""
        return self.narrow(torch.stack([product.weight.abs().amax(0) for product in self.products]).amax(0))

    def loss(self, scale: Tensor) -> float:
        """|X W^T - Q(X / s) Q(W s)^T|^2 over the products."""
        if not self._exact:
            self._exact = [product.rows @ product.weight.T for product in self.products]
        wide = self.widen(scale)
        fixed = None if self.form.dynamic else static_scale((self.reach / scale).amax(), self.form)
        total, made = 0.0, {}
        for product, exact in zip(self.products, self._exact, strict=True):
            if id(product.rows) not in made:
                rounding = Rounding(self.form, product.form.group_size, fixed)
                made[id(product.rows)] = rounding(product.rows / wide)
            got = made[id(product.rows)] @ scales.nearest(product.weight * wide, product.form).T
            total += float(got.sub_(exact).square().sum())
        return total


Choose = Callable[[Trial], Tensor]


class _Attempt(NamedTuple):
    """A site's centre and scale [channels], and what is lost with them."""

    centre: Tensor
    scale: Tensor
    loss: float


def least(attempts: Iterable[_Attempt]) -> _Attempt:
    """The one that loses least, the first of equals.

    A channel that is large at a single token, as some are at a text's first, has its middle far from all other tokens:
    centred, Qwen2.5-0.5B loses many times what it does otherwise.
    """
    return min(attempts, key=lambda each: each.loss)


def static_scale(reach: Tensor, form: ActivationFormat) -> Tensor:
    """The scale [1] of inputs that go up to `reach`."""
    return (reach.float() / HIGHEST[form.kind]).clamp(min=_NARROWEST).view(1)


@dataclass(slots=True)
class _Treated:
    """What became of a linear's input: (x - centre) / scale, both [in], and what of it the engine does."""

    centre: Tensor
    scale: Tensor
    inputs: dict[str, Tensor] = field(default_factory=dict)


class ByInputs:
    """A Method of llmc/quant/by_layer.py.

    Args:
        choose: Chooses the scale of a site; None leaves inputs as they are.
        centred: Shift each channel's middle to zero, at sites where less is lost then.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        recipe: QuantRecipe,
        windows: Sequence[Tokens],
        choose: Choose | None = None,
        *,
        centred: bool = False,
    ) -> None:
        if recipe.activations is None:
            raise ValueError("the recipe rounds no activations")
        self._recipe, self._form = recipe, recipe.activations
        self._choose, self._centred = choose, centred
        self._every = -(-sum(map(len, windows)) // _ROWS)
        self._checkpoint = checkpoint
        self._heads = checkpoint.spec.attention.num_kv_heads
        self._groups: dict[str, list[SmoothingGroup]] = {}
        for group in names.smoothing_groups(checkpoint.spec) if choose or centred else ():
            self._groups.setdefault(".".join(group.source.split(".")[:2]), []).append(group)

    def layer(self, part: Part) -> Found:
        """See Method."""
        seen = Seen(self._every)
        groups = self._groups.get(part.name, [])
        watched = dict.fromkeys([*part.formats, *(target for group in groups for target in group.targets)])
        leaders = part.walker.observe(part.name, part.layer, part.states, watched, seen.see)
        values = {f"{part.name}.{name}": x for name, x in part.layer.state_dict().items()}
        treated: dict[str, _Treated] = {}
        for group in groups:
            if any(target in leaders for target in group.targets if target in part.formats):
                self._treat(part, group, group.targets, values, treated, leaders, seen)
        if self._choose or self._centred:
            folded = {target for group in groups for target in group.targets}
            alone: dict[str, list[str]] = {}
            for matrix in part.formats:
                if matrix not in folded and matrix in leaders:
                    alone.setdefault(leaders[matrix], []).append(matrix)
            for targets in alone.values():
                self._treat(part, None, tuple(targets), values, treated, leaders, seen)
        part.walker.advance(part.layer, part.states)
        return dict(self._rounded(part, values, treated, leaders, seen))

    def _treat(
        self,
        part: Part,
        group: SmoothingGroup | None,
        targets: tuple[str, ...],
        values: dict[str, Tensor],
        treated: dict[str, _Treated],
        leaders: dict[str, str],
        seen: Seen,
    ) -> None:
        """Choose a site's centre and scale, and move them."""
        repeat = group.repeat if group else 1
        met = list(dict.fromkeys(leaders[target] for target in targets if target in leaders))
        low = torch.stack([seen.low[leader] for leader in met]).amin(0)
        high = torch.stack([seen.high[leader] for leader in met]).amax(0)

        def widen(channels: Tensor) -> Tensor:
            return smoothing.spread(channels, repeat, self._heads)

        def narrow(columns: Tensor) -> Tensor:
            return smoothing.largest(columns, repeat, self._heads)

        rounded = [target for target in targets if target in part.formats and target in leaders]
        all_rows = {leader: seen.rows(leader) for leader in met}

        def attempt(centre: Tensor) -> _Attempt:
            """The scale that goes with a centre, and what is lost with both."""
            wide = widen(centre)
            reach = narrow(torch.maximum((low - wide).abs(), (high - wide).abs()))
            rows = {leader: x - wide for leader, x in all_rows.items()}
            products = [Product(part.weight(name), rows[leaders[name]], part.formats[name]) for name in rounded]
            trial = Trial(self._form, reach, products, widen, narrow)
            scale = self._choose(trial) if self._choose else torch.ones_like(centre)
            if group and self._choose:
                stored = self._checkpoint.infos[f"{group.source}.weight"].dtype
                scale = smoothing.representable(scale, part.weight(group.source), stored)
            return _Attempt(centre, scale, trial.loss(scale) if self._centred else 0.0)

        middle = (narrow(high) - narrow(-low)) / 2
        centres = (torch.zeros_like(middle), middle) if self._centred else (torch.zeros_like(middle),)
        centre, scale, _ = least(map(attempt, centres))
        wide_centre, wide = widen(centre), widen(scale)
        moved = group is not None and shift.folds(self._checkpoint, group)
        if self._centred and group and moved:
            shift.fold(values, group, centre, wide_centre)
        if group:
            smoothing.fold(values, group, scale, heads=self._heads)
        for target in targets:
            entry = treated[target] = _Treated(wide_centre, wide)
            if self._centred and not moved:
                # What the source was divided by, the engine's shift is divided by as well.
                entry.inputs["input_shift"] = wide_centre / (wide if group else 1)
            if group is None:
                values[f"{target}.weight"] = values[f"{target}.weight"] * wide
                entry.inputs["input_multiply"] = 1 / wide

    def _rounded(
        self,
        part: Part,
        values: dict[str, Tensor],
        treated: dict[str, _Treated],
        leaders: dict[str, str],
        seen: Seen,
    ) -> Iterator[tuple[str, Packed | Floats]]:
        reaches = {matrix: self._reach(matrix, treated, leaders, seen) for matrix in part.formats if matrix in leaders}
        for name, x in values.items():
            matrix = name.removesuffix(".weight")
            form = part.formats.get(matrix)
            if form is None or matrix == name:
                yield name, x.numpy().astype(self._checkpoint.infos[name].dtype)
                continue
            entry = treated.get(matrix) or _Treated(torch.zeros(x.shape[1]), torch.ones(x.shape[1]))
            inputs = self._inputs(matrix, x, entry, reaches)
            packed = rtn.quantize(x.numpy(), form)
            error = None
            if matrix in leaders:
                rows = (seen.rows(leaders[matrix]) - entry.centre) / entry.scale
                group = form.group_size if self._form.kind == "int8" else 0
                got = Rounding(self._form, group, inputs.get("input_scale"))(rows)
                exact = rows @ x.T
                lost = got @ values_of(packed, form, x.shape[1]).T - exact
                error = float(lost.norm() / exact.norm().clamp(min=_NARROWEST))
            stored = {kind: value.float().contiguous().numpy() for kind, value in inputs.items()}
            yield name, Packed(packed.qweight, packed.scale, None, error, stored)

    def _reach(self, matrix: str, treated: dict[str, _Treated], leaders: dict[str, str], seen: Seen) -> Tensor:
        """The largest input of a linear, as it comes to be rounded."""
        low, high = seen.low[leaders[matrix]], seen.high[leaders[matrix]]
        if entry := treated.get(matrix):
            low, high = (low - entry.centre) / entry.scale, (high - entry.centre) / entry.scale
        return torch.maximum(low.abs(), high.abs()).amax()

    def _inputs(self, matrix: str, weight: Tensor, entry: _Treated, reaches: dict[str, Tensor]) -> dict[str, Tensor]:
        """What is stored of a linear's input, in the order of the plan."""
        columns = weight.shape[1]
        found: dict[str, Tensor] = {}
        multiply = entry.inputs.get("input_multiply", torch.ones(columns))
        if self._recipe.is_shifted(matrix):
            found["input_shift"] = entry.inputs.get("input_shift", torch.zeros(columns))
            # Here and not before: the rows of the weight may have been divided for what reads them.
            found["input_bias"] = weight @ (found["input_shift"] * multiply)
        if self._recipe.is_multiplied(matrix):
            found["input_multiply"] = multiply
        if not self._form.dynamic:
            # An expert that met no token is given the scale of the one that met the largest.
            kind = matrix.rpartition(".")[2]
            alike = [reach for name, reach in reaches.items() if name.rpartition(".")[2] == kind]
            reach = reaches.get(matrix, torch.stack(alike).amax() if alike else torch.ones(()))
            found["input_scale"] = static_scale(reach, self._form)
        return found

    def head(self, matrix: str, weight: Tensor, states: Sequence[Tensor] | States, form: WeightFormat) -> Packed:
        """See Method: a head reads its input as it is."""
        return rtn.quantize(weight.numpy(), form)
