"""A prefix that sees itself whole: decoder and engine against ChatGLM-6B's formulas, and what serving makes of it."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny
import torch

from llmc.builders import ort as builder
from llmc.checkpoint import Checkpoint
from llmc.errors import UserError
from llmc.evaluate.reference import ReferenceRunner
from llmc.model import KVCache, load
from llmc.runtime import Chunk, Runner
from llmc.serve.engine import Engine
from llmc.serve.request import Request, Sampling
from llmc.serve.runners import open_runner
from llmc.serve.runners.ort_states import open_states
from llmc.tokenizer import Tokenizer

NAMES = ["chatglm-6b", "chatglm-6b-deep"]
END, MASK, GMASK = (tiny.CHATGLM_6B_BASE[f"{name}_token_id"] for name in ("bos", "mask", "gmask"))
LENGTH = 96


def words(count: int, seed: int = 0) -> list[int]:
    """Random ids that are neither of the three."""
    return [token % MASK for token in tiny.tokens(count, seed)]


def prompt(count: int, seed: int = 0) -> list[int]:
    """As their tokenizer ends a text."""
    return [*words(count, seed), GMASK, END]


# (tokens, how many of them the first chunk needs)
TEXTS = {
    "prompt": prompt(30),
    "prompt and answer": [*prompt(12), *words(25, seed=1)],
    "a mark in the midst": [*words(9), MASK, *words(8, seed=1), END, *words(10, seed=2)],
    "both marks": [*words(5), MASK, *words(4, seed=1), GMASK, *words(3, seed=2), END, *words(10, seed=3)],
    "no mark": [*words(11), END, *words(9, seed=1)],
    "two ends": [*prompt(10), *words(4, seed=1), END, GMASK, END, *words(5, seed=2)],
    "the end alone": [END, *words(20)],
    "no end": [*words(20)],
}


@pytest.fixture(scope="module", params=NAMES)
def trio(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable[[str], Path]
) -> Any:
    """(the oracle, our decoder, its engine opened, the engine's folder)."""
    folder = tmp_path_factory.mktemp("engine") / request.param
    builder.build(tiny_checkpoint(request.param), folder, max_length=LENGTH)
    runner = open_runner(folder, threads=1, max_sequences=4)
    yield tiny.TINY[request.param].build(), load(Checkpoint(tiny_checkpoint(request.param))), runner, folder
    runner.close()


@torch.inference_mode()
def expected_of(oracle: Any, tokens: list[int]) -> np.ndarray:
    found: np.ndarray = oracle(torch.tensor([tokens])).logits[0].numpy()
    return found


def needed(tokens: list[int]) -> int:
    return tokens.index(END) + 1 if END in tokens else 1


def cuts(tokens: list[int]) -> list[tuple[int, ...]]:
    """Ways to cut: whole; behind the prefix token by token; in two."""
    first, count = needed(tokens), len(tokens)
    return [(0, count), (0, *range(first, count + 1)), *([(0, first, count)] if first < count else [])]


@pytest.mark.parametrize("text", TEXTS)
@torch.inference_mode()
def test_the_decoder(trio: Any, text: str) -> None:
    oracle, decoder, _runner, _folder = trio
    tokens = TEXTS[text]
    expected = expected_of(oracle, tokens)
    for cut in cuts(tokens):
        cache = KVCache()
        parts = [decoder(torch.tensor([tokens[a:b]]), cache=cache)[0] for a, b in itertools.pairwise(cut) if a < b]
        np.testing.assert_allclose(torch.cat(parts), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@torch.inference_mode()
def test_a_batch_of_the_decoder_is_ragged(trio: Any) -> None:
    oracle, decoder, _runner, _folder = trio
    longest = max(map(len, TEXTS.values()))
    batch = torch.tensor([text + [0] * (longest - len(text)) for text in TEXTS.values()])
    for row, tokens in zip(decoder(batch), TEXTS.values(), strict=True):
        expected = expected_of(oracle, tokens)
        np.testing.assert_allclose(row[: len(tokens)], expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_the_prefix_sees_itself(trio: Any) -> None:
    """What the tests above would not show if the texts were too easy."""
    oracle, _decoder, _runner, _folder = trio
    tokens = prompt(10)
    other = [*tokens[:9], 7, *tokens[10:]]
    assert np.abs(expected_of(oracle, tokens)[0] - expected_of(oracle, other)[0]).max() > 1e-2
    marks = [[*words(4), MASK, *words(4, seed=1), END, *words(5)], [*words(4), 9, *words(4, seed=1), END, *words(5)]]
    causal = [[token for token in text if token != END] for text in marks]
    assert np.abs(expected_of(oracle, marks[0])[-1] - expected_of(oracle, marks[1])[-1]).max() > 1e-2
    assert (expected_of(oracle, causal[0])[:4] == expected_of(oracle, causal[1])[:4]).all()


@pytest.mark.parametrize("text", TEXTS)
def test_the_engine(trio: Any, text: str) -> None:
    oracle, _decoder, runner, _folder = trio
    tokens = np.array(TEXTS[text])
    expected = expected_of(oracle, TEXTS[text])
    for number, cut in enumerate(cuts(TEXTS[text]), start=100):
        runner.claim(number, tokens[:1])
        for a, b in itertools.pairwise(cut):
            if a < b:
                (part,) = runner.step([Chunk(number, a, tokens[a:b], b - a)])
                np.testing.assert_allclose(part, expected[a:b], rtol=0, atol=1e-4 * np.abs(expected).max())
        runner.free(number)


def test_a_ragged_batch_decodes(trio: Any) -> None:
    """40 tokens of each of four, in one batch, every row of logits compared."""
    oracle, _decoder, runner, _folder = trio
    texts = [prompt(3), prompt(40, seed=1), [*words(9), MASK, *words(5), END], [*prompt(10, seed=2), *words(7)]]
    for index, text in enumerate(texts):
        runner.claim(index, np.array(text))
        (logits,) = runner.step([Chunk(index, 0, np.array(text))])
        text.append(int(logits[-1].argmax()))
    for _ in range(40):
        chunks = [Chunk(index, len(text) - 1, np.array(text[-1:])) for index, text in enumerate(texts)]
        for text, logits in zip(texts, runner.step(chunks), strict=True):
            expected = expected_of(oracle, text)
            np.testing.assert_allclose(logits[0], expected[-1], rtol=0, atol=1e-4 * np.abs(expected).max())
            text.append(int(logits[-1].argmax()))
    for index in range(len(texts)):
        runner.free(index)


def test_what_is_in_the_cache_serves_the_same_prefix_alone(trio: Any) -> None:
    oracle, _decoder, runner, _folder = trio
    begun, answer = prompt(20, seed=5), words(10, seed=6)

    def ask(number: int, text: list[int]) -> int:
        tokens = np.array(text)
        found: int = runner.claim(number, tokens)
        (logits,) = runner.step([Chunk(number, found, tokens[found:])])
        expected = expected_of(oracle, text)
        np.testing.assert_allclose(logits[0], expected[-1], rtol=0, atol=1e-4 * np.abs(expected).max())
        runner.free(number)
        return found

    assert ask(1, [*begun, *answer]) == 0
    assert ask(2, [*begun, *answer, *words(3)]) == len(begun) + len(answer)
    assert ask(3, [*begun, *answer[:4], *words(3)]) == len(begun) + 4
    assert ask(4, begun) == len(begun) - 1
    # The same tokens, but another prefix: a longer one, a shorter one, none.
    assert ask(5, [*begun[:-1], *words(5), GMASK, END]) == 0
    assert ask(6, [*begun[:10], GMASK, END]) == 0
    assert ask(7, begun[:10]) == 0


def test_states_between_layers(trio: Any, tiny_checkpoint: Callable[[str], Path]) -> None:
    from llmc.builders.onnx_layers import with_states
    from llmc.engine import open_engine

    _oracle, decoder, _runner, folder = trio
    tokens = np.array(TEXTS["prompt and answer"])
    model, names = with_states(folder, decoder.spec.num_layers)
    found = open_states(folder, open_engine(folder), model, names)(tokens)
    with torch.inference_mode():
        x, places = decoder.enter(torch.from_numpy(tokens)[None])
        for met, layer, place in zip(found, decoder.layers, places, strict=False):
            np.testing.assert_allclose(met, x[0], rtol=0, atol=1e-4 * float(x.abs().max()))
            x = layer(x, place, None)
    np.testing.assert_allclose(found[-1], x[0], rtol=0, atol=1e-4 * float(x.abs().max()))


def test_the_graph_turns_outside_and_masks_by_its_bias(trio: Any) -> None:
    graph = onnx.load(trio[3] / "model.onnx", load_external_data=False).graph
    attention = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
    turned = [node for node in graph.node if node.op_type == "RotaryEmbedding"]
    assert len(turned) == 2 * len(attention) > 0
    for node in attention:
        options = {attribute.name: attribute.i for attribute in node.attribute}
        assert (options["causal"], options["do_rotary"]) == (0, 0)
        assert node.input[10] == "/prefix/bias_of_heads"


def reference(checkpoint: Path, _folder: Path) -> Runner:
    return ReferenceRunner(load(Checkpoint(checkpoint)), max_sequences=5, max_length=LENGTH, cache_tokens=130)


def onnx_engine(checkpoint: Path, folder: Path) -> Runner:
    builder.build(checkpoint, folder, max_length=LENGTH)
    return open_runner(folder, threads=1, max_sequences=5, cache_tokens=130)


@pytest.mark.parametrize("make", [reference, onnx_engine])
def test_more_prompts_than_fit(
    make: Callable[[Path, Path], Runner], tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """Longer than a step, some the same, some preempted: each gets the tokens that it gets alone."""
    checkpoint, oracle = tiny_checkpoint("chatglm-6b"), tiny.TINY["chatglm-6b"].build()
    tokenizer, choose = Tokenizer.load(checkpoint), random.Random(1)
    prompts = [prompt(4 + 9 * (number % 4), seed=number % 4) for number in range(14)]
    counts = [choose.randrange(20, 50) for _ in prompts]
    engine = Engine(make(checkpoint, tmp_path / "engine"), tokenizer, max_step_tokens=8)
    requests = [
        Request(tuple(tokens), Sampling(temperature=0, ignore_eos=True), count)
        for tokens, count in zip(prompts, counts, strict=True)
    ]
    handles = [engine.submit(request) for request in requests]
    engine.start()
    texts = ["".join(event.text for event in handle.events(60)) for handle in handles]
    preemptions, stats = engine.preemptions, engine.stats
    engine.close()
    for number, count in enumerate(counts):
        text = list(prompts[number])
        for _ in range(count):
            text.append(int(expected_of(oracle, text)[-1].argmax()))
        assert texts[number] == tokenizer.decode(text[len(prompts[number]) :])
    assert stats.failed_steps == 0
    assert preemptions > 0
    assert (stats.prefix_hits > 0) == (make is onnx_engine)


def test_a_prompt_without_its_end_is_refused(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint("chatglm-6b")
    engine = Engine(reference(checkpoint, tmp_path), Tokenizer.load(checkpoint))
    with pytest.raises(UserError, match="no token 1, behind which this model answers") as caught:
        engine.submit(Request(tuple(words(5))))
    assert caught.value.param == "prompt"
    engine.close()
