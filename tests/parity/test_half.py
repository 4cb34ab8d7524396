"""Engines for CUDA, in float16, on ONNX Runtime's CPU kernels: the same functions as the reference decoder in float32.

How far float16 may be off is not chosen here: transformers' own model, cast to float16, says it. Each of its
operations rounds to 11 bits, 0.05 %, and some tens of them lose 0.1 to 0.6 % of tiny models' logits.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny
import torch
from devices import cuda_on_the_cpu
from onnx import TensorProto

from llmc.builders import ort as builder
from llmc.evaluate.reference import open_reference
from llmc.quant.corpus import Calibration
from llmc.quant.quantize import quantize
from llmc.recipe import KVCacheFormat, QuantRecipe, WeightFormat
from llmc.runtime import Chunk, Runner
from llmc.serve.runners import open_runner

TOKENS = np.array(tiny.tokens(96))
TEXT = "the quick brown fox jumps over the lazy dog and there the other user was in it. " * 10

# Of all logits' size. What transformers lost of any model below, but for those whose routers choose.
TOLERANCE = 0.006

# Whether transformers can compute it in float16 on a CPU; where it cannot, tests/oracles.py computes in float32 alone.
DENSE = {
    "llama": True,
    "llama-yarn": True,
    "mistral-window": True,
    "qwen2": True,
    "qwen2.5-tied": True,
    "qwen3": True,
    "glm4": True,
    "gemma3": True,
    "chatglm2-32k": False,
    "chatglm-6b": False,
    "gpt2": True,
    "opt-350m": True,
    "bloom": True,
    "baichuan2-13b": False,
    "mixtral": True,
}


@pytest.fixture(autouse=True)
def _cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_on_the_cpu(monkeypatch)


@pytest.mark.parametrize("name", DENSE)
def test_logits(name: str, tmp_path: Path, tiny_checkpoint: Callable[[str], Path]) -> None:
    """And where the model stands beside transformers' own in float16, it is no further off."""
    checkpoint = tiny_checkpoint(name)
    engine = builder.build(checkpoint, tmp_path / "engine", device="cuda")
    assert (engine.device, engine.compute, engine.kv_cache) == ("cuda", "float16", "float16")
    found, expected = all_logits(engine_runner(tmp_path)), all_logits(open_reference(checkpoint))
    assert found.dtype == np.float32
    assert 1e-5 < off(found, expected) < TOLERANCE
    if DENSE[name]:
        assert off(found, expected) < 1.1 * lost_by_transformers(name)


@pytest.mark.parametrize("name", ["qwen2-moe", "qwen3-moe"])
def test_where_routers_choose(name: str, tmp_path: Path, tiny_checkpoint: Callable[[str], Path]) -> None:
    """Two experts as good as each other may change places, with transformers as well; most tokens are unmoved."""
    checkpoint = tiny_checkpoint(name)
    builder.build(checkpoint, tmp_path / "engine", device="cuda")
    found, expected = all_logits(engine_runner(tmp_path)), all_logits(open_reference(checkpoint))
    each = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert np.median(each) < TOLERANCE


GROUPS_OF_32 = WeightFormat(bits=4, group_size=32)


@pytest.mark.parametrize("kv_cache", [None, KVCacheFormat()], ids=["", "int8 cache"])
@pytest.mark.parametrize("form", [GROUPS_OF_32, WeightFormat(bits=8, group_size=64, symmetric=False)], ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen2.5-tied"])
def test_quantized(
    name: str,
    form: WeightFormat,
    kv_cache: KVCacheFormat | None,
    tmp_path: Path,
    tiny_checkpoint: Callable[[str], Path],
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    recipe = QuantRecipe(algorithm="rtn", weights=form, kv_cache=kv_cache)
    quantize(tiny_checkpoint(name), tmp_path / "q", recipe, calibration=Calibration(path=text) if kv_cache else None)
    engine = builder.build(tmp_path / "q", tmp_path / "engine", device="cuda")
    assert engine.kv_cache == ("int8" if kv_cache else "float16")
    found, expected = all_logits(engine_runner(tmp_path)), all_logits(open_reference(tmp_path / "q"))
    # A step of the cache is 0.8 % of a channel's largest value, 16 times a step of float16 there: the last bits of what
    # is written decide which of two it becomes. What the cache itself costs these models is 0.28.
    tolerance = TOLERANCE * (4 if kv_cache else 1)
    assert off(found, expected) < tolerance
    assert off(all_logits(open_reference(tiny_checkpoint(name))), expected) > 5 * tolerance


def test_experts_are_computed_one_by_one(tmp_path: Path, tiny_checkpoint: Callable[[str], Path]) -> None:
    quantize(tiny_checkpoint("mixtral"), tmp_path / "q", QuantRecipe(algorithm="rtn", weights=GROUPS_OF_32))
    engine = builder.build(tmp_path / "q", tmp_path / "engine", device="cuda")
    operators = {node.op_type for node in graph_of(tmp_path).node}
    assert "MatMulNBits" in operators
    assert "QMoE" not in operators
    assert set(engine.kernels.values()) == {"MatMulNBits, products in float16"}
    found, expected = all_logits(engine_runner(tmp_path)), all_logits(open_reference(tmp_path / "q"))
    each = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert np.median(each) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "wide"), [("llama", set[str]()), ("bloom", {"/alibi/slopes"}), ("gemma3", set()), ("chatglm-6b", set())]
)
def test_only_what_needs_it_is_float32(
    name: str, wide: set[str], tmp_path: Path, tiny_checkpoint: Callable[[str], Path]
) -> None:
    builder.build(tiny_checkpoint(name), tmp_path / "engine", device="cuda")
    graph = graph_of(tmp_path)
    assert {each.name for each in graph.initializer if each.data_type == TensorProto.FLOAT} == wide
    assert sum(each.data_type == TensorProto.FLOAT16 for each in graph.initializer) >= 15
    types = {each.name: each.type.tensor_type.elem_type for each in (*graph.input, *graph.output)}
    caches = {kind for name, kind in types.items() if name.startswith(("past.", "present."))}
    assert caches == {TensorProto.FLOAT16}
    assert types["logits"] == types["hidden"] == TensorProto.FLOAT


def test_far_neighbours_do_not_blur_linear_biases(tmp_path: Path, tiny_checkpoint: Callable[[str], Path]) -> None:
    """A short sequence decodes beside one of 250 tokens as it does alone, and a long chunk begins as a short one.

    Counted from a place 250 tokens away, half of its biases would be rounded to eighths.
    """
    builder.build(tiny_checkpoint("bloom"), tmp_path / "engine", device="cuda")
    runner, long, short = engine_runner(tmp_path), np.array(tiny.tokens(250)), TOKENS[:9]

    def step(*chunks: Chunk) -> list[np.ndarray]:
        return [rows.copy() for rows in runner.step(chunks)]

    runner.claim(1, long[:1])
    runner.claim(2, short[:1])
    (whole,) = step(Chunk(1, 0, long[:249], logits=249))
    step(Chunk(2, 0, short[:8]))
    (alone,) = step(Chunk(2, 8, short[8:]))
    _, beside = step(Chunk(1, 249, long[249:]), Chunk(2, 8, short[8:]))
    assert off(beside, alone) < TOLERANCE / 4
    (begin,) = step(Chunk(2, 0, long[:12], logits=12))
    assert off(whole[:12], begin) < TOLERANCE / 4
    runner.close()


def test_states_between_layers(tmp_path: Path, tiny_checkpoint: Callable[[str], Path]) -> None:
    from llmc.builders.onnx_layers import with_states
    from llmc.serve.runners.ort_states import open_states

    engine = builder.build(tiny_checkpoint("llama"), tmp_path / "engine", device="cuda")
    found = with_states(tmp_path / "engine", engine.spec.num_layers, engine.compute)
    states = open_states(tmp_path / "engine", engine, *found)(TOKENS[:20])
    model = tiny.TINY["llama"].build()
    with torch.no_grad():
        expected = model(torch.tensor(TOKENS[None, :20]), use_cache=False, output_hidden_states=True).hidden_states
    # transformers' last state is normalised already.
    assert len(states) == len(expected)
    for ours, theirs in zip(states[:-1], expected[:-1], strict=True):
        assert ours.dtype == np.float32
        assert off(ours, theirs[0].numpy()) < TOLERANCE


def engine_runner(folder: Path) -> Runner:
    return open_runner(folder / "engine", threads=1, max_sequences=2)


def graph_of(folder: Path) -> onnx.GraphProto:
    return onnx.load(folder / "engine" / "model.onnx", load_external_data=False).graph


def all_logits(runner: Runner) -> np.ndarray:
    """Computed in a chunk, in single steps, and in a chunk with a past."""
    runner.claim(0, TOKENS[:1])
    found, start = [], 0
    for size in (20, 1, 1, len(TOKENS) - 22):
        (rows,) = runner.step([Chunk(0, start, TOKENS[start : start + size], logits=size)])
        found.append(rows.copy())
        start += size
    runner.close()
    return np.concatenate(found)


def off(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def lost_by_transformers(name: str) -> float:
    model, tokens = tiny.TINY[name].build(), torch.tensor(TOKENS[None])
    with torch.no_grad():
        wide = model(tokens, use_cache=False).logits[0].numpy()
        return off(model.half()(tokens, use_cache=False).logits[0].float().numpy(), wide)
