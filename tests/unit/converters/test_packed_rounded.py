"""Rounded inputs and float8 out: compressed-tensors and transformers compute what the checkpoint does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from llmc import model
from llmc.checkpoint import Checkpoint
from llmc.converters.convert import convert
from llmc.converters.export import FORMATS, export
from llmc.errors import UnsupportedModelError, UserError
from llmc.quant.corpus import Calibration
from llmc.quant.quantize import quantize
from llmc.recipe import ActivationFormat, QuantRecipe, WeightFormat

TOKENS = torch.tensor([tiny.tokens(40)])
ROWS, FP8 = WeightFormat(bits=8, group_size=0), WeightFormat(kind="fp8", bits=8, group_size=0)
MATRIX = FP8.model_copy(update={"per_tensor": True})
GROUPS = WeightFormat(bits=4, group_size=32)
KEPT = ("embed", "head", "layers.1.attn.o")


def recipe(algorithm: str, weights: WeightFormat, kind: Any, dynamic: bool, **more: Any) -> QuantRecipe:
    inputs = ActivationFormat(kind=kind, dynamic=dynamic) if kind else None
    return QuantRecipe(algorithm=algorithm, weights=weights, activations=inputs, keep=KEPT, **more)


# -> model, recipe, largest error of logits against their spread: a value in the middle between two codes may fall to
# either side.
CASES: dict[str, tuple[str, QuantRecipe, float]] = {
    "int8": ("qwen2", recipe("w8a8", ROWS, "int8", True), 0.02),
    "int8 static": ("llama", recipe("w8a8", ROWS, "int8", False), 1e-3),
    "int8 static, smoothed": (
        "llama-multi-head",
        recipe("smoothquant", ROWS, "int8", False, options={"alpha": 0.5}),
        0.1,
    ),
    "fp8": ("qwen3", recipe("fp8", FP8, "fp8", True), 0.01),
    "fp8 static, per tensor": ("llama", recipe("fp8", MATRIX, "fp8", False), 0.01),
    "fp8 weights alone": ("llama", recipe("fp8", FP8, None, True), 1e-4),
}


def made(name: str, how: QuantRecipe, tiny_checkpoint: Callable[[str], Path], folder: Path) -> Checkpoint:
    static = how.algorithm == "smoothquant" or (how.activations and not how.activations.dynamic)
    calibration = Calibration(tokens=1024) if static else None
    quantize(tiny_checkpoint(name), folder, how, calibration=calibration)
    return Checkpoint(folder)


def logits(of: Any) -> np.ndarray:
    with torch.no_grad():
        found = of(TOKENS)
    array: np.ndarray = (found if isinstance(found, torch.Tensor) else found.logits)[0].float().numpy()
    return array


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_transformers_computes_the_same(
    case: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compressed_tensors.quantization.lifecycle import forward
    from transformers import AutoModelForCausalLM

    found = forward.compute_dynamic_scales_and_zp

    def as_vllm(*given: Any, **more: Any) -> Any:
        """A token's largest value is code 127 in vLLM's kernels and here, 127.5 in the package's own forward."""
        scale, zero = found(*given, **more)
        return scale * (127.5 / 127), zero

    name, how, share = CASES[case]
    original = made(name, how, tiny_checkpoint, tmp_path / "quantized")
    export("compressed-tensors", tmp_path / "quantized", tmp_path / "out")
    if case == "int8":
        monkeypatch.setattr(forward, "compute_dynamic_scales_and_zp", as_vllm)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected, exact = logits(model.load(original)), logits(model.load(Checkpoint(tiny_checkpoint(name))))
    lost = np.abs(logits(loaded) - expected)
    assert lost.max() < share * expected.std()
    assert lost.mean() < 0.5 * np.abs(exact - expected).mean()
    with pytest.raises(UnsupportedModelError, match=r"'input_activations' is|'format' is 'float-quantized'"):
        convert(tmp_path / "out", tmp_path / "back")


@pytest.mark.parametrize("form", [name for name, row in FORMATS.items() if row.quantized])
@pytest.mark.parametrize(
    ("how", "message"),
    [
        (recipe("rtn", GROUPS, "int8", True), "no place for rounded inputs and float8"),
        (recipe("smoothquant", ROWS, "int8", False, options={"alpha": 0.5, "shift": True}), "are shifted before"),
        (recipe("w8a8", ROWS, "int8", True), "no place for rounded inputs and float8"),
        (recipe("fp8", FP8, None, True), "no place for rounded inputs and float8"),
    ],
    ids=["w4a8", "shifted", "w8a8", "fp8"],
)
def test_what_has_no_place_is_refused(
    form: str, how: QuantRecipe, message: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    if form == "compressed-tensors" and how.algorithm in ("w8a8", "fp8"):
        pytest.skip("it has")
    made("llama", how, tiny_checkpoint, tmp_path / "quantized")
    with pytest.raises(UserError, match=message):
        export(form, tmp_path / "quantized", tmp_path / "out")
    assert not (tmp_path / "out").exists()
