"""GPTQ's act-order: folders as AutoGPTQ leaves them, against its own formula (packed_folders.py), everywhere."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import packed_folders
import pytest
import tiny
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from llmc import checkpoint, model
from llmc import manifest as manifests
from llmc.builders import ort as builder
from llmc.checkpoint import Checkpoint
from llmc.cli import group
from llmc.converters.convert import convert
from llmc.converters.export import export
from llmc.errors import CheckpointError, UserError
from llmc.runtime import Chunk
from llmc.serve.runners import open_runner

DOWN = "model.layers.1.mlp.down_proj"
TOKENS = np.array(tiny.tokens(40))
Source = Callable[[str], Path]

ZEROS: dict[str, Any] = {"symmetric": False}
V2: dict[str, Any] = {"version": "gptq_v2", **ZEROS}
WIDE = {"hidden_size": 256, "intermediate_size": 288, "head_dim": 32, "num_hidden_layers": 1}

# What is in it -> model (or its config), and how it is packed.
CASES: dict[str, tuple[str | dict[str, Any], dict[str, Any]]] = {
    "q, k, v alike": ("llama", {}),
    "each its own order": ("qwen2", {"shared": False}),
    "zero points": ("llama-bias", ZEROS),
    "zero points as they are": ("qwen3", V2),
    "8 bits": ("qwen2.5-tied", {"bits": 8, **V2}),
    "a last group that is shorter": ("mistral-window", {"group_size": 64}),
    "groups of 128, and a shorter one": (WIDE, {"group_size": 128, **V2}),
    "groups of 96, which recipes have not": (WIDE, {"group_size": 96, "shared": False}),
    "experts": ("mixtral", {"shared": False}),
    "experts with a shared one": ("qwen2-moe", V2),
    "the head": ("llama", {"head": True, **V2}),
    "linears as [in, out]": ("gpt2", {}),
    "gate and up in one": ("glm", V2),
    "q, k and v of each head together": ("bloom", V2),
    "q, k and v in one": ("baichuan-13b", {}),
    "a family that another says": ("chatglm3", {}),
}


def packed_folder(case: str | dict[str, Any], how: dict[str, Any], tiny_source: Source, out: Path) -> Path:
    source = tiny_source(case) if isinstance(case, str) else tiny.save(tiny.Case("llama", case), out.parent / "wide")
    return packed_folders.in_act_order(source, out, **how)


@pytest.mark.parametrize("name", CASES)
def test_it_computes_what_the_formula_says(name: str, tiny_source: Source, tmp_path: Path) -> None:
    packed = packed_folder(*CASES[name], tiny_source, tmp_path / "packed")
    found = convert(packed, tmp_path / "found")
    theirs = tiny.load(packed_folders.dequantize(packed, tmp_path / "dense")).float()
    with torch.no_grad():
        expected = theirs(torch.from_numpy(TOKENS)[None]).logits[0].numpy()
    tolerance = 1e-4 * max(1.0, float(expected.std()))
    np.testing.assert_allclose(reference_logits(found), expected, atol=tolerance, rtol=0)
    builder.build(tmp_path / "found", tmp_path / "engine", arithmetic="float32")
    np.testing.assert_allclose(engine_logits(tmp_path / "engine"), expected, atol=tolerance, rtol=0)
    # The codes are grouped, and the groups are not those of a neighbour's inputs.
    assert found.recipe is not None
    orders = [name for name in found if name.endswith(".input_order")]
    assert len(orders) == sum(found.recipe.is_ordered(name.removesuffix(".input_order")) for name in orders) > 1
    for order in orders:
        assert sorted(found[order]) == list(range(len(found[order]))) != found[order].tolist()


@pytest.mark.parametrize(
    ("shared", "gathers"), [(True, ["qkv", "o", "gate", "down"]), (False, ["q", "k", "v", "o", "gate", "up", "down"])]
)
def test_what_reads_alike_is_gathered_once(
    shared: bool, gathers: list[str], tiny_source: Source, tmp_path: Path
) -> None:
    convert(packed_folder("llama", {"shared": shared}, tiny_source, tmp_path / "packed"), tmp_path / "found")
    engine = builder.build(tmp_path / "found", tmp_path / "engine")
    graph = onnx.load(tmp_path / "engine/model.onnx", load_external_data=False).graph
    met = [node.name for node in graph.node if node.op_type == "Gather" and node.name.endswith("/ordered")]
    assert [name.split("/")[-2] for name in met] == gathers * 2
    assert engine.weights == {"int4 group 32 in act-order": 14, "float32": 2}
    assert engine.kernels["int4 group 32 in act-order"] == "Gather of the inputs, MatMulNBits, products in int8"


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("a family that another says", "the head")])
def test_back_to_gptq(name: str, tiny_source: Source, tmp_path: Path) -> None:
    """The same codes at the same places, of the same inputs' groups, and so the same numbers, to the bit."""
    packed = packed_folder(*CASES[name], tiny_source, tmp_path / "packed")
    found = convert(packed, tmp_path / "found")
    export("gptq", tmp_path / "found", tmp_path / "out")
    said = json.loads((tmp_path / "out/config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert (said["quant_method"], said["desc_act"]) == ("gptq", True)
    was, met = load_file(packed / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert set(met) == set(was)
    smaller = CASES[name][1].get("group_size", 32) // said["group_size"]
    assert smaller == (3 if "96" in name else 1)
    for tensor, value in met.items():
        if tensor.endswith(".qweight"):
            assert torch.equal(value, was[tensor])
        if tensor.endswith(".g_idx"):
            assert torch.equal(value // smaller, was[tensor])
    dense = [packed_folders.dequantize(tmp_path / name, tmp_path / f"dense-{name}") for name in ("packed", "out")]
    values = [load_file(folder / "model.safetensors") for folder in dense]
    for tensor, value in values[0].items():
        assert torch.equal(value, values[1][tensor])
    again = convert(tmp_path / "out", tmp_path / "again")
    assert list(again) == list(found)
    for tensor in found:
        np.testing.assert_array_equal(again[tensor], found[tensor])


@settings(max_examples=10)
@given(groups=st.permutations([0] * 32 + [1] * 32 + [2] * 32), bits=st.sampled_from([4, 8]))
def test_any_groups_come_back(groups: list[int], bits: int, tiny_source: Source) -> None:
    with tempfile.TemporaryDirectory() as name:
        packed = packed_folder("llama", {"bits": bits}, tiny_source, Path(name, "packed"))
        tensors = load_file(packed / "model.safetensors")
        tensors[f"{DOWN}.g_idx"] = torch.tensor(groups, dtype=torch.int32)
        save_file(tensors, packed / "model.safetensors")
        found = convert(packed, Path(name, "found"))
        export("gptq", found.folder, Path(name, "out"))
        met = load_file(Path(name, "out/model.safetensors"))
        for suffix in ("qweight", "qzeros", "scales", "g_idx"):
            assert torch.equal(met[f"{DOWN}.{suffix}"], tensors[f"{DOWN}.{suffix}"])
        theirs = packed_folders.of_gptq(tensors, {"checkpoint_format": "gptq"}, packed)[f"{DOWN}.weight"]
        np.testing.assert_allclose(model.tensor(found, "layers.1.mlp.down.weight"), theirs, rtol=1e-6)


def test_what_has_no_place_for_an_order(tiny_source: Source, tmp_path: Path) -> None:
    convert(packed_folder("llama", {}, tiny_source, tmp_path / "packed"), tmp_path / "found")
    for layout in ("awq", "compressed-tensors", "modelopt"):
        with pytest.raises(UserError, match=r"no place for groups that are scattered over the inputs \(act-order\)"):
            export(layout, tmp_path / "found", tmp_path / "out")
    for other in ("hf", "gguf", "paddle"):
        with pytest.raises(UserError, match="is quantized"):
            export(other, tmp_path / "found", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_ordered_head_is_dequantized(tiny_source: Source, tmp_path: Path) -> None:
    found = convert(packed_folder(*CASES["the head"], tiny_source, tmp_path / "packed"), tmp_path / "found")
    assert "head.input_order" in found
    made = export("gptq", tmp_path / "found", tmp_path / "out")
    assert made.notes["in_full"] == {"a quantized embedding or head": ["lm_head"]}
    met = load_file(tmp_path / "out/model.safetensors")["lm_head.weight"]
    dense = packed_folders.dequantize(tmp_path / "packed", tmp_path / "dense")
    theirs = load_file(dense / "model.safetensors")["lm_head.weight"]
    torch.testing.assert_close(met, theirs)


def test_two_orders_in_one_linear_are_dequantized(tiny_source: Source, tmp_path: Path) -> None:
    """Which no folder holds, but a checkpoint may."""
    found = convert(packed_folder("glm", {}, tiny_source, tmp_path / "packed"), tmp_path / "found")
    (tmp_path / "other").mkdir()

    def load(name: str) -> Any:
        return found[name][::-1] if name == "layers.1.mlp.up.input_order" else found[name]

    checkpoint.write(tmp_path / "other", found.spec, found.infos, load, recipe=found.recipe)
    found.copy_companions(tmp_path / "other")
    manifests.seal(tmp_path / "other", found.manifest)
    expected = reference_logits(Checkpoint(tmp_path / "other"))
    assert np.abs(expected - reference_logits(found)).max() > 0.1
    made = export("gptq", tmp_path / "other", tmp_path / "out")
    assert made.notes["in_full"] == {
        "linears in one whose groups are of different inputs": ["model.layers.1.mlp.gate_up_proj"]
    }
    np.testing.assert_allclose(reference_logits(convert(tmp_path / "out", tmp_path / "again")), expected, atol=1e-5)
    builder.build(tmp_path / "other", tmp_path / "engine", arithmetic="float32")
    np.testing.assert_allclose(engine_logits(tmp_path / "engine"), expected, atol=1e-4)


def test_groups_of_other_sizes_are_refused(tiny_source: Source, tmp_path: Path) -> None:
    packed = packed_folder("llama", {}, tiny_source, tmp_path / "packed")
    tensors = load_file(packed / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.g_idx"][:5] = 0
    save_file(tensors, packed / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"up_proj\.g_idx' gives groups of other sizes"):
        convert(packed, tmp_path / "found")


def test_by_the_command_line(tiny_source: Source, tmp_path: Path) -> None:
    packed = packed_folder("qwen2", {"shared": False}, tiny_source, tmp_path / "packed")
    found, engine = str(tmp_path / "found"), str(tmp_path / "engine")
    said = {}
    for line in (
        ["convert", str(packed), found],
        ["build-engine", found, engine, "--arithmetic", "float32"],
        ["inspect", engine],
        ["verify", found, engine],
        ["generate", engine, "--prompt", "the quick", "--max-tokens", "4"],
    ):
        made = CliRunner().invoke(group, line)
        assert made.exit_code == 0, made.output
        said[line[0]] = made.output
    assert "4 bits, groups of 32 in act-order: taken over as they are" in said["convert"]
    assert "in act-order" in said["build-engine"]


def reference_logits(found: Checkpoint) -> np.ndarray:
    with torch.no_grad():
        logits: np.ndarray = model.load(found)(torch.from_numpy(TOKENS)[None])[0].numpy()
    return logits


def engine_logits(folder: Path) -> np.ndarray:
    """Of all tokens, computed in chunks."""
    runner = open_runner(folder, threads=1, max_sequences=1)
    runner.claim(1, TOKENS)
    parts = [
        runner.step([Chunk(1, begin, TOKENS[begin:end], end - begin)])[0].copy() for begin, end in ((0, 25), (25, 40))
    ]
    runner.close()
    return np.concatenate(parts)
