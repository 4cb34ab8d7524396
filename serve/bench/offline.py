"""How fast a runner is by itself: without scheduler, sampler and HTTP.

Prefill is measured on one prompt, in chunks as the server computes it; decoding on batches of sequences of the same
length. Each figure is the better of two rounds, of which the first also touches memory that was not used before.

Knows: the Runner protocol. Does not know: backends.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from llmc.errors import UserError
from llmc.runtime import Chunk, Runner

ROUNDS = 2


@dataclass(frozen=True, slots=True)
class Rate:
    """One measurement.

    Attributes:
        what: "prefill" or "decode".
        batch: Sequences at a time.
        tokens: Computed in the round.
        seconds: Of the better round.
        step: Milliseconds of one call of the runner.
    """

    what: str
    batch: int
    tokens: int
    seconds: float
    step: float

    def row(self) -> dict[str, Any]:
        """As it is written."""
        return {**asdict(self), "tokens_per_second": self.tokens / self.seconds}


def measure(runner: Runner, *, batches: Sequence[int], prompt: int, output: int, chunk: int) -> list[Rate]:
    """Prefill of one prompt, and decoding at each batch size.

    Args:
        prompt: Tokens of each prompt.
        output: Tokens generated for each sequence.
        chunk: Tokens of a prompt that are computed in one step, where prompts may be cut.

    Raises:
        UserError: The engine cannot hold so many sequences, or such long ones.
    """
    limits = runner.limits
    most = max(batches)
    if most > limits.max_sequences or most * (prompt + output) > limits.cache_tokens:
        raise UserError(
            f"{most} sequences of {prompt + output} tokens do not fit: this engine was opened for "
            f"{limits.max_sequences} sequences and {limits.cache_tokens} tokens in its cache"
        )
    if prompt + output > limits.max_length:
        raise UserError(f"{prompt + output} tokens are longer than this engine's longest sequence, {limits.max_length}")
    random = np.random.default_rng(0)
    # As it is served: such a prompt is never cut.
    chunk = chunk if limits.prefix_end is None else prompt
    rates = [_best(_prefill(runner, random, prompt, chunk) for _ in range(ROUNDS))]
    decodes = ((_decode(runner, random, batch, prompt, output) for _ in range(ROUNDS)) for batch in batches)
    return rates + [_best(rounds) for rounds in decodes]


def _best(rates: Any) -> Rate:
    found: Rate = min(rates, key=lambda each: each.seconds)
    return found


def _prompt(runner: Runner, random: np.random.Generator, count: int) -> Any:
    return random.integers(0, runner.limits.vocab_size, count)


def _prefill(runner: Runner, random: np.random.Generator, prompt: int, chunk: int) -> Rate:
    tokens = _prompt(runner, random, prompt)
    begins = range(runner.claim(0, tokens), prompt, chunk)
    began = time.perf_counter()
    for begin in begins:
        end = min(begin + chunk, prompt)
        runner.step([Chunk(0, begin, tokens[begin:end], int(end == prompt))])
    took = time.perf_counter() - began
    runner.free(0)
    return Rate("prefill", 1, prompt - begins.start, took, 1000 * took / len(begins))


def _decode(runner: Runner, random: np.random.Generator, batch: int, prompt: int, output: int) -> Rate:
    for index in range(batch):
        tokens = _prompt(runner, random, prompt)
        start = runner.claim(index, tokens)
        runner.step([Chunk(index, start, tokens[start:], 0)])
    last = np.zeros(batch, np.int64)
    began = time.perf_counter()
    for step in range(output):
        chunks = [Chunk(index, prompt + step, last[index : index + 1], 1) for index in range(batch)]
        last = np.array([int(row[-1].argmax()) for row in runner.step(chunks)], np.int64)
    took = time.perf_counter() - began
    for index in range(batch):
        runner.free(index)
    return Rate("decode", batch, batch * output, took, 1000 * took / output)
