"""Quantized engines against the reference decoder with the same weights unpacked: the lowering of every format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from logits import engine_logits, reference_logits

from llmc.builders import ort as builder
from llmc.quant.corpus import Calibration
from llmc.quant.quantize import quantize
from llmc.recipe import KVCacheFormat, QuantRecipe, WeightFormat


def recipe(
    bits: int, group_size: int, *, symmetric: bool = True, keep: tuple[str, ...] = (), **overrides: int
) -> QuantRecipe:
    def form(bits: int) -> WeightFormat:
        return WeightFormat(bits=bits, group_size=group_size, symmetric=symmetric)  # type: ignore[arg-type]

    return QuantRecipe(
        algorithm="rtn",
        weights=form(bits),
        keep=keep,
        overrides={f"layers.*.attn.{name}": form(other) for name, other in overrides.items()},
    )


CASES = {
    "a tied head is the quantized embedding": ("qwen2.5-tied", recipe(4, 32)),
    "zero points": ("llama-bias", recipe(4, 32, symmetric=False)),
    "zero points of 8 bits": ("qwen2", recipe(8, 32, symmetric=False)),
    "a last group that is partly padding": ("qwen3", recipe(4, 64, symmetric=False)),
    "a group wider than the model": ("mistral-window", recipe(8, 128)),
    "some matrices kept": ("llama", recipe(4, 32, keep=("head", "layers.0.*"))),
    "the embedding kept": ("llama-tied", recipe(8, 32, keep=("embed",))),
    "a norm of the embedding, and linear biases": ("bloom", recipe(4, 32)),
    "a normalised head": ("baichuan2-7b", recipe(4, 32, symmetric=False)),
    "a normalised head that is kept": ("baichuan2-13b", recipe(8, 32, keep=("head",))),
    "learned positions stay as they are": ("gpt2", recipe(4, 32)),
    "no gate, and a head of its own": ("gpt2-untied", recipe(8, 32, symmetric=False)),
    "an embedding of a size of its own": ("opt-350m", recipe(4, 32)),
    "q, k and v in different formats": ("qwen2", recipe(4, 32, v=8)),
    "experts in one operator": ("mixtral", recipe(4, 32)),
    "experts with zero points": ("mixtral-window", recipe(4, 32, symmetric=False)),
    "experts of 8 bits, computed in float32": ("mixtral", recipe(8, 32)),
    "experts whose last group is partly padding": ("mixtral", recipe(4, 64)),
    "scaled embeddings that are the head, too": ("gemma3-tied", recipe(4, 32)),
    "experts and a shared one": ("qwen2-moe", recipe(4, 32)),
    "experts whose weights do not sum to one": ("qwen3-moe-sparse", recipe(4, 16, symmetric=False)),
    "one expert kept": ("mixtral", recipe(4, 32, keep=("layers.0.moe.experts.1.*",))),
}


@pytest.mark.parametrize("case", CASES)
def test_quantized_weights(case: str, tmp_path: Path, tiny_checkpoint: Callable[[str], Path]) -> None:
    name, how = CASES[case]
    quantize(tiny_checkpoint(name), tmp_path / "quantized", how)
    builder.build(tmp_path / "quantized", tmp_path / "engine", arithmetic="float32")
    whole, chunked = engine_logits(tmp_path / "engine")
    expected = reference_logits(tmp_path / "quantized")
    np.testing.assert_allclose(whole, expected, atol=1e-4, rtol=0)
    np.testing.assert_allclose(chunked, expected, atol=1e-4, rtol=0)
    # And the codes matter: the model it was made from says something else.
    assert np.abs(reference_logits(tiny_checkpoint(name)) - expected).max() > 1e-2


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("name", "share"), [("qwen2", 0.04), ("mixtral", 0.06)])
def test_int8_arithmetic_stays_near(
    name: str, share: float, bits: int, tmp_path: Path, tiny_checkpoint: Callable[[str], Path]
) -> None:
    quantize(tiny_checkpoint(name), tmp_path / "quantized", recipe(bits, 32))
    builder.build(tmp_path / "quantized", tmp_path / "engine", arithmetic="int8")
    whole, _ = engine_logits(tmp_path / "engine")
    expected = reference_logits(tmp_path / "quantized")
    # Each input is rounded to 1/127 of its group's largest value, which moves these logits by 2.5 % of their spread,
    # and by 4 % where a router's scores, so moved, choose another expert now and then.
    assert 0 < np.abs(whole - expected).mean() < share * expected.std()


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral-window", "glm", "mixtral"])
def test_int8_cache(name: str, tmp_path: Path, tiny_checkpoint: Callable[[str], Path]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox and the lazy dog " * 60, encoding="utf-8")
    how = QuantRecipe(algorithm="none", kv_cache=KVCacheFormat())
    quantize(tiny_checkpoint(name), tmp_path / "quantized", how, calibration=Calibration(path=text))
    builder.build(tmp_path / "quantized", tmp_path / "engine")
    whole, chunked = engine_logits(tmp_path / "engine")
    expected = reference_logits(tmp_path / "quantized")
    exact = reference_logits(tiny_checkpoint(name))
    # A key within float error of the middle between two codes may fall to either side; the mean tells.
    assert np.abs(chunked - expected).mean() < 0.05 * np.abs(exact - expected).mean()
    assert np.abs(whole - exact).mean() < 3 * np.abs(exact - expected).mean()
