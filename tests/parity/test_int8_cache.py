"""The reference decoder with a simulated int8 cache against ONNX Runtime's kernel with a real one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llmc.builders import ort
from llmc.evaluate.reference import open_reference
from llmc.quant.quantize import Calibration, quantize
from llmc.recipe import KVCacheFormat, QuantRecipe
from llmc.runtime import Chunk, Runner
from llmc.serve.runners import open_runner
from llmc.tokenizer import Tokenizer

TEXT = "the quick brown fox jumps over the lazy dog and there the other user was in it. " * 10


@pytest.mark.parametrize(
    "name", ["llama", "llama-yarn", "mistral-window", "qwen2", "qwen3", "gpt2", "bloom", "chatglm-6b"]
)
def test_simulated_cache_is_the_kernel_s(name: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    recipe = QuantRecipe(algorithm="none", kv_cache=KVCacheFormat())
    quantize(tiny_checkpoint(name), tmp_path / "q", recipe, calibration=Calibration(path=text))
    ort.build(tmp_path / "q", tmp_path / "engine")
    tokens = np.array(Tokenizer.load(tmp_path / "q").encode(TEXT)[:60])
    simulated = all_logits(open_reference(tmp_path / "q"), tokens)
    kernel = all_logits(open_runner(tmp_path / "engine", threads=1, max_sequences=1), tokens)
    exact = all_logits(open_reference(tiny_checkpoint(name)), tokens)
    assert np.abs(simulated - kernel).max() < 1e-4
    assert np.abs(simulated - exact).max() > 1e-2


def all_logits(runner: Runner, tokens: np.ndarray) -> np.ndarray:
    """Computed in a chunk, in single steps, and in a chunk with a past."""
    runner.claim(0, tokens[:1])
    found, start = [], 0
    for size in (20, 1, 1, 38):
        part = tokens[start : start + size]
        found += [logits.copy() for logits in runner.step([Chunk(0, start, part, logits=size)])]
        start += size
    runner.close()
    return np.concatenate(found)
