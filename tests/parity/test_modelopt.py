"""Rounded activations against nvidia-modelopt: the same codes, the same scales, the same logits of a whole model."""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from llmc import model
from llmc.checkpoint import Checkpoint
from llmc.quant.corpus import Calibration, read
from llmc.quant.quantize import quantize
from llmc.recipe import ActivationFormat, QuantRecipe, WeightFormat
from llmc.tokenizer import Tokenizer

ATTENTION, MLP = ("q", "k", "v", "o"), ("gate", "up", "down")
NAMES = {f"attn.{name}": f"self_attn.{name}_proj" for name in ATTENTION} | {
    f"mlp.{name}": f"mlp.{name}_proj" for name in MLP
}
LINEARS = {f"layers.{n}.{ours}": f"model.layers.{n}.{theirs}" for n in range(2) for ours, theirs in NAMES.items()}
WORDS = "the quick brown fox jumps over the lazy dog and there the other user was 0123456789 {[(+-*/)]} "
INT8, FP8 = WeightFormat(bits=8, group_size=0), WeightFormat(kind="fp8", bits=8, group_size=0)
PER_TENSOR = FP8.model_copy(update={"per_tensor": True})
PER_TOKEN = {"num_bits": 8, "axis": None, "type": "dynamic", "block_sizes": {-1: None}}

# name -> (modelopt's config, its algorithm, what its input quantizers are given), recipe
CASES: dict[str, tuple[tuple[str, Any, Any], QuantRecipe]] = {
    "int8 static": (
        ("INT8_DEFAULT_CFG", "max", None),
        QuantRecipe(algorithm="w8a8", weights=INT8, activations=ActivationFormat(dynamic=False)),
    ),
    "int8 dynamic": (
        ("INT8_DEFAULT_CFG", "max", PER_TOKEN),
        QuantRecipe(algorithm="w8a8", weights=INT8, activations=ActivationFormat()),
    ),
    "fp8 static, per tensor": (
        ("FP8_DEFAULT_CFG", "max", None),
        QuantRecipe(algorithm="fp8", weights=PER_TENSOR, activations=ActivationFormat(kind="fp8", dynamic=False)),
    ),
    "fp8 dynamic, per row": (
        ("FP8_PER_CHANNEL_PER_TOKEN_CFG", "max", None),
        QuantRecipe(algorithm="fp8", weights=FP8, activations=ActivationFormat(kind="fp8")),
    ),
    "smoothquant of alpha 1": (
        ("INT8_SMOOTHQUANT_CFG", {"method": "smoothquant", "alpha": 1.0}, None),
        QuantRecipe(
            algorithm="smoothquant", weights=INT8, activations=ActivationFormat(dynamic=False), options={"alpha": 1.0}
        ),
    ),
    "smoothquant of alpha 0.5": (
        ("INT8_SMOOTHQUANT_CFG", {"method": "smoothquant", "alpha": 0.5}, None),
        QuantRecipe(
            algorithm="smoothquant", weights=INT8, activations=ActivationFormat(dynamic=False), options={"alpha": 0.5}
        ),
    ),
}


def modelopts(source: Any, windows: list[Any], preset: str, algorithm: Any, inputs: Any) -> Any:
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        import modelopt.torch.quantization as mtq

        config = copy.deepcopy(getattr(mtq, preset))
        config["algorithm"] = algorithm
        if inputs:
            for entry in config["quant_cfg"]:
                if entry["quantizer_name"] == "*input_quantizer":
                    entry["cfg"] = inputs
        return mtq.quantize(
            source, config, lambda found: [found(torch.from_numpy(w)[None], use_cache=False) for w in windows]
        )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_same_as_modelopt(case: str, tmp_path: Path, tiny_checkpoint: Callable[[str], Path]) -> None:
    (preset, algorithm, inputs), recipe = CASES[case]
    folder = tiny_checkpoint("llama-multi-head")
    (tmp_path / "text.txt").write_text(WORDS * 30, encoding="utf-8")
    calibration = Calibration(path=tmp_path / "text.txt", tokens=1024, window=64)
    recipe = recipe.model_copy(update={"keep": ("embed", "head")})
    is_dynamic = bool(recipe.activations and recipe.activations.dynamic)
    quantize(folder, tmp_path / "out", recipe, calibration=None if is_dynamic else calibration)
    windows = list(read(calibration, Tokenizer.load(folder), 64).windows)
    theirs = modelopts(tiny.TINY["llama-multi-head"].build(), windows, preset, algorithm, inputs)
    ours = Checkpoint(tmp_path / "out")

    # Linears that read the same input share a scale here, and have one each there, unless the inputs alone decide.
    compared = [name for name in LINEARS if not case.endswith("0.5") or name.endswith((".o", ".down"))]
    middle, highest = (0, 448) if recipe.algorithm == "fp8" else (128, 127)
    different, total = 0, 0
    for name in compared:
        module = theirs.get_submodule(LINEARS[name])
        wanted, scale = module.weight_quantizer(module.weight), ours[f"{name}.scale"]
        # Rows may have been divided for what reads them: codes tell, values do not.
        per_row = module.weight_quantizer.amax.reshape(-1, 1) / highest
        codes = torch.from_numpy(ours[f"{name}.qweight"].astype("float32")) - middle
        missed = (wanted / per_row - codes).abs() > 1e-3 * codes.abs().clamp(min=1)
        different, total = different + int(missed.sum()), total + missed.numel()
        assert scale.shape == per_row.shape
        if not is_dynamic:
            reach = float(module.input_quantizer.amax) / highest
            assert float(ours[f"{name}.input_scale"][0]) == pytest.approx(reach, rel=1e-4)
    assert total >= len(compared) * 64 * 64
    assert different <= 3  # ties

    tokens = torch.tensor([tiny.tokens(60)])
    got, expected, exact = model.load(ours)(tokens), logits(theirs, tokens), model.load(Checkpoint(folder))(tokens)
    if compared == list(LINEARS):
        assert (got - expected).norm() < 0.05 * (exact - expected).norm()
    assert (got - exact).norm() > 0


def logits(theirs: Any, tokens: Tensor) -> Tensor:
    found: Tensor = theirs(tokens, use_cache=False).logits
    return found
