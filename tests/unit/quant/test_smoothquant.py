"""SmoothQuant, shift and PieceWiseSearch: they leave the function as it was, and find what their formulas say."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tiny
import torch

from llmc import rounding
from llmc.checkpoint import Checkpoint
from llmc.model import load
from llmc.names import SmoothingGroup, smoothing_groups
from llmc.quant import inputs, piecewise, shift, smoothquant
from llmc.quant.by_layer import ByLayer
from llmc.quant.inputs import ByInputs
from llmc.recipe import ActivationFormat, QuantRecipe, WeightFormat
from llmc.rounding import Rounding

ROWS = WeightFormat(bits=8, group_size=0)
ONE_OF_EACH = {case.model_type: name for name, case in tiny.TINY.items()}


class Unrounded(ByInputs):
    """Smooths, and rounds nothing."""

    kept: dict[str, dict[str, torch.Tensor]]

    def _rounded(self, part: Any, values: Any, treated: Any, leaders: Any, seen: Any) -> Iterator[tuple[str, Any]]:
        reaches = {matrix: self._reach(matrix, treated, leaders, seen) for matrix in leaders}
        for name, x in values.items():
            matrix = name.removesuffix(".weight")
            if matrix in part.formats and name.endswith(".weight"):
                entry = treated.get(matrix) or inputs._Treated(torch.zeros(x.shape[1]), torch.ones(x.shape[1]))
                self.kept[matrix] = self._inputs(matrix, x, entry, reaches)
            yield name, x.numpy()

    def head(self, matrix: str, weight: Any, states: Any, form: Any) -> Any:
        return weight.numpy()


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("name", ONE_OF_EACH.values())
@torch.inference_mode()
def test_the_function_stays_as_it_was(
    name: str, centred: bool, tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every family, with random scales, before anything is rounded."""
    monkeypatch.setattr(rounding, "rounded", lambda x, scale, form: x)
    monkeypatch.setattr(inputs, "least", lambda attempts: list(attempts)[-1])
    checkpoint, generator = Checkpoint(tiny_checkpoint(name)), torch.Generator().manual_seed(0)
    recipe = QuantRecipe(
        algorithm="smoothquant", weights=ROWS, outside=WeightFormat(bits=8, group_size=32),
        activations=ActivationFormat(dynamic=False), options={"shift": centred},
    )  # fmt: skip
    recipe = smoothquant.complete(checkpoint, recipe)
    windows = [np.array(tiny.tokens(64, seed)) for seed in range(2)]
    scales: list[torch.Tensor] = []

    def choose(trial: inputs.Trial) -> torch.Tensor:
        scales.append(torch.exp2(4 * torch.rand(len(trial.reach), generator=generator) - 2))
        return scales[-1]

    method = Unrounded(checkpoint, recipe, windows, choose, centred=centred)
    method.kept = {}
    transform = ByLayer(checkpoint, recipe, windows, method)
    state = {each: torch.tensor(np.asarray(transform(each, checkpoint[each], None))) for each in checkpoint}
    decoder = load(checkpoint)
    expected = decoder(torch.tensor([tiny.tokens(60, 9)]))
    decoder.load_state_dict({each: value.float() for each, value in state.items()}, assign=True)
    kinds = {"scale": "input_scale", "shift": "input_shift", "multiply": "input_multiply", "bias": "input_bias"}
    for matrix, stored in method.kept.items():
        fields = {field: stored[kind] for field, kind in kinds.items() if kind in stored}
        decoder.round_inputs({matrix: Rounding(ActivationFormat(dynamic=False), 0, **fields)})
    met = decoder(torch.tensor([tiny.tokens(60, 9)]))
    assert float((met - expected).abs().max() / expected.abs().max()) < 1e-5
    assert len(scales) >= 4 * checkpoint.spec.num_layers


def trial(form: ActivationFormat, seed: int = 0) -> inputs.Trial:
    """One linear, with a few channels a hundred times as large as the others."""
    torch.manual_seed(seed)
    rows, weight = torch.randn(100, 64), torch.randn(32, 64) / 8
    rows[:, 3], rows[:, 40:44] = rows[:, 3] * 100, rows[:, 40:44] * 20
    product = inputs.Product(weight, rows, ROWS)
    return inputs.Trial(form, rows.abs().amax(0), [product], lambda x: x, lambda x: x)


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_search_finds_what_any_alpha_finds_and_pieces_too(dynamic: bool) -> None:
    site = trial(ActivationFormat(dynamic=dynamic))
    fixed = [site.loss(smoothquant.smooth(site.reach, site.weight_reach, a)) for a in (0.25, 0.5, 0.75)]
    plain, found = site.loss(torch.ones(64)), site.loss(smoothquant.search(site, 20))
    assert found <= min(fixed) < 0.3 * plain
    one, two, three = (site.loss(piecewise.search(site, count)) for count in (1, 2, 3))
    assert three < one < 0.3 * plain
    assert two <= one


def test_loss_is_that_of_the_formula() -> None:
    site, scale = trial(ActivationFormat(dynamic=False)), torch.linspace(0.5, 2, 64)
    (product,) = site.products
    x, w = product.rows / scale, product.weight * scale
    by, each = x.abs().max() / 127, w.abs().amax(1, keepdim=True) / 127
    wanted = ((x / by).round() * by) @ ((w / each).round() * each).T - product.rows @ product.weight.T
    assert site.loss(scale) == pytest.approx(float(wanted.square().sum()), rel=1e-3)


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_centre_is_worth_its_loss_where_all_tokens_lie_to_one_side(dynamic: bool) -> None:
    form = ActivationFormat(dynamic=dynamic)
    torch.manual_seed(0)
    weight, one_sided = torch.randn(32, 64) / 8, torch.randn(100, 64)
    lonely = one_sided.clone()
    one_sided[:, 3] += 50
    lonely[0, 3] = 3000
    for rows, helps in ((one_sided, True), (lonely, False)):
        found = []
        for centre in (torch.zeros(64), (rows.amax(0) + rows.amin(0)) / 2):
            moved = rows - centre
            site = inputs.Trial(
                form, moved.abs().amax(0), [inputs.Product(weight, moved, ROWS)], lambda x: x, lambda x: x
            )
            scale = smoothquant.search(site, 20)
            found.append(inputs._Attempt(centre, scale, site.loss(scale)))
        assert bool(inputs.least(found).centre.any()) == helps


def test_pieces_are_channels_of_like_size() -> None:
    reach = torch.tensor([1.0, 90, 1.2, 10, 0.9, 110, 11, 1.1])
    found = [mask.nonzero().flatten().tolist() for mask in piecewise.pieces(reach, 3)]
    assert found == [[0, 2, 4, 7], [3, 6], [1, 5]]
    assert len(piecewise.pieces(torch.ones(5), 3)) == 1
    assert len(piecewise.pieces(reach, 20)) == 8


def test_one_piece_is_the_best_of_what_is_tried() -> None:
    site = trial(ActivationFormat(dynamic=False))
    alphas = [site.reach**a / site.weight_reach ** (1 - a) for a in np.arange(0.2, 0.81, 0.05)]
    losses = [site.loss(scale) for scale in alphas] + [site.loss(torch.full((64,), s)) for s in np.arange(1, 5.1, 0.5)]
    assert len(losses) == 22
    assert site.loss(piecewise.search(site, 1)) == pytest.approx(min(losses), rel=1e-4)


def test_channels_that_are_never_met_keep_their_scale() -> None:
    scale = smoothquant.smooth(torch.tensor([0.0, 4.0]), torch.tensor([1.0, 1.0]), 0.5)
    assert scale.tolist() == [1.0, 2.0]


def test_where_a_shift_may_go(tiny_checkpoint: Callable[[str], Path]) -> None:
    """Into norms and values with biases; the engine does the rest."""
    recipe = QuantRecipe(
        algorithm="smoothquant", weights=ROWS, outside=WeightFormat(bits=8, group_size=32),
        activations=ActivationFormat(), options={"shift": True},
    )  # fmt: skip
    left = {name: smoothquant.complete(Checkpoint(tiny_checkpoint(name)), recipe).shifted for name in ("gpt2", "qwen2")}
    assert left["gpt2"] == ("layers.*.mlp.down",)
    assert left["qwen2"] == tuple(
        f"layers.*.{name}" for name in ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down")
    )


def test_biases_of_few_bits_take_up_no_shift(tiny_checkpoint: Callable[[str], Path]) -> None:
    checkpoint = Checkpoint(tiny_checkpoint("gpt2"))
    group = next(group for group in smoothing_groups(checkpoint.spec) if group.source.endswith("attn_norm"))
    assert shift.folds(checkpoint, group)
    name = f"{group.targets[0]}.bias"
    checkpoint.infos[name] = dataclasses.replace(checkpoint.infos[name], dtype=np.dtype(ml_dtypes.bfloat16))
    assert not shift.folds(checkpoint, group)


@torch.inference_mode()
def test_a_shift_is_taken_from_one_bias_and_given_to_the_next() -> None:
    x = torch.tensor([[10.0, -1.0], [12.0, 1.0]])
    values = {
        "n.weight": torch.ones(2), "n.bias": torch.zeros(2), "l.weight": torch.tensor([[2.0, 3.0]]),
        "l.bias": torch.tensor([5.0]),
    }  # fmt: skip
    centre = (x.amax(0) + x.amin(0)) / 2
    shift.fold(values, SmoothingGroup("n", ("l",)), centre, centre)
    assert values["n.bias"].tolist() == [-11.0, 0.0]
    assert values["l.bias"].tolist() == [5.0 + 22.0]
