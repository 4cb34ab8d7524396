"""Engines for CUDA where there is one: the reference decoder's logits, and what the server's engine makes of them.

On other machines tests/parity/test_half.py runs the same graphs on ONNX Runtime's CPU kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny

from llmc.builders import ort as builder
from llmc.evaluate.reference import open_reference
from llmc.quant.corpus import Calibration
from llmc.quant.quantize import quantize
from llmc.recipe import KVCacheFormat, QuantRecipe, WeightFormat
from llmc.runtime import Chunk, Runner
from llmc.serve.engine import Engine
from llmc.serve.request import Request, Sampling
from llmc.serve.runners import open_runner, ort_devices
from llmc.tokenizer import Tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(ort_devices.best() != "cuda", reason="no CUDA device, or no onnxruntime-gpu"),
]

# Of all logits' size; tests/parity/test_half.py says why. Attention's kernels on CUDA add in another order.
TOLERANCE = 0.01
LENGTH = 128


def logits(runner: Runner, sizes: list[int]) -> np.ndarray:
    tokens, found, start = np.array(tiny.tokens(sum(sizes))), [], 0
    runner.claim(0, tokens[:1])
    for size in sizes:
        (rows,) = runner.step([Chunk(0, start, tokens[start : start + size], logits=size)])
        found.append(rows.copy())
        start += size
    runner.close()
    return np.concatenate(found)


def agrees(checkpoint: Path, engine: Path, tolerance: float) -> None:
    sizes = [20, 1, 1, 40, 2]
    found = logits(open_runner(engine, max_sequences=2), sizes)
    expected = logits(open_reference(checkpoint), sizes)
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < tolerance


@pytest.mark.parametrize(
    "name",
    ["llama", "qwen2", "qwen3", "mistral-window", "chatglm2-32k", "chatglm-6b", "gpt2", "bloom", "mixtral", "gemma3"],
)
def test_logits(name: str, tmp_path: Path, tiny_checkpoint: Callable[[str], Path]) -> None:
    builder.build(tiny_checkpoint(name), tmp_path / "engine", max_length=LENGTH, device="cuda")
    agrees(tiny_checkpoint(name), tmp_path / "engine", TOLERANCE)


@pytest.mark.parametrize("kv_cache", [None, KVCacheFormat()], ids=["", "int8 cache"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_quantized(
    bits: int, symmetric: bool, kv_cache: KVCacheFormat | None, tmp_path: Path, tiny_checkpoint: Callable[[str], Path]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 20, encoding="utf-8")
    form = WeightFormat(bits=bits, group_size=32, symmetric=symmetric)  # type: ignore[arg-type]
    recipe = QuantRecipe(algorithm="rtn", weights=form, kv_cache=kv_cache)
    calibration = Calibration(path=text) if kv_cache else None
    quantize(tiny_checkpoint("qwen2.5-tied"), tmp_path / "q", recipe, calibration=calibration)
    builder.build(tmp_path / "q", tmp_path / "engine", max_length=LENGTH, device="cuda")
    agrees(tmp_path / "q", tmp_path / "engine", TOLERANCE * (4 if kv_cache else 1))


def test_the_server_s_engine(tmp_path: Path, tiny_checkpoint: Callable[[str], Path]) -> None:
    """Prompts that begin alike, more than fit at a time: every token is the likeliest, or as good as it in float16."""
    checkpoint = tiny_checkpoint("llama")
    builder.build(checkpoint, tmp_path / "engine", max_length=LENGTH, device="cuda")
    engine = Engine(open_runner(tmp_path / "engine", max_sequences=4), Tokenizer.load(checkpoint), max_step_tokens=16)
    engine.start()
    begin = tiny.tokens(20, seed=99)
    prompts = [tuple(begin[: 20 * (number % 2)] + tiny.tokens(5 + number, seed=number)) for number in range(10)]
    handles = [engine.submit(Request(prompt, Sampling(temperature=0), 24, logprobs=0)) for prompt in prompts]
    made = [[event.logprobs.token for event in handle.events(60) if event.logprobs] for handle in handles]
    engine.close()
    assert engine.stats.failed_steps == 0
    reference = open_reference(checkpoint)
    for prompt, tokens in zip(prompts, made, strict=True):
        assert tokens
        text = np.array([*prompt, *tokens])
        reference.claim(0, text[:1])
        (rows,) = reference.step([Chunk(0, 0, text[:-1], logits=len(text) - 1)])
        reference.free(0)
        rows = rows[len(prompt) - 1 :]
        chosen = rows[np.arange(len(tokens)), tokens]
        assert (rows.max(axis=1) - chosen < 4 * TOLERANCE * np.abs(rows).max()).all()
    reference.close()
