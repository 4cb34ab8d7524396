"""Packed weights out and in again: what others read in the folders is the checkpoint, and so is what llmc reads."""

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

from llmc import model
from llmc.builders import ort as builder
from llmc.checkpoint import Checkpoint
from llmc.converters import families, native
from llmc.converters.convert import convert
from llmc.converters.export import FORMATS, export
from llmc.errors import UserError
from llmc.quant.quantize import quantize
from llmc.recipe import KVCacheFormat, QuantRecipe, WeightFormat
from llmc.runtime import Chunk
from llmc.serve.runners import open_runner

TOKENS = torch.tensor([tiny.tokens(40)])
PACKED = [name for name, row in FORMATS.items() if row.quantized]


def form(bits: int, group_size: int, *, zero: bool = False) -> WeightFormat:
    return WeightFormat(bits=bits, group_size=group_size, symmetric=not zero)  # type: ignore[arg-type]


def rtn(weights: WeightFormat, keep: tuple[str, ...] = (), **overrides: WeightFormat) -> QuantRecipe:
    by_glob = {f"layers.*.{name}": other for name, other in overrides.items()}
    return QuantRecipe(algorithm="rtn", weights=weights, keep=keep, overrides=by_glob)


FOUR, ZEROS, EIGHT, ROWS = form(4, 32), form(4, 32, zero=True), form(8, 32), form(8, 128)

# What is in it -> model, recipe, and the formats that have a place for it (the others refuse it).
CASES: dict[str, tuple[str, QuantRecipe, list[str]]] = {
    "biases": ("qwen2", rtn(FOUR), PACKED),
    "zero points, and biases everywhere": ("llama-bias", rtn(ZEROS), PACKED[:3]),
    "a tied head": ("qwen2.5-tied", rtn(ZEROS), PACKED[:3]),
    "8 bits": ("qwen3", rtn(EIGHT), ["gptq", "compressed-tensors"]),
    "8 bits, a row with one scale": ("mistral-window", rtn(ROWS), ["gptq", "compressed-tensors", "modelopt"]),
    "zero points of 8 bits": ("qwen2", rtn(form(8, 32, zero=True)), ["gptq", "compressed-tensors"]),
    "a last group that is shorter": ("llama", rtn(form(4, 64)), PACKED),
    "experts": ("mixtral", rtn(FOUR), PACKED),
    "experts, a shared one, zero points": ("qwen2-moe", rtn(ZEROS), PACKED[:3]),
    "linears as [in, out]": ("gpt2", rtn(FOUR), ["gptq", "modelopt"]),
    "q, k and v in one, without a class in transformers": ("baichuan-13b", rtn(FOUR), PACKED),
    "q, k and v of each head together": ("bloom", rtn(ZEROS), PACKED[:3]),
    "gate and up in one": ("glm", rtn(FOUR), PACKED),
    "a family that another says": ("chatglm3", rtn(ZEROS), PACKED[:3]),
    "some matrices kept": ("qwen2", rtn(FOUR, keep=("layers.0.*", "head")), PACKED),
    "some matrices of 8 bits": ("qwen2", rtn(FOUR, v=EIGHT, down=EIGHT), PACKED),
    "gate and up in one, with different bits": ("glm", rtn(FOUR, **{"mlp.gate": EIGHT}), PACKED),
}


@pytest.mark.parametrize("name", CASES)
def test_out_and_in_again(name: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    case, recipe, formats = CASES[name]
    quantize(tiny_checkpoint(case), tmp_path / "quantized", recipe)
    original = Checkpoint(tmp_path / "quantized")
    expected = logits(model.load(original))
    for layout in PACKED:
        out, back = tmp_path / layout, tmp_path / f"{layout}-back"
        if layout not in formats:
            with pytest.raises(UserError, match="no place for"):
                export(layout, tmp_path / "quantized", out)
            continue
        made = export(layout, tmp_path / "quantized", out)
        found = convert(out, back)
        assert_same(original, found, made.notes)
        # What others read in the folder computes what the checkpoint does, but for the rounding of scales.
        theirs = tiny.load(packed_folders.dequantize(out, tmp_path / f"{layout}-dense")).float()
        got = logits(theirs)
        np.testing.assert_allclose(logits(model.load(found)), got, atol=1e-4, rtol=0)
        share = 0.02 if "16" in made.notes["scales"]["type"] else 1e-4
        assert np.abs(got - expected).max() < share * expected.std()


def logits(of: Any) -> np.ndarray:
    """Of a decoder of ours or of transformers."""
    with torch.no_grad():
        found = of(TOKENS)
    array: np.ndarray = (found if isinstance(found, torch.Tensor) else found.logits)[0].float().numpy()
    return array


def assert_same(original: Checkpoint, found: Checkpoint, notes: dict[str, Any]) -> None:
    """Codes and zero points to the bit, scales up to their type in the folder; and what was dequantized is noted."""
    assert found.recipe is not None
    assert found.recipe.algorithm == "imported"
    looked, scales, rounded = 0, 0, 0
    for name in found:
        stem, _, kind = name.rpartition(".")
        if kind == "scale":
            met, was = found[name], original[name]
            np.testing.assert_array_equal(met, was.astype(notes["scales"]["type"]).astype(np.float32))
            scales, rounded, looked = scales + met.size, rounded + int((met != was).sum()), looked + 1
        elif kind in ("qweight", "zero") or name in original:
            np.testing.assert_array_equal(found[name], original[name])
        else:
            assert original.recipe is not None
            assert kind == "weight"
            assert original.recipe.format_of(stem) is not None
    assert looked >= 2
    assert (notes["scales"]["of"], notes["scales"]["rounded"]) == (scales, rounded)
    in_full = sum(len(modules) for modules in notes["in_full"].values())
    assert bool(in_full) == any(f"{name.removesuffix('qweight')}weight" in found for name in original)


@pytest.mark.parametrize("layout", PACKED[:3])
@pytest.mark.parametrize("case", ["qwen1", "chatglm3", "baichuan2-7b"])
def test_fused_linears_are_cut_as_they_are(
    layout: str, case: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The authors' own files, such as Qwen-7B-Chat-Int4, have q, k and v packed in one."""
    monkeypatch.setattr(native, "form", lambda found, **_: (families.by_name(found.spec.family), found.spec))
    quantize(tiny_checkpoint(case), tmp_path / "quantized", rtn(ZEROS))
    made = export(layout, tmp_path / "quantized", tmp_path / "out")
    fused = packed_folders.load_file(tmp_path / "out/model.safetensors")
    assert any(
        part in name for name in fused for part in ("c_attn.qw", "query_key_value.qw", "W_pack.qw", "weight_packed")
    )
    found = convert(tmp_path / "out", tmp_path / "back")
    assert found.spec == Checkpoint(tmp_path / "quantized").spec
    assert_same(Checkpoint(tmp_path / "quantized"), found, made.notes)
    theirs = tiny.load(packed_folders.dequantize(tmp_path / "out", tmp_path / "dense")).float()
    np.testing.assert_allclose(logits(model.load(found)), logits(theirs), atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", ["qwen2", "qwen2.5-tied", "mixtral", "chatglm3"])
def test_transformers_loads_compressed_tensors(
    case: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    quantize(tiny_checkpoint(case), tmp_path / "quantized", rtn(FOUR, keep=("layers.1.attn.o",)))
    export("compressed-tensors", tmp_path / "quantized", tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = logits(model.load(Checkpoint(tmp_path / "quantized")))
    np.testing.assert_allclose(logits(loaded), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("layout", PACKED[:3])
def test_transformers_knows_the_config(layout: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    from transformers.utils.quantization_config import AwqConfig, CompressedTensorsConfig, GPTQConfig

    quantize(tiny_checkpoint("qwen2"), tmp_path / "quantized", rtn(FOUR, keep=("layers.1.attn.o",)))
    export(layout, tmp_path / "quantized", tmp_path / "out")
    said = json.loads((tmp_path / "out/config.json").read_text(encoding="utf-8"))["quantization_config"]
    kept = "model.layers.1.self_attn.o_proj"
    if layout == "gptq":
        known = GPTQConfig.from_dict(dict(said))
        assert (known.bits, known.group_size, known.desc_act, known.sym, known.format) == (4, 32, False, True, "gptq")
        assert json.loads((tmp_path / "out/quantize_config.json").read_text(encoding="utf-8")) == said
        assert list(said["dynamic"]) == [r"-:^model\.layers\.1\.self_attn\.o_proj$"]
    elif layout == "awq":
        known = AwqConfig.from_dict(dict(said))
        assert (known.bits, known.group_size, known.zero_point, str(known.format)) == (4, 32, True, "gemm")
        assert set(known.modules_to_not_convert or ()) == {kept, "model.embed_tokens", "lm_head"}
    else:
        told = CompressedTensorsConfig.from_dict(dict(said)).quantization_config
        assert told is not None
        weights = told.config_groups["group_0"].weights  # type: ignore[union-attr]
        assert weights is not None
        assert (weights.num_bits, weights.group_size, weights.symmetric) == (4, 32, True)
        assert set(told.ignore or ()) == {kept, "model.embed_tokens", "lm_head"}


@pytest.mark.parametrize("layout", ["gptq", "awq"])
def test_an_engine_of_what_was_read(layout: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    quantize(tiny_checkpoint("qwen2"), tmp_path / "quantized", rtn(ZEROS))
    export(layout, tmp_path / "quantized", tmp_path / "out")
    found = convert(tmp_path / "out", tmp_path / "back")
    builder.build(tmp_path / "back", tmp_path / "engine", arithmetic="float32")
    runner = open_runner(tmp_path / "engine", threads=1, max_sequences=1)
    tokens = TOKENS[0].numpy()
    runner.claim(1, tokens)
    (got,) = runner.step([Chunk(1, 0, tokens, len(tokens))])
    np.testing.assert_allclose(got, logits(model.load(found)), atol=1e-4, rtol=0)
    runner.close()


def test_what_is_told(tiny_checkpoint: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox and the lazy dog " * 60, encoding="utf-8")
    from llmc.quant.quantize import Calibration

    recipe = rtn(FOUR, down=EIGHT).model_copy(update={"kv_cache": KVCacheFormat()})
    quantize(tiny_checkpoint("qwen2"), tmp_path / "quantized", recipe, calibration=Calibration(path=text))
    made = export("awq", tmp_path / "quantized", tmp_path / "out")
    said = caplog.text
    assert "a quantized embedding or head: model.embed_tokens, lm_head dequantized, as float32" in said
    assert "8 bits: model.layers.0.mlp.down_proj, model.layers.1.mlp.down_proj dequantized" in said
    assert "the scales of an int8 KV cache" in said
    assert "scales are rounded to float16, by at most 0.0" in said
    assert sorted(made.notes["in_full"]) == ["8 bits", "a quantized embedding or head"]


@pytest.mark.parametrize("layout", PACKED)
def test_what_is_not_quantized_is_refused(layout: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="llmc quantize"):
        export(layout, tiny_checkpoint("qwen2"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
