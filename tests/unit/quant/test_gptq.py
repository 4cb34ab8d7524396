"""llmc.quant.gptq against the paper's own formula, nvidia-modelopt's update, and rounding to nearest."""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from llmc import names
from llmc.checkpoint import Checkpoint
from llmc.model import load
from llmc.quant import gptq, rtn
from llmc.quant.gram import grouped, values_of
from llmc.quant.pack import Packed
from llmc.quant.scales import from_extremes
from llmc.recipe import QuantRecipe, WeightFormat

PLAIN = gptq.Options(act_order=False, search=False)


def problem(rows: int, columns: int, tokens: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix, and the gram matrix of inputs some of whose channels are large and all of which are correlated."""
    generator = torch.Generator().manual_seed(rows)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    inputs = torch.randn(tokens, columns, generator=generator) @ mix
    inputs[:, ::7] *= 8
    return torch.randn(rows, columns, generator=generator), inputs.T @ inputs


def solved(weight: torch.Tensor, gram: torch.Tensor, form: WeightFormat, options: gptq.Options) -> Packed:
    return gptq.solve({"w": (weight, form)}, gram.clone(), options)["w"]


def by_the_paper(weight: torch.Tensor, gram: torch.Tensor, form: WeightFormat, order: list[int]) -> torch.Tensor:
    """Frantar et al. 2022, equations 2 and 3, column by column in float64: no blocks, no Cholesky factor.

    Groups take their grids from the original weights.
    """
    work, exact = weight.double().clone(), gram.double()
    grid = from_extremes(grouped(weight, form.group_size), form)
    damped = exact + 0.01 * exact.diagonal().mean() * torch.eye(len(exact), dtype=torch.float64)
    inverse = torch.linalg.inv(damped)
    left = list(range(len(exact)))
    for column in order:
        scale, zero = (x[:, column // form.group_size].double() for x in (grid.scale, grid.zero))
        value = ((work[:, column] / scale).round() + zero).clamp(0, grid.highest).sub(zero) * scale
        at = left.index(column)
        step = (work[:, column] - value) / inverse[at, at]
        for place, other in enumerate(left):
            if other != column:
                work[:, other] -= step * inverse[at, place]
        work[:, column] = value
        inverse = inverse - torch.outer(inverse[:, at], inverse[at]) / inverse[at, at]
        keep = [place for place in range(len(left)) if place != at]
        inverse, left = inverse[keep][:, keep], [left[place] for place in keep]
    return work


@pytest.mark.parametrize("symmetric", [True, False])
def test_is_the_papers_update(symmetric: bool) -> None:
    weight, gram = problem(24, 72)  # the last group is half full, and there is one block
    form = WeightFormat(bits=4, group_size=16, symmetric=symmetric)
    order = gram.diagonal().argsort(descending=True, stable=True).tolist()
    expected = by_the_paper(weight, gram, form, order)
    found = values_of(solved(weight, gram, form, gptq.Options(search=False)), form, 72)
    # A value on the edge between two codes may fall to either side in float32, and its row goes another way from there.
    same = (found - expected).abs().amax(1) < 1e-4
    assert same.float().mean() >= 0.9
    assert order != sorted(order)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram = problem(16, 160)
    form = WeightFormat(bits=4, group_size=32)
    results = []
    for block in (32, 160):
        monkeypatch.setattr(gptq, "_BLOCK", block)
        monkeypatch.setattr(gptq, "_ROWS", block // 8)
        results.append(values_of(solved(weight, gram, form, PLAIN), form, 160))
    assert ((results[0] - results[1]).abs().amax(1) < 1e-4).float().mean() >= 0.9


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("bits", "size", "damping"), [(4, 32, 0.01), (4, 128, 0.1), (4, 64, 0.001), (8, 128, 0.01)])
def test_is_what_modelopt_does(bits: Any, size: Any, damping: float) -> None:
    """Its column update, given each group's scale as the original weights have it; ours with the order left alone."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        from modelopt.torch.quantization.utils.calib_utils import compute_hessian_inverse, gptq_blockwise_update
    weight, gram = problem(32, 256)
    form = WeightFormat(bits=bits, group_size=size)
    grid = from_extremes(grouped(weight, size), form)
    factor = compute_hessian_inverse(gram, weight, damping)
    ours = gptq.inverse_factor(gptq.dampen(gram.clone(), damping))
    torch.testing.assert_close(ours, factor, rtol=1e-3, atol=1e-6)
    theirs = weight.clone()
    gptq_blockwise_update(theirs, factor, 128, lambda x: grid.rounded(grouped(x, size)).flatten(1))
    groups = [column // size for column in range(256)]
    codes, _ = gptq._solve(weight.T.contiguous(), ours, grid, groups, lambda *_: None)
    mine = (codes.T.view(32, -1, size) - grid.zero[..., None]).mul(grid.scale[..., None]).flatten(1)
    assert ((mine - theirs).abs().amax(1) < 1e-4).float().mean() >= 0.9
    assert (theirs - weight).abs().max() > 0.5 * float(grid.scale.min())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [16, 32, 128, 256])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
def test_loses_less_than_rounding_to_nearest(bits: Any, group_size: Any, symmetric: bool, act_order: bool) -> None:
    weight, gram = problem(48, 300)
    form = WeightFormat(bits=bits, group_size=group_size, symmetric=symmetric)
    packed = solved(weight, gram, form, gptq.Options(act_order=act_order))

    def output_error(rounded: torch.Tensor) -> float:
        """|X W^T - X W'^T| / |X W^T|, where gram = X^T X."""
        squares = [float(torch.trace(x @ gram @ x.T)) for x in (weight - rounded, weight)]
        return math.sqrt(squares[0] / squares[1])

    nearest = output_error(values_of(rtn.quantize(weight.numpy(), form), form, 300))
    met = output_error(values_of(packed, form, 300))
    assert packed.error == pytest.approx(met, rel=2e-3)
    assert met < 0.75 * nearest


def test_inverse_of_a_triangle() -> None:
    matrix = torch.rand(700, 700, dtype=torch.float64).triu() / 700 + torch.eye(700)
    torch.testing.assert_close(gptq.invert_upper(matrix.clone()) @ matrix, torch.eye(700, dtype=torch.float64))


def test_inputs_that_never_come() -> None:
    weight, gram = problem(16, 64)
    gram[5], gram[:, 5] = 0, 0
    gram[:, 40:], gram[40:] = 0, 0
    form = WeightFormat(bits=4, group_size=16)
    for options in (gptq.Options(), PLAIN):
        found = values_of(solved(weight, gram, form, options), form, 64)
        assert torch.isfinite(found).all()
        assert not found[:, 40:].any()
    assert values_of(solved(weight, torch.zeros_like(gram), form, PLAIN), form, 64).abs().max() == 0


@pytest.mark.parametrize("name", ["llama-bias", "qwen3", "llama-tied"])
@torch.inference_mode()
def test_a_model_answers_better_than_rounded_to_nearest(name: str, tiny_checkpoint: Callable[[str], Path]) -> None:
    checkpoint = Checkpoint(tiny_checkpoint(name))
    form = WeightFormat(bits=4, group_size=32)
    recipe = QuantRecipe(algorithm="gptq", weights=form)
    windows = [np.array(tiny.tokens(64, seed)) for seed in range(12)]
    transform = gptq.prepare(checkpoint, recipe, windows)
    exact = load(checkpoint)
    held_out = torch.tensor([tiny.tokens(64, 99)])
    losses = {}
    results: dict[str, dict[str, torch.Tensor]] = {"gptq": {}, "rtn": {}}
    matrices = names.matrices(checkpoint.spec)
    for tensor in checkpoint:
        values = checkpoint[tensor]
        matrix = tensor.removesuffix(".weight")
        form_here = form if matrix in matrices and matrix != "embed" else None
        found = transform(tensor, values, form_here)
        if form_here:
            assert isinstance(found, Packed)
            results["gptq"][tensor] = values_of(found, form, values.shape[1])
            results["rtn"][tensor] = values_of(rtn.quantize(values, form), form, values.shape[1])
    for which, values_here in results.items():
        decoder = load(checkpoint)
        decoder.load_state_dict(values_here, strict=False, assign=True)
        losses[which] = float((decoder(held_out) - exact(held_out)).square().mean())
    assert len(results["gptq"]) == len(matrices) - 1
    assert losses["gptq"] < 0.8 * losses["rtn"]
