"""The folder for Model Optimizer's users, against the one that Model Optimizer itself writes, tensor by tensor."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

from llmc.converters.export import export
from llmc.quant.quantize import quantize
from llmc.recipe import QuantRecipe, WeightFormat

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def modelopt() -> Any:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        import modelopt.torch.export
        import modelopt.torch.export.convert_hf_config
        import modelopt.torch.quantization
    return modelopt.torch


def theirs(modelopt: Any, source: Path, out: Path, config: dict[str, Any]) -> None:
    """What Model Optimizer makes of a model by rounding to nearest."""
    model = tiny.load(source)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), torch.no_grad():
        modelopt.quantization.quantize(
            model, config, lambda found: found(torch.tensor([tiny.tokens(8)]), use_cache=False)
        )
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
