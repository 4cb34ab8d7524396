"""Packed weights as others leave them: what llmc's own export never writes, and what cannot be read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import packed_folders
import pytest
import tiny
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from llmc import model
from llmc.cli import group
from llmc.converters.convert import convert
from llmc.converters.export import export
from llmc.errors import CheckpointError, LlmcError, UnsupportedModelError, UserError
from llmc.quant.quantize import quantize
from llmc.recipe import QuantRecipe, WeightFormat

TOKENS = torch.tensor([tiny.tokens(40)])
Tensors = dict[str, torch.Tensor]
Folder = Callable[..., Path]

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def folder(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> Folder:
    """A packed folder, edited."""

    def make(
        layout: str, edit: Callable[[Tensors, dict[str, Any]], object], *, case: str = "llama", symmetric: bool = True
    ) -> Path:
        recipe = QuantRecipe(algorithm="rtn", weights=WeightFormat(bits=4, group_size=32, symmetric=symmetric))
        quantize(tiny_checkpoint(case), tmp_path / "quantized", recipe, overwrite=True)
        out = tmp_path / f"packed-{len(list(tmp_path.iterdir()))}"
        export(layout, tmp_path / "quantized", out)
        tensors = load_file(out / "model.safetensors")
        config = json.loads((out / "config.json").read_text(encoding="utf-8"))
        edit(tensors, config["quantization_config"])
        save_file({name: value.clone() for name, value in tensors.items()}, out / "model.safetensors")
        (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
        (out / "manifest.json").unlink()  # as if somebody else had made it
        return out

    return make


def computes_the_same(found: Path, packed: Path, dense: Path) -> None:
    """What llmc read, and what the layout's own means give."""
    theirs = tiny.load(packed_folders.dequantize(packed, dense)).float()
    with torch.no_grad():
        expected = theirs(TOKENS).logits
        met = model.load(model.Checkpoint(found))(TOKENS)
    np.testing.assert_allclose(met, expected, atol=1e-4, rtol=0)


def test_biases_of_zeros_where_a_model_has_none(folder: Folder, tmp_path: Path) -> None:
    """AutoGPTQ gave every linear a bias: Qwen2-7B-Instruct-GPTQ-Int4 has `mlp.down_proj.bias`."""

    def edit(tensors: Tensors, _: object) -> None:
        tensors[f"{Q}.bias"] = torch.zeros(64, dtype=torch.float16)

    assert f"{Q}.bias" not in convert(folder("gptq", edit), tmp_path / "found").infos

    def spoil(tensors: Tensors, _: object) -> None:
        tensors[f"{Q}.bias"] = torch.ones(64)

    with pytest.raises(CheckpointError, match=r"q_proj\.bias.*has none"):
        convert(folder("gptq", spoil), tmp_path / "other")


def test_a_row_with_one_scale(folder: Folder, tmp_path: Path) -> None:
    """group_size -1: one scale a row, as several equal ones of ours."""

    def edit(tensors: Tensors, config: dict[str, Any]) -> None:
        config["group_size"] = -1
        for name in list(tensors):
            if name.endswith((".scales", ".qzeros")):
                tensors[name] = tensors[name][:1]
            if name.endswith(".g_idx"):
                tensors[name] = torch.zeros_like(tensors[name])

    packed = folder("gptq", edit)
    found = convert(packed, tmp_path / "found")
    assert found.recipe is not None
    assert found.recipe.weights is not None
    assert found.recipe.weights.group_size == 128
    computes_the_same(tmp_path / "found", packed, tmp_path / "dense")


def test_groups_larger_than_a_recipe_has(folder: Folder, tmp_path: Path) -> None:
    """96 inputs a group: of 32 each, the same scale three times."""

    def edit(tensors: Tensors, config: dict[str, Any]) -> None:
        config["group_size"] = 96
        for name in list(tensors):
            if name.endswith((".scales", ".qzeros")):
                tensors[name] = tensors[name][:1]
            if name.endswith(".g_idx"):
                tensors[name] = torch.zeros_like(tensors[name])

    packed = folder("gptq", edit, symmetric=False)
    found = convert(packed, tmp_path / "found")
    assert found.recipe is not None
    assert found.recipe.weights is not None
    assert (found.recipe.weights.group_size, found.recipe.weights.symmetric) == (32, False)
    computes_the_same(tmp_path / "found", packed, tmp_path / "dense")


@pytest.mark.parametrize("actorder", ["weight", "group"])
def test_the_orders_of_compressed_tensors(actorder: str, folder: Folder, tmp_path: Path) -> None:
    """llm-compressor's GPTQ: "weight" (or "static") leaves groups in runs, "group" scattered them."""

    def edit(tensors: Tensors, config: dict[str, Any]) -> None:
        config["config_groups"]["group_0"]["weights"]["actorder"] = actorder
        for module in packed_folders.modules(tensors, "weight_packed") if actorder == "group" else ():
            runs = torch.arange(int(tensors[f"{module}.weight_shape"][1]), dtype=torch.int32) // 32
            tensors[f"{module}.weight_g_idx"] = runs[torch.randperm(len(runs))]

    packed = folder("compressed-tensors", edit)
    found = convert(packed, tmp_path / "found")
    assert found.recipe is not None
    assert len(found.recipe.ordered) == (7 if actorder == "group" else 0)
    tensors = load_file(packed / "model.safetensors")
    for name, module in ((Q, "layers.0.attn.q"), (Q.replace("self_attn.q", "mlp.down"), "layers.0.mlp.down")):
        scale, codes = tensors[f"{name}.weight_scale"], packed_folders.shifted(tensors[f"{name}.weight_packed"], 4, 1)
        g_idx = tensors.get(f"{name}.weight_g_idx", torch.arange(codes.shape[1]) // 32)
        expected = (codes - 8) * scale[:, g_idx.long()]
        torch.testing.assert_close(model.tensor(found, f"{module}.weight"), expected)


def test_symmetry_is_what_the_zero_points_say(folder: Folder, tmp_path: Path) -> None:
    found = convert(folder("awq", lambda *_: None), tmp_path / "found")
    assert found.recipe is not None
    assert found.recipe.weights is not None
    assert found.recipe.weights.symmetric  # though AutoAWQ has zero points always

    def edit(tensors: Tensors, config: dict[str, Any]) -> None:
        tensors[f"{Q}.qzeros"][0, 0] ^= 1
        config["sym"] = True  # untrue, and believed by nobody

    packed = folder("gptq", edit)
    found = convert(packed, tmp_path / "other")
    assert found.recipe is not None
    assert found.recipe.weights is not None
    assert not found.recipe.weights.symmetric
    computes_the_same(tmp_path / "other", packed, tmp_path / "dense")


def test_older_words_of_the_same(folder: Folder, tmp_path: Path) -> None:
    def rename(_: object, config: dict[str, Any]) -> None:
        for key, older in {"bits": "w_bit", "group_size": "q_group_size", "version": "version"}.items():
            config[older] = config.pop(key)
        config["version"] = "GEMM"

    packed = folder("awq", rename)
    convert(packed, tmp_path / "found")

    def drop(tensors: Tensors, config: dict[str, Any]) -> None:
        del config["checkpoint_format"]
        for name in [name for name in tensors if name.endswith("g_idx")]:
            del tensors[name]

    convert(folder("gptq", drop), tmp_path / "other")


def refusals() -> dict[str, tuple[str, Callable[[Tensors, dict[str, Any]], object], type[LlmcError], str]]:
    """What is wrong -> layout, edit, error and a piece of what it says."""
    unsupported, damaged = UnsupportedModelError, CheckpointError

    def router(tensors: Tensors, _: object) -> None:
        for part in ("qweight", "qzeros", "scales", "g_idx"):
            tensors[f"model.layers.0.block_sparse_moe.gate.{part}"] = tensors[f"{Q}.{part}"]

    return {
        "a packed router": ("gptq", router, unsupported, r"gate' is packed"),
        "3 bits": ("gptq", lambda _, config: config.update(bits=3), unsupported, "'bits' is 3"),
        "an odd size of group": ("gptq", lambda _, c: c.update(group_size=40), unsupported, "groups of 40 inputs"),
        "another size of group": ("gptq", lambda _, c: c.update(group_size=64), damaged, "has shape"),
        "marlin": ("gptq", lambda _, c: c.update(checkpoint_format="marlin"), unsupported, "'marlin'"),
        "gemv": ("awq", lambda _, config: config.update(version="gemv"), unsupported, "'gemv'"),
        "an unknown method": ("awq", lambda _, c: c.update(quant_method="hqq"), unsupported, "'hqq'.*gptq, awq"),
        "quantized activations": (
            "compressed-tensors",
            lambda _, config: config["config_groups"]["group_0"].update(input_activations={"num_bits": 8}),
            unsupported,
            "'input_activations'",
        ),
        "another format": (
            "compressed-tensors",
            lambda _, config: config["config_groups"]["group_0"].update(format="marlin-24"),
            unsupported,
            "'marlin-24'",
        ),
        "a tensor missing": ("gptq", lambda tensors, _: tensors.pop(f"{Q}.qzeros"), damaged, "q_proj.qzeros.*missing"),
        "a tensor too many": ("awq", lambda t, _: t.update({f"{Q}.g_idx": t[f"{Q}.qzeros"]}), damaged, "q_proj.g_idx"),
        "another type": ("awq", lambda t, _: t.update({f"{Q}.qzeros": t[f"{Q}.qzeros"].long()}), damaged, "int64"),
        "no packed tensor": (
            "awq",
            lambda tensors, _: [tensors.pop(name) for name in list(tensors) if ".scales" in name],
            damaged,
            "none is",
        ),
    }


@pytest.mark.parametrize("what", refusals())
def test_what_cannot_be_read_is_refused_by_name(what: str, folder: Folder, tmp_path: Path) -> None:
    layout, edit, error, said = refusals()[what]
    with pytest.raises(error, match=said):
        convert(folder(layout, edit, case="mixtral"), tmp_path / "found")
    assert not (tmp_path / "found").exists()


def test_an_adapter_is_not_merged_into_packed_weights(folder: Folder, tmp_path: Path) -> None:
    base = folder("gptq", lambda *_: None)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj"]}), encoding="utf-8"
    )
    save_file({"base_model.model.x.lora_A.weight": torch.zeros(4, 4)}, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match="is quantized"):
        convert(adapter, tmp_path / "found", base=base)


def test_the_command_says_so(folder: Folder, tmp_path: Path) -> None:
    packed = folder("gptq", lambda *_: None)
    made = CliRunner().invoke(group, ["convert", str(packed), str(tmp_path / "found")])
    assert made.exit_code == 0, made.output
    assert "4 bits, groups of 32" in made.output
    assert "llmc build-engine" in made.output
    assert "llmc quantize" not in made.output
    source = json.loads((tmp_path / "found/source/config.json").read_text(encoding="utf-8"))
    assert "quantization_config" not in source
