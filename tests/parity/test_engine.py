"""Every family's ONNX engine in float32 against transformers: the same logits, however the tokens are fed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from llmc.builders import ort as builder
from llmc.runtime import Chunk, Runner
from llmc.serve.runners import open_runner

TOLERANCE = 1e-4
GREEDY = 32  # tokens, past every window (8)


@pytest.fixture(scope="module", params=list(tiny.TINY))
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable[[str], Path]
) -> Any:
    """(transformers' model, its engine opened, tokens that both may hold)."""
    model = tiny.TINY[request.param].build()
    kind = (getattr(model.config, "rope_parameters", None) or {}).get("rope_type")
    # Where frequencies depend on the context's length, an engine has those of its own: so both stay below the border.
    length = 32 if kind in ("dynamic", "longrope") else 96
    folder = tmp_path_factory.mktemp("engine") / request.param
    builder.build(tiny_checkpoint(request.param), folder, max_length=length)
    runner = open_runner(folder, threads=1, max_sequences=4)
    yield model, runner, length
    runner.close()


def logits_of(model: Any, tokens: list[int]) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor([tokens]), use_cache=False).logits[0].numpy()


def test_whole_and_chunked_prefill(pair: Any) -> None:
    model, runner, length = pair
    tokens = np.array(tiny.tokens(length))
    expected = logits_of(model, tokens.tolist())
    runner.claim(1, tokens)
    (whole,) = runner.step([Chunk(1, 0, tokens, logits=length)])
    np.testing.assert_allclose(whole, expected, atol=TOLERANCE, rtol=0)
    for begin, end in zip((0, 5, 6, 22), (5, 6, 22, length), strict=True):
        (part,) = runner.step([Chunk(1, begin, tokens[begin:end], logits=end - begin)])
        np.testing.assert_allclose(part, expected[begin:end], atol=TOLERANCE, rtol=0)
    runner.free(1)


def test_a_ragged_batch_and_greedy_tokens(pair: Any) -> None:
    model, runner, length = pair
    new = min(GREEDY, length - 12)
    prompts = [tiny.tokens(count, seed=count) for count in (1, 4, length - new, 9)]
    got = greedy(runner, prompts, new)
    for prompt, tokens in zip(prompts, got, strict=True):
        assert tokens == greedy_of(model, prompt, tokens)


def greedy(runner: Runner, prompts: list[list[int]], count: int) -> list[list[int]]:
    """All prompts at once, one token of each a step, after prefills of 3 tokens a step."""
    for index, prompt in enumerate(prompts):
        runner.claim(index, np.array(prompt))
    texts = [list(prompt) for prompt in prompts]
    done = [0] * len(prompts)
    while any(len(text) < len(prompt) + count for text, prompt in zip(texts, prompts, strict=True)):
        chunks = []
        for index, text in enumerate(texts):
            if len(text) < len(prompts[index]) + count:
                new = text[done[index] : done[index] + 3]
                chunks.append(Chunk(index, done[index], np.array(new), int(done[index] + len(new) == len(text))))
        for chunk, logits in zip(chunks, runner.step(chunks), strict=True):
            done[chunk.sequence_id] += len(chunk.tokens)
            if len(logits):
                texts[chunk.sequence_id].append(int(logits[-1].argmax()))
    for index in range(len(prompts)):
        runner.free(index)
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]


def greedy_of(model: Any, prompt: list[int], made: list[int]) -> list[int]:
    """The likeliest token after the prompt, and after each token of `made` but the last."""
    likeliest = logits_of(model, [*prompt, *made[:-1]])[len(prompt) - 1 :].argmax(-1)
    return [int(token) for token in likeliest]


@pytest.mark.parametrize("name", ["llama-dynamic", "llama-longrope"])
def test_frequencies_of_a_long_context(name: str, tmp_path: Path, tiny_checkpoint: Callable[[str], Path]) -> None:
    """An engine built for 100 tokens computes as transformers does on a whole context of 100."""
    model = tiny.TINY[name].build()
    builder.build(tiny_checkpoint(name), tmp_path / "engine", max_length=100)
    runner = open_runner(tmp_path / "engine", threads=1, max_sequences=1)
    tokens = np.array(tiny.tokens(100))
    runner.claim(1, tokens)
    (logits,) = runner.step([Chunk(1, 0, tokens, logits=100)])
    np.testing.assert_allclose(logits, logits_of(model, tokens.tolist()), atol=TOLERANCE, rtol=0)
    runner.close()


def test_random_arrivals_give_the_tokens_of_each_alone(pair: Any) -> None:
    """Sequences join, leave, move between slots and share beginnings; nobody's tokens change."""
    _, runner, _length = pair
    rng = np.random.default_rng(0)
    prompts = [
        tiny.tokens(5, seed=int(rng.integers(3))) + tiny.tokens(int(rng.integers(0, 6)), seed=9) for _ in range(10)
    ]
    counts = [int(rng.integers(1, 12)) for _ in prompts]
    alone = [greedy(runner, [prompt], count)[0] for prompt, count in zip(prompts, counts, strict=True)]
    texts, done = [list(prompt) for prompt in prompts], {}
    waiting, finished = list(range(len(prompts))), 0
    while finished < len(prompts):
        while waiting and len(done) < 4 and rng.random() < 0.5:
            index = waiting.pop(0)
            done[index] = runner.claim(index, np.array(texts[index]))
        chunks = []
        for index, start in done.items():
            new = texts[index][start : start + int(rng.integers(1, 5))]
            chunks.append(Chunk(index, start, np.array(new), int(start + len(new) == len(texts[index]))))
        for chunk, logits in zip(chunks, runner.step(chunks) if chunks else [], strict=True):
            index = chunk.sequence_id
            done[index] += len(chunk.tokens)
            if len(logits):
                texts[index].append(int(logits[-1].argmax()))
            if len(texts[index]) == len(prompts[index]) + counts[index]:
                runner.free(index)
                del done[index]
                finished += 1
    assert [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)] == alone


def test_every_family_was_looked_at() -> None:
    from llmc.converters import families

    looked_at = {case.model_type for case in tiny.TINY.values()}
    files = {path.stem for path in Path(families.__file__).parent.glob("*.py")} - {"__init__"}
    assert looked_at == files, json.dumps([sorted(looked_at), sorted(files)])
