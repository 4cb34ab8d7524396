"""llmc.evaluate.reference: the reference decoder behind the Runner protocol."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.checkpoint import Checkpoint
from llmc.errors import EngineError
from llmc.evaluate.reference import ReferenceRunner, open_reference
from llmc.model import Decoder, load
from llmc.runtime import Chunk, Runner


@pytest.fixture(scope="module")
def decoder(tiny_checkpoint: Callable[[str], Path]) -> Decoder:
    return load(Checkpoint(tiny_checkpoint("llama")))


@pytest.fixture
def runner(tiny_checkpoint: Callable[[str], Path]) -> ReferenceRunner:
    return open_reference(tiny_checkpoint("llama"), max_sequences=3, max_length=32)


def test_is_a_runner(runner: ReferenceRunner) -> None:
    accepted: Runner = runner
    assert accepted.limits.max_length == 32
    assert accepted.limits.vocab_size == tiny.VOCAB_SIZE
    assert accepted.limits.cache_tokens == 96


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_sequences_do_not_see_each_other(decoder: Decoder, data: st.DataObject) -> None:
    """Cut and mixed in any way, each sequence has the logits that it has alone."""
    runner = ReferenceRunner(decoder, max_sequences=3)
    tokens = {number: np.array(tiny.tokens(data.draw(st.integers(1, 12)), number)) for number in range(3)}
    done = dict.fromkeys(tokens, 0)
    met: dict[int, list[np.ndarray]] = {number: [] for number in tokens}
    for number, ids in tokens.items():
        assert runner.claim(number, ids) == 0
    while unfinished := [number for number in tokens if done[number] < len(tokens[number])]:
        chosen = data.draw(st.lists(st.sampled_from(unfinished), min_size=1, unique=True))
        chunks = []
        for number in chosen:
            size = data.draw(st.integers(1, len(tokens[number]) - done[number]))
            part = tokens[number][done[number] : done[number] + size]
            chunks.append(Chunk(number, done[number], part, logits=size))
            done[number] += size
        for chunk, logits in zip(chunks, runner.step(chunks), strict=True):
            assert logits.shape == (chunk.logits, tiny.VOCAB_SIZE)
            met[chunk.sequence_id].append(logits)
    for number, ids in tokens.items():
        runner.free(number)
        with torch.inference_mode():
            whole = decoder(torch.from_numpy(ids)[None])[0].numpy()
        np.testing.assert_allclose(np.concatenate(met[number]), whole, rtol=0, atol=1e-4)


@pytest.mark.parametrize("wanted", [0, 1, 5])
def test_only_the_wanted_rows(runner: ReferenceRunner, wanted: int) -> None:
    tokens = np.array(tiny.tokens(5))
    runner.claim(7, tokens)
    (logits,) = runner.step([Chunk(7, 0, tokens, logits=wanted)])
    assert logits.shape == (wanted, tiny.VOCAB_SIZE)
    assert logits.dtype == np.float32


def test_what_is_refused(runner: ReferenceRunner) -> None:
    tokens = np.array(tiny.tokens(4))
    with pytest.raises(EngineError, match="never claimed"):
        runner.step([Chunk(9, 0, tokens)])
    for number in range(3):
        runner.claim(number, tokens)
    with pytest.raises(EngineError, match="3 sequences are claimed"):
        runner.claim(3, tokens)
    with pytest.raises(EngineError, match="claimed already"):
        runner.claim(2, tokens)
    with pytest.raises(EngineError, match="has 0 tokens, the chunk begins at 2"):
        runner.step([Chunk(0, 2, tokens)])
    with pytest.raises(EngineError, match="longer than 32 tokens"):
        runner.step([Chunk(0, 0, np.array(tiny.tokens(33)))])
    with pytest.raises(EngineError, match="no room for 97 tokens"):
        runner.step([Chunk(0, 0, np.array(tiny.tokens(97)))])
    for number in (0, 2, 2):
        runner.free(number)
    assert runner.claim(3, tokens) == 0


def test_rope_is_that_of_an_engine_of_this_length(tiny_checkpoint: Callable[[str], Path]) -> None:
    """A short prompt already has the frequencies of the longest context, so chunks do not depend on their cut."""
    decoder = load(Checkpoint(tiny_checkpoint("llama-longrope")))
    tokens = np.array(tiny.tokens(6))
    runner = ReferenceRunner(decoder, max_length=100)
    runner.claim(0, tokens)
    (logits,) = runner.step([Chunk(0, 0, tokens, logits=6)])
    with torch.inference_mode():
        long, short = (decoder(torch.from_numpy(tokens)[None], context=length)[0] for length in (100, 6))
    np.testing.assert_array_equal(logits, long.numpy())
    assert not np.array_equal(logits, short.numpy())
