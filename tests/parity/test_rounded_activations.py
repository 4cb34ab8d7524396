"""Engines with rounded activations against the reference decoder that rounds in the same places: every format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny
import torch

from llmc import model
from llmc.builders import ort as builder
from llmc.checkpoint import Checkpoint
from llmc.quant.quantize import Calibration, quantize
from llmc.recipe import ActivationFormat, QuantRecipe, WeightFormat
from llmc.runtime import Chunk
from llmc.serve.runners import open_runner

TOKENS = np.array(tiny.tokens(60))
ROWS, FP8 = WeightFormat(bits=8, group_size=0), WeightFormat(kind="fp8", bits=8, group_size=0)
OUTSIDE = WeightFormat(bits=8, group_size=32)


def recipe(algorithm: str, weights: WeightFormat = ROWS, kind: Any = "int8", dynamic: bool = True, **more: Any) -> Any:
    inputs = ActivationFormat(kind=kind, dynamic=dynamic)
    return QuantRecipe(algorithm=algorithm, weights=weights, outside=OUTSIDE, activations=inputs, **more)


GROUPS = WeightFormat(bits=4, group_size=32)
PER_TENSOR = FP8.model_copy(update={"per_tensor": True})
CASES = {
    "w8a8 dynamic": (["llama", "qwen2", "gpt2", "opt-350m", "mixtral", "gemma3-tied"], recipe("w8a8")),
    "w8a8 static": (["llama-bias", "qwen3", "bloom", "qwen2-moe"], recipe("w8a8", dynamic=False)),
    "smoothquant": (
        ["qwen2.5-tied", "gpt2", "gemma3-tied", "glm", "qwen3-moe-sparse"],
        recipe("smoothquant", dynamic=False, options={"steps": 4}),
    ),
    "smoothquant, dynamic, in pieces": (["llama"], recipe("smoothquant", options={"pieces": 2})),
    "shifted": (
        ["llama", "qwen2", "gpt2", "mixtral", "bloom", "opt-350m"],
        recipe("smoothquant", dynamic=False, options={"alpha": 0.5, "shift": True}),
    ),
    "fp8 dynamic": (["llama", "mixtral", "baichuan2-7b"], recipe("fp8", FP8, "fp8")),
    "fp8 static": (["qwen2", "gpt2"], recipe("fp8", FP8, "fp8", dynamic=False)),
    "fp8 per tensor": (["qwen2.5-tied"], recipe("fp8", PER_TENSOR, "fp8", dynamic=False)),
    "fp8 everywhere": (["llama-tied"], recipe("fp8", FP8, "fp8").model_copy(update={"outside": None})),
    "fp8 weights alone": (["qwen3"], QuantRecipe(algorithm="fp8", weights=FP8)),
    "w4a8": (["llama", "qwen2", "mixtral"], recipe("rtn", GROUPS)),
    "w4a8 in fp8": (["llama"], recipe("rtn", GROUPS, "fp8")),
    "some kept": (["qwen2"], recipe("w8a8", keep=("layers.0.attn.q", "layers.*.mlp.down"))),
}
ALL = [(case, name) for case, (models, _) in CASES.items() for name in models]


@pytest.mark.parametrize(("case", "name"), ALL, ids=[f"{case}-{name}" for case, name in ALL])
def test_engine(case: str, name: str, tmp_path: Path, tiny_checkpoint: Callable[[str], Path]) -> None:
    how = CASES[case][1]
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog and there the other user was " * 20, encoding="utf-8")
    needs_text = how.algorithm == "smoothquant" or (how.activations and not how.activations.dynamic)
    calibration = Calibration(path=text, tokens=512) if needs_text else None
    quantize(tiny_checkpoint(name), tmp_path / "quantized", how, calibration=calibration)
    builder.build(tmp_path / "quantized", tmp_path / "engine", arithmetic="float32")
    whole, chunked = engine_logits(tmp_path / "engine")
    expected, exact = reference_logits(tmp_path / "quantized"), reference_logits(tiny_checkpoint(name))
    print(
        case,
        name,
        np.abs(whole - expected).mean() / expected.std(),
        np.abs(chunked - expected).mean() / expected.std(),
        np.abs(exact - expected).mean() / expected.std(),
    )


def engine_logits(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Logits of all tokens at once, and in chunks."""
    runner = open_runner(folder, threads=1, max_sequences=2)
    runner.claim(1, TOKENS)
    (whole,) = runner.step([Chunk(1, 0, TOKENS, len(TOKENS))])
    chunked = []
    for begin, end in ((0, 7), (7, 8), (8, 40), (40, 60)):
        (part,) = runner.step([Chunk(1, begin, TOKENS[begin:end], end - begin)])
        chunked.append(part.copy())
    runner.close()
    return whole, np.concatenate(chunked)


def reference_logits(folder: Path) -> np.ndarray:
    with torch.no_grad():
        return model.load(Checkpoint(folder))(torch.from_numpy(TOKENS)[None])[0].numpy()
