"""llmc.quant.awq: folding changes nothing, the search finds what nvidia-modelopt's finds or better."""

from __future__ import annotations

import contextlib
import copy
import io
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tiny
import torch
from safetensors.numpy import load_file, save_file

from llmc import names
from llmc.checkpoint import Checkpoint
from llmc.model import load
from llmc.quant import awq, rtn, scales
from llmc.quant.gram import grouped, values_of
from llmc.quant.observed import Observed
from llmc.quant.pack import Packed
from llmc.quant.smoothing import fold, gather, representable, spread
from llmc.recipe import QuantRecipe, WeightFormat

CASES = ["llama", "llama-bias", "llama-multi-head", "qwen2", "qwen3", "llama-tied", "mistral-window"]
INT4 = WeightFormat(bits=4, group_size=32)


def windows(count: int = 8) -> list[np.ndarray]:
    return [np.array(tiny.tokens(64, seed)) for seed in range(count)]


@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_folding_leaves_the_function_as_it_was(name: str, tiny_checkpoint: Callable[[str], Path]) -> None:
    """Every group of the model, by scales from 1/8 to 8."""
    checkpoint = Checkpoint(tiny_checkpoint(name))
    decoder, heads = load(checkpoint), checkpoint.spec.attention.num_kv_heads
    tokens = torch.tensor([tiny.tokens(60)])
    expected = decoder(tokens)
    values = dict(decoder.state_dict())
    generator = torch.Generator().manual_seed(0)
    groups = names.smoothing_groups(checkpoint.spec)
    for group in groups:
        channels = len(values[f"{group.source}.weight"])
        fold(values, group, torch.exp2(6 * torch.rand(channels, generator=generator) - 3), heads=heads)
    assert len(groups) == 4 * checkpoint.spec.num_layers
    decoder.load_state_dict(values, assign=True)
    met = decoder(tokens)
    assert float((met - expected).abs().max() / expected.abs().max()) < 1e-5
    changed = [
        key for key, value in decoder.state_dict().items() if not torch.equal(value, load(checkpoint).state_dict()[key])
    ]
    assert len(changed) > 8 * checkpoint.spec.num_layers


def test_spread_and_gather_are_inverse() -> None:
    scale = torch.arange(6.0) + 1
    wide = spread(scale, 3, 2)
    assert wide.tolist() == [1, 2, 3] * 3 + [4, 5, 6] * 3
    assert torch.equal(gather(wide, 3, 2), scale)


def test_a_norm_in_bfloat16_is_divided_without_loss() -> None:
    source = (torch.rand(500) + 0.5).bfloat16().float()
    source[3] = 0
    given = torch.rand(500) * 4 + 0.1
    scale = representable(given, source, np.dtype(ml_dtypes.bfloat16))
    stored = (source / scale).bfloat16().float()
    torch.testing.assert_close(stored * scale, source, rtol=1e-6, atol=0)
    assert (scale > 0).all()
    assert torch.equal(representable(given, source, np.dtype(np.float32)), given)
    assert torch.equal(representable(given, source[:, None], np.dtype(ml_dtypes.bfloat16)), given)


@torch.inference_mode()
def results(
    checkpoint: Checkpoint, form: WeightFormat = INT4, **options: Any
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Everything that AWQ makes of a model as values, and the errors of matrices; embedding and head are left alone."""
    transform = awq.prepare(
        checkpoint, QuantRecipe(algorithm="awq", weights=form, keep=("embed", "head"), options=options), windows()
    )
    values: dict[str, torch.Tensor] = {}
    errors: dict[str, float] = {}
    for tensor in checkpoint:
        matrix = tensor.removesuffix(".weight")
        wanted = form if matrix in names.matrices(checkpoint.spec) and matrix not in ("embed", "head") else None
        found = transform(tensor, checkpoint[tensor], wanted)
        if isinstance(found, Packed):
            assert found.error is not None
            values[tensor], errors[matrix] = values_of(found, form, checkpoint.infos[tensor].shape[1]), found.error
        else:
            values[tensor] = torch.from_numpy(found)
    return values, errors


def loss_of(checkpoint: Checkpoint, values: dict[str, torch.Tensor]) -> float:
    decoder, tokens = load(checkpoint), torch.tensor([tiny.tokens(64, 99)])
    with torch.inference_mode():
        expected = decoder(tokens)
        decoder.load_state_dict(values, strict=False, assign=True)
        return float((decoder(tokens) - expected).square().mean())


@pytest.mark.parametrize("name", ["llama-bias", "qwen2", "llama-tied"])
def test_channels_that_the_text_uses_most_lose_least(
    name: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model as real ones are: a few channels of each norm are ten times as large as the others."""
    folder = shutil.copytree(tiny_checkpoint(name), tmp_path / "c")
    tensors = load_file(folder / "model.safetensors")
    for tensor, values in tensors.items():
        if tensor.endswith(("attn_norm.weight", "mlp_norm.weight")):
            values[::13] *= 10
    save_file(tensors, folder / "model.safetensors")
    checkpoint = Checkpoint(folder)
    _, found = results(checkpoint, variant="full")
    _, unclipped = results(checkpoint, variant="lite")
    monkeypatch.setattr(awq, "candidates", lambda magnitude, *_: iter([torch.ones_like(magnitude)]))
    values, nothing = results(checkpoint, variant="lite")
    ranges, clipped = results(checkpoint, variant="clip")
    same = {matrix for matrix in nothing if torch.equal(ranges[f"{matrix}.weight"], values[f"{matrix}.weight"])}
    assert same == {matrix for matrix in nothing if matrix.endswith((".gate", ".up"))}
    for tensor in (f"{matrix}.weight" for matrix in nothing):
        exact = checkpoint[tensor]
        torch.testing.assert_close(values[tensor], values_of(rtn.quantize(exact, INT4), INT4, exact.shape[1]))
    assert len(found) == len(nothing) == 7 * checkpoint.spec.num_layers
    assert all(found[matrix] <= unclipped[matrix] * 1.01 for matrix in nothing)
    assert all(clipped[matrix] <= nothing[matrix] * 1.01 for matrix in nothing)
    assert sum(clipped.values()) < sum(nothing.values())
    readers = [matrix for matrix in nothing if matrix.endswith((".q", ".k", ".v", ".gate", ".up"))]
    assert sum(unclipped[matrix] for matrix in readers) < 0.8 * sum(nothing[matrix] for matrix in readers)


def test_no_linear_pays_for_another_whose_outputs_are_larger(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """q's outputs are a thousand times v's, and it alone would gain by a scale that ruins k and v."""
    folder = shutil.copytree(tiny_checkpoint("llama"), tmp_path / "c")
    tensors = load_file(folder / "model.safetensors")
    for tensor, values in tensors.items():
        if tensor.endswith("attn.q.weight"):
            values *= 1000
            values[:, ::7] *= 8
    save_file(tensors, folder / "model.safetensors")
    checkpoint = Checkpoint(folder)
    ruinous = torch.ones(checkpoint.spec.hidden_size)
    ruinous[::7] = 1 / 8
    monkeypatch.setattr(awq, "candidates", lambda magnitude, *_: iter([torch.ones_like(magnitude)]))
    _, nothing = results(checkpoint, variant="lite")

    def candidates(magnitude: torch.Tensor, *_: object) -> Iterator[torch.Tensor]:
        yield torch.ones_like(magnitude)
        if len(magnitude) == len(ruinous):
            yield ruinous

    monkeypatch.setattr(awq, "candidates", candidates)
    _, found = results(checkpoint, variant="lite")
    for layer in range(checkpoint.spec.num_layers):
        for name in "kv":
            matrix = f"layers.{layer}.attn.{name}"
            assert found[matrix] == pytest.approx(nothing[matrix], rel=0.3)


def test_no_linear_pays_for_another_that_loses_more(
    tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """v loses 4 % of its output, q and k 0.8 %; one that takes 15 % off v and adds 13 % to both is no gain."""
    checkpoint = Checkpoint(tiny_checkpoint("llama"))
    lost = {"q": (0.008, 0.009), "k": (0.008, 0.009), "v": (0.04, 0.034)}
    weights = {
        (layer, name): torch.from_numpy(checkpoint[f"layers.{layer}.attn.{name}.weight"])
        for layer in range(checkpoint.spec.num_layers)
        for name in lost
    }

    def nearest(weight: torch.Tensor, _: WeightFormat) -> torch.Tensor:
        for (_layer, name), exact in weights.items():
            for scaled in (0, 1):
                if torch.equal(weight, exact * 2**scaled):
                    met.add((name, scaled))
                    return weight * (1 + lost[name][scaled] ** 0.5)
        return weight

    def candidates(magnitude: torch.Tensor, *_: object) -> Iterator[torch.Tensor]:
        yield torch.ones_like(magnitude)
        yield torch.full_like(magnitude, 2.0)

    met: set[tuple[str, int]] = set()
    monkeypatch.setattr(scales, "nearest", nearest)
    monkeypatch.setattr(awq, "candidates", candidates)
    values, _ = results(checkpoint, variant="lite")
    assert met == {(name, scaled) for name in lost for scaled in (0, 1)}
    for layer in range(checkpoint.spec.num_layers):
        norm = f"layers.{layer}.attn_norm.weight"
        assert np.array_equal(values[norm].numpy(), checkpoint[norm])


def test_what_is_kept_is_folded_all_the_same(tiny_checkpoint: Callable[[str], Path]) -> None:
    """q is kept, k and v are rounded: q must take up the scale that the norm lost."""
    checkpoint = Checkpoint(tiny_checkpoint("llama"))
    form = WeightFormat(bits=8, group_size=16)
    recipe = QuantRecipe(algorithm="awq", weights=form, keep=("*.q", "embed", "head"))
    transform = awq.prepare(checkpoint, recipe, windows())
    values = {}
    for tensor in checkpoint:
        found = transform(
            tensor,
            checkpoint[tensor],
            recipe.format_of(tensor.removesuffix(".weight")) if len(checkpoint.infos[tensor].shape) == 2 else None,
        )
        values[tensor] = (
            values_of(found, form, checkpoint.infos[tensor].shape[1])
            if isinstance(found, Packed)
            else torch.from_numpy(found)
        )
    assert not np.array_equal(values["layers.0.attn.q.weight"].numpy(), checkpoint["layers.0.attn.q.weight"])
    decoder, tokens = load(checkpoint), torch.tensor([tiny.tokens(64, 99)])
    with torch.inference_mode():
        expected = decoder(tokens)
    assert loss_of(checkpoint, values) < 1e-3 * float(expected.square().mean())


@pytest.mark.filterwarnings("ignore")
@torch.inference_mode()
def test_loses_no_more_than_modelopt() -> None:
    """One linear, the same inputs: modelopt's best scale is one of ours, and so ours loses no more."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        import modelopt.torch.quantization as mtq
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(256, 64, bias=False))
    inputs = torch.randn(200, 256) * torch.exp(torch.randn(256))
    weight = model[0].weight.detach().clone()
    config = copy.deepcopy(mtq.INT4_AWQ_CFG)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        mtq.quantize(model, config, lambda found: found(inputs[None]))
    theirs = 1 / model[0].input_quantizer.pre_quant_scale
    form = WeightFormat(bits=4, group_size=128)
    tried = list(awq.candidates(inputs.abs().mean(0), awq.shares(weight, form).mean(0), 10))
    distances = [float(((scale - theirs) / theirs).abs().max()) for scale in tried]
    assert min(distances) < 1e-4

    def loss(scale: torch.Tensor) -> float:
        return float((inputs @ (scales.nearest(weight * scale, form) / scale - weight).T).square().sum())

    quantized = model(inputs[None])[0]
    assert loss(theirs) == pytest.approx(float((quantized - inputs @ weight.T).square().sum()), rel=1e-3)
    assert min(map(loss, tried)) <= loss(theirs) * (1 + 1e-6)
    assert min(map(loss, tried)) < 0.9 * loss(torch.ones(256))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("variant", ["awq_lite", "awq_clip", "awq_full"])
@torch.inference_mode()
def test_given_its_candidates_is_modelopt(
    variant: str, bits: Any, group_size: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One linear whose 64 inputs modelopt looks at whole: the same scale, the same clipping, the same values but for
    ties."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        import modelopt.torch.quantization as mtq
    torch.manual_seed(5)
    model = torch.nn.Sequential(torch.nn.Linear(256, 96, bias=False))
    inputs = torch.randn(64, 256) * torch.exp(torch.randn(256))
    weight = model[0].weight.detach().clone()
    config = copy.deepcopy(mtq.INT4_AWQ_CFG)
    config["algorithm"] = {"method": variant}
    for entry in config["quant_cfg"]:
        if entry["quantizer_name"] == "*weight_quantizer":
            entry["cfg"] = {"num_bits": bits, "block_sizes": {-1: group_size, "type": "static"}, "axis": None}
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        mtq.quantize(model, config, lambda found: found(inputs[None]))
    quantizer = model[0].weight_quantizer
    theirs = quantizer(model[0].weight)
    assert (quantizer.num_bits, quantizer.block_sizes[-1]) == (bits, group_size)

    form = WeightFormat(bits=bits, group_size=group_size)
    scale = torch.ones(256)
    if variant != "awq_clip":
        # Its candidates are those with b = 1 - a.
        magnitude, share = inputs.abs().mean(0), awq.shares(weight, form).mean(0)
        powers = [magnitude.pow(a) / share.pow(1 - a) for a in torch.linspace(0, 1, 11)]
        tried = [each / (each.amax() * each.amin()).sqrt() for each in powers]
        scale = min(
            tried, key=lambda s: float((inputs @ (scales.nearest(weight * s, form) / s - weight).T).square().sum())
        )
        torch.testing.assert_close(scale, 1 / model[0].input_quantizer.pre_quant_scale.flatten(), rtol=1e-4, atol=0)
        scale = 1 / model[0].input_quantizer.pre_quant_scale.flatten()
    groups = grouped(weight * scale, group_size)
    grid = scales.from_extremes(groups, form)
    if variant != "awq_lite":
        # Each range by itself, as gptq.py takes them; awq.py's choose together (below).
        reads = grouped(inputs / scale, group_size).transpose(0, 1)
        grid = scales.searched(groups, form, reads.mT @ reads)
    ours = grid.rounded(groups).flatten(1)
    steps = ((ours - theirs).abs() / grid.scale.repeat_interleave(group_size, 1)).flatten()
    # A group whose two best ranges lose the same to the last bit may take either.
    assert (steps > 1e-3).sum() <= 0.005 * len(steps)
    assert len(steps) == 96 * 256
    assert ((ours - weight * scale).abs() > 1e-6).float().mean() > 0.5


def test_a_first_token_has_no_more_than_its_share_of_the_rows() -> None:
    seen = Observed(2)
    for window in range(8):
        seen.see("q", torch.arange(16.0)[:, None] + 100 * window)
    kept, some = seen.rows("q").flatten(), seen.rows("q", 2).flatten()
    assert (len(kept), len(some)) == (64, 32)
    assert set(some.tolist()) <= set(kept.tolist())
    assert [(rows % 100 == 0).sum().item() for rows in (kept, some)] == [4, 2]


@pytest.mark.parametrize("form", [INT4, INT4.model_copy(update={"symmetric": False})])
@torch.inference_mode()
def test_ranges_chosen_together_lose_less_and_leave_outputs_their_size(form: WeightFormat) -> None:
    """Inputs that go up and down together, and are not zero on average, as those of linears are."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(64, 256, generator=generator)
    rows = torch.randn(3000, 16, generator=generator) @ torch.randn(16, 256, generator=generator)
    rows += torch.randn(3000, 256, generator=generator) + torch.randn(256, generator=generator)
    seen, unseen = rows[:2000], rows[2000:]
    groups, reads = grouped(weight, 32), grouped(seen, 32)
    blocks = reads.transpose(0, 1)
    packed = awq.rounded(weight, seen, form, clip=True)
    values = {
        "extremes": scales.nearest(weight, form),
        "each": scales.searched(groups, form, blocks.mT @ blocks).rounded(groups).flatten(1),
        "together": values_of(packed, form, 256),
    }
    for some in (seen, unseen):
        exact = some @ weight.T
        lost = {name: float((some @ found.T - exact).norm() / exact.norm()) for name, found in values.items()}
        assert lost["together"] < 0.95 * lost["each"] < 0.9 * lost["extremes"], lost
        if some is seen:
            assert packed.error == pytest.approx(lost["together"], rel=1e-4)
    exact = seen @ weight.T
    sizes = {name: (exact * (seen @ found.T)).sum(0) / exact.square().sum(0) for name, found in values.items()}
    torch.testing.assert_close(sizes["together"], torch.ones(64), rtol=1e-5, atol=0)
    assert float(sizes["each"].mean()) < 0.999, sizes


def test_a_matrix_is_searched_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    groups, reads = grouped(torch.randn(50, 64), 32), grouped(torch.randn(40, 64), 32)
    codes, grid = scales.together(groups, INT4, reads)
    monkeypatch.setattr(scales, "_ROWS", 24)
    some_codes, some_grid = scales.together(groups, INT4, reads)
    torch.testing.assert_close(some_grid.scale, grid.scale)
    assert (some_codes != codes).sum() == 0


def test_rows_without_inputs_or_without_weights_are_rounded_to_nearest() -> None:
    form = WeightFormat(bits=4, group_size=32)
    weight = torch.randn(4, 64)
    weight[1] = 0
    groups = grouped(weight, 32)
    for rows in (torch.zeros(10, 64), torch.randn(10, 64) * 1e-30):
        codes, grid = scales.together(groups, form, grouped(rows, 32))
        torch.testing.assert_close(grid.scale, scales.from_extremes(groups, form).scale)
        torch.testing.assert_close(codes.float(), scales.from_extremes(groups, form).codes(groups))
