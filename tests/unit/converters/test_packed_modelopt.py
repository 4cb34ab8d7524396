"""The folder for Model Optimizer's users, against the one that Model Optimizer itself writes, tensor by tensor."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file

from llmc.checkpoint import Checkpoint
from llmc.converters.convert import convert
from llmc.converters.export import export
from llmc.errors import CheckpointError, UnsupportedModelError
from llmc.quant import algorithm
from llmc.quant.corpus import Calibration, read
from llmc.quant.quantize import quantize
from llmc.recipe import BLOCKS as FORMATS
from llmc.recipe import ActivationFormat, QuantRecipe, WeightFormat
from llmc.tokenizer import Tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def modelopt() -> Any:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        import modelopt.torch.export
        import modelopt.torch.export.convert_hf_config
        import modelopt.torch.quantization
    return modelopt.torch


def theirs(modelopt: Any, source: Path, out: Path, config: dict[str, Any], windows: Sequence[Any] | None = ()) -> None:
    """What Model Optimizer makes of a model, calibrated on windows of ids; with None it runs nothing."""
    model = tiny.load(source).float()
    read = [torch.tensor(window)[None] for window in windows or ()] or [torch.tensor([tiny.tokens(8)])]

    def forward(found: Any) -> None:
        for ids in read:
            found(ids, use_cache=False)

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), torch.no_grad():
        modelopt.quantization.quantize(model, config, None if windows is None else forward)
        modelopt.export.export_hf_checkpoint(model, export_dir=out)


@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (8, 128)])
@pytest.mark.parametrize("case", ["llama", "qwen2"])
def test_equals_what_modelopt_exports(
    modelopt: Any, case: str, bits: int, group_size: int, tiny_source: Callable[[str], Path],
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path,
) -> None:  # fmt: skip
    presets = modelopt.quantization
    config = copy.deepcopy(presets.INT4_BLOCKWISE_WEIGHT_ONLY_CFG if bits == 4 else presets.INT8_WEIGHT_ONLY_CFG)
    for entry in config["quant_cfg"]:
        if "block_sizes" in (entry.get("cfg") or {}):
            entry["cfg"]["block_sizes"] = {-1: group_size}
    theirs(modelopt, tiny_source(case), tmp_path / "theirs", config)
    form = WeightFormat(bits=bits, group_size=group_size)  # type: ignore[arg-type]
    keep = ("embed", "head")
    quantize(tiny_checkpoint(case), tmp_path / "quantized", QuantRecipe(algorithm="rtn", weights=form, keep=keep))
    export("modelopt", tmp_path / "quantized", tmp_path / "ours")

    expected, met = (load_file(tmp_path / side / "model.safetensors") for side in ("theirs", "ours"))
    assert expected.keys() == met.keys()
    packed = [name for name in expected if name.endswith("_proj.weight")]
    assert len(packed) == 14
    for name, value in expected.items():
        assert (met[name].dtype, met[name].shape) == (value.dtype, value.shape)
        if name in packed:
            # A weight within a float's error of the middle between two codes may fall to either side.
            assert float((met[name] != value).float().mean()) < 1e-3
        else:
            torch.testing.assert_close(met[name], value, rtol=1e-6, atol=0)

    said, ours = (json.loads((tmp_path / side / "hf_quant_config.json").read_text()) for side in ("theirs", "ours"))
    # Theirs says that there are scales of the inputs, and has none.
    assert ours["quantization"] == {**said["quantization"], **({"pre_quant_scale": False} if bits == 4 else {})}
    config_of_theirs, config_of_ours = (
        json.loads((tmp_path / side / "config.json").read_text())["quantization_config"] for side in ("theirs", "ours")
    )
    assert config_of_ours == config_of_theirs
    assert config_of_ours == modelopt.export.convert_hf_config.convert_hf_quant_config_format(ours)


WORDS = "the quick brown fox jumps over the lazy dog and there the other user was 0123456789 {[(+-*/)]} "
ROWS, FP8 = WeightFormat(bits=8, group_size=0), WeightFormat(kind="fp8", bits=8, group_size=0)
MATRIX = FP8.model_copy(update={"per_tensor": True})

# Its preset -> algorithm, weights, inputs
ROUNDED = {
    "FP8_DEFAULT_CFG": ("fp8", MATRIX, ActivationFormat(kind="fp8", dynamic=False)),
    "FP8_PER_CHANNEL_PER_TOKEN_CFG": ("fp8", FP8, ActivationFormat(kind="fp8")),
    "INT8_DEFAULT_CFG": ("w8a8", ROWS, ActivationFormat(dynamic=False)),
    "INT8_SMOOTHQUANT_CFG": ("smoothquant", ROWS, ActivationFormat(dynamic=False)),
}


@pytest.mark.parametrize("preset", ROUNDED)
def test_rounded_inputs_equal_what_modelopt_exports(
    modelopt: Any, preset: str, tiny_source: Callable[[str], Path], tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
) -> None:  # fmt: skip
    algorithm, weights, inputs = ROUNDED[preset]
    case, smooths = "llama-multi-head", algorithm == "smoothquant"
    (tmp_path / "text.txt").write_text(WORDS * 30, encoding="utf-8")
    calibration = Calibration(path=tmp_path / "text.txt", tokens=1024, window=64)
    windows = list(read(calibration, Tokenizer.load(tiny_checkpoint(case)), 64).windows)
    config = copy.deepcopy(getattr(modelopt.quantization, preset))
    if smooths:
        # From the inputs alone, so that those of linears that read the same are the same, as they are here.
        config["algorithm"] = {"method": "smoothquant", "alpha": 1.0}
    theirs(modelopt, tiny_source(case), tmp_path / "theirs", config, windows)
    recipe = QuantRecipe(
        algorithm=algorithm, weights=weights, activations=inputs, keep=("embed", "head"),
        options={"alpha": 1.0} if smooths else {},
    )  # fmt: skip
    quantize(tiny_checkpoint(case), tmp_path / "quantized", recipe, calibration=None if inputs.dynamic else calibration)
    export("modelopt", tmp_path / "quantized", tmp_path / "ours")

    expected, met = (load_file(tmp_path / side / "model.safetensors") for side in ("theirs", "ours"))
    # SmoothQuant's scales are in the norms and in the linears before here, and beside each linear there.
    beside = {name for name in expected if name.endswith("pre_quant_scale")}
    assert len(beside) == (sum(name.endswith("_proj.weight") for name in met) if smooths else 0)
    assert expected.keys() - beside == met.keys()
    different, total = 0, 0
    for name in met:
        value = expected[name]
        assert (met[name].dtype, met[name].shape) == (value.dtype, value.shape)
        if value.dtype in (torch.int8, torch.float8_e4m3fn):
            codes = met[name].view(torch.int8), value.view(torch.int8)
            different, total = different + int((codes[0] != codes[1]).sum()), total + value.numel()
        elif not smooths or name.endswith("input_scale"):
            torch.testing.assert_close(met[name], value, rtol=1e-4, atol=0)
    assert total > 14 * 64 * 64
    assert different <= 3  # ties

    said, ours = (json.loads((tmp_path / side / "hf_quant_config.json").read_text()) for side in ("theirs", "ours"))
    assert ours["quantization"] == said["quantization"]
    assert json.loads((tmp_path / "ours" / "config.json").read_text())[
        "quantization_config"
    ] == modelopt.export.convert_hf_config.convert_hf_quant_config_format(ours)


# Its preset -> our algorithm, and the types of a linear's tensors.
NVFP4 = {"weight": torch.uint8, "weight_scale": torch.float8_e4m3fn, "weight_scale_2": torch.float32}
BLOCKS = {
    "W4A16_NVFP4_CFG": ("nvfp4", NVFP4),
    "MXFP4_DEFAULT_CFG": ("mxfp4", {"weight": torch.uint8, "weight_scale": torch.uint8}),
    "MXFP8_DEFAULT_CFG": ("mxfp8", {"weight": torch.float8_e4m3fn, "weight_scale": torch.uint8}),
}


@pytest.mark.parametrize(("case", "linears"), [("llama", 14), ("glm", 12), ("gpt2-untied", 12)])
@pytest.mark.parametrize("preset", BLOCKS)
def test_block_floating_point_equals_what_modelopt_exports(
    modelopt: Any, preset: str, case: str, linears: int, tiny_source: Callable[[str], Path],
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Its simulation needs CUDA, its packing does not."""
    (kind, types), config = BLOCKS[preset], copy.deepcopy(getattr(modelopt.quantization, preset))
    config["quant_cfg"].append({"quantizer_name": "*input_quantizer", "enable": False})
    theirs(modelopt, tiny_source(case), tmp_path / "theirs", config, None)
    monkeypatch.setattr(algorithm, "has_cuda", lambda: True)
    blocks = FORMATS[kind]
    form = WeightFormat(kind=kind, bits=blocks.bits, group_size=blocks.size)  # type: ignore[arg-type]
    quantize(tiny_checkpoint(case), tmp_path / "q", QuantRecipe(algorithm=kind, weights=form, keep=("embed", "head")))
    export("modelopt", tmp_path / "q", tmp_path / "ours")

    expected, met = (load_file(tmp_path / side / "model.safetensors") for side in ("theirs", "ours"))
    assert expected.keys() == met.keys()
    for name, value in expected.items():
        assert (met[name].dtype, met[name].shape) == (value.dtype, value.shape)
        assert torch.equal(met[name].reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8)), name
    packed = [name.removesuffix(".weight_scale") for name in met if name.endswith(".weight_scale")]
    assert len(packed) == linears
    for module in packed:
        assert {suffix: met[f"{module}.{suffix}"].dtype for suffix in types} == types

    said, ours = (json.loads((tmp_path / side / "hf_quant_config.json").read_text()) for side in ("theirs", "ours"))
    config_of_theirs, config_of_ours = (
        json.loads((tmp_path / side / "config.json").read_text())["quantization_config"] for side in ("theirs", "ours")
    )
    # Learned positions are no linear, and not named here.
    for named in (said["quantization"]["exclude_modules"], config_of_theirs["ignore"]):
        named[:] = [module for module in named if module != "transformer.wpe"]
    assert ours["quantization"] == said["quantization"]
    assert config_of_ours == config_of_theirs

    # And back, ours and theirs.
    for side in ("theirs", "ours"):
        convert(tmp_path / side, tmp_path / f"{side}-again")
        again, first = Checkpoint(tmp_path / f"{side}-again"), Checkpoint(tmp_path / "q")
        assert again.recipe is not None
        assert (again.recipe.weights, again.recipe.keep) == (form, ("embed", "head"))
        assert list(again) == list(first)
        for name in first:
            assert again[name].dtype == first[name].dtype
            assert np.array_equal(again[name].reshape(-1).view(np.uint8), first[name].reshape(-1).view(np.uint8)), name


def test_what_rounds_inputs_to_4_bits_is_not_read(tmp_path: Path, tiny_source: Callable[[str], Path]) -> None:
    shutil.copytree(tiny_source("llama"), tmp_path / "theirs")
    said = {"quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": None, "group_size": 16}}
    (tmp_path / "theirs" / "hf_quant_config.json").write_text(json.dumps(said), encoding="utf-8")
    with pytest.raises(UnsupportedModelError, match="'quant_algo' is 'NVFP4': of modelopt's llmc reads "):
        convert(tmp_path / "theirs", tmp_path / "out")


def test_linears_in_one_have_one_scale(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(algorithm, "has_cuda", lambda: True)
    form = WeightFormat(kind="nvfp4", bits=4, group_size=16)
    quantize(tiny_checkpoint("glm"), tmp_path / "q", QuantRecipe(algorithm="nvfp4", weights=form))
    stored = Checkpoint.__getitem__
    monkeypatch.setattr(
        Checkpoint, "__getitem__", lambda of, name: stored(of, name) * (2 if name.endswith("up.scale_2") else 1)
    )
    with pytest.raises(CheckpointError, match=r"mlp\.gate and layers\.0\.mlp\.up are one linear, and their 'scale_2'"):
        export("modelopt", tmp_path / "q", tmp_path / "out")
    assert not (tmp_path / "out").exists()
