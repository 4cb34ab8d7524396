"""Rounded inputs and float8 out: compressed-tensors and transformers compute what the checkpoint does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

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
    assert_same(original, convert(tmp_path / "out", tmp_path / "back"))


def assert_same(original: Checkpoint, found: Checkpoint) -> None:
    """Codes, scales, and what inputs go through, to the bit, and the same said of them."""
    assert original.recipe is not None
    assert found.recipe is not None
    assert found.recipe.algorithm == "imported"
    assert (found.recipe.activations, found.recipe.weights) == (original.recipe.activations, original.recipe.weights)
    assert set(found) == set(original)
    for name in original:
        assert found[name].dtype == original[name].dtype
        np.testing.assert_array_equal(found[name].view(np.uint8), original[name].view(np.uint8))
    np.testing.assert_array_equal(logits(model.load(found)), logits(model.load(original)))


MODELOPT = {
    "FP8": ("llama", recipe("fp8", MATRIX, "fp8", False)),
    "FP8_PER_CHANNEL_PER_TOKEN": ("glm", recipe("fp8", FP8, "fp8", True)),
    "W8A8_SQ_PER_CHANNEL": ("qwen2", recipe("w8a8", ROWS, "int8", False)),
    "W8A8_SQ_PER_CHANNEL, multiplied": (
        "gpt2-untied",
        recipe("smoothquant", ROWS, "int8", False, options={"alpha": 0.5}),
    ),
}


@pytest.mark.parametrize("case", MODELOPT)
def test_modelopt_and_back(case: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    name, how = MODELOPT[case]
    original = made(name, how, tiny_checkpoint, tmp_path / "quantized")
    export("modelopt", tmp_path / "quantized", tmp_path / "out")
    said = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text(encoding="utf-8"))["quantization"]
    assert said["quant_algo"] == case.partition(",")[0]
    with safe_open(tmp_path / "out" / "model.safetensors", "np") as file:
        names = list(file.keys())
    assert any(name.endswith("pre_quant_scale") for name in names) == ("multiplied" in case)
    assert_same(original, convert(tmp_path / "out", tmp_path / "back"))


@pytest.mark.parametrize("case", ["glm", "baichuan-13b"])
def test_linears_in_one(case: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """What a family has in one is parted again: scales of rows, and one of the input for each."""
    how = QuantRecipe(algorithm="w8a8", weights=ROWS, activations=ActivationFormat(dynamic=False), keep=KEPT[:2])
    original = made(case, how, tiny_checkpoint, tmp_path / "quantized")
    export("compressed-tensors", tmp_path / "quantized", tmp_path / "out")
    assert_same(original, convert(tmp_path / "out", tmp_path / "back"))


Edit = Callable[[dict[str, Any], dict[str, np.ndarray]], object]


def edited(folder: Path, edit: Edit) -> Path:
    """A folder as if somebody else had made it."""
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    edit(config["quantization_config"], tensors)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, folder / "model.safetensors")
    (folder / "manifest.json").unlink()
    return folder


def test_int8_weights_alone(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """A row's scale, as groups with the same one; and one scale of a matrix, as those of its rows."""
    original = made("llama", recipe("w8a8", ROWS, "int8", True), tiny_checkpoint, tmp_path / "quantized")
    export("compressed-tensors", tmp_path / "quantized", tmp_path / "out")

    def edit(config: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        config["config_groups"]["group_0"]["weights"]["strategy"] = "tensor"
        del config["config_groups"]["group_0"]["input_activations"]
        for name in tensors:
            if name.endswith("weight_scale"):
                tensors[name] = tensors[name][0]

    found = convert(edited(tmp_path / "out", edit), tmp_path / "back")
    assert found.recipe is not None
    assert found.recipe.weights == WeightFormat(bits=8, group_size=128)
    assert found.recipe.activations is None
    width = found["layers.0.attn.q.weight"].shape[1] if "layers.0.attn.q.weight" in found else 64
    np.testing.assert_array_equal(
        found["layers.0.attn.q.qweight"][:, :width], original["layers.0.attn.q.qweight"][:, :width]
    )
    assert (found["layers.0.attn.q.scale"] == original["layers.0.attn.q.scale"][0, 0]).all()


@pytest.mark.parametrize(
    ("where", "key", "value", "message"),
    [
        ("weights", "strategy", "block", "config_groups.group_0.weights: 'strategy' is 'block'"),
        ("weights", "num_bits", 4, "'num_bits' is 4"),
        ("weights", "symmetric", False, "'symmetric' is False"),
        ("weights", "type", "float", "input_activations: 'type' is 'int'"),
        ("input_activations", "strategy", "group", "input_activations: 'strategy' is 'group': llmc reads only 'token'"),
    ],
)
def test_what_a_recipe_cannot_say_is_refused(
    where: str, key: str, value: object, message: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    made("llama", recipe("w8a8", ROWS, "int8", True), tiny_checkpoint, tmp_path / "quantized")
    export("compressed-tensors", tmp_path / "quantized", tmp_path / "out")
    edited(tmp_path / "out", lambda config, _: config["config_groups"]["group_0"][where].update({key: value}))
    with pytest.raises(UnsupportedModelError, match=message):
        convert(tmp_path / "out", tmp_path / "back")
    assert not (tmp_path / "back").exists()


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
    if form == "modelopt" and how.algorithm != "smoothquant":
        message = "no place for rounded inputs but for static int8"
    if form == "compressed-tensors" and how.algorithm == "rtn":
        message = "no place for rounded inputs of weights in groups"
    made("llama", how, tiny_checkpoint, tmp_path / "quantized")
    with pytest.raises(UserError, match=message):
        export(form, tmp_path / "quantized", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["compressed-tensors", "modelopt"])
def test_warnings_say_the_format_that_was_asked_for(
    form: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    how = recipe("w8a8", ROWS, "int8", False).model_copy(update={"keep": ()})
    made("llama", how, tiny_checkpoint, tmp_path / "quantized")
    export(form, tmp_path / "quantized", tmp_path / "out")
    assert f"the format {form} has no place for a quantized embedding or head" in caplog.text
