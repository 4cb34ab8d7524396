"""The same tokens whatever the neighbours: what that takes, and whether a runner gives it.

A matrix product may be rounded differently for one row than for several, and so may attention for one new token of a
sequence; with int8 arithmetic a difference in the last bit can become one in the first decimal, and another token. On
ONNX Runtime's CPU kernels, measured bit for bit on float32 and int4 engines (docs/serving.md), a sequence's results do
not depend on how many others are decoded beside it, or on how a prompt is cut, so long as no piece has one token: only
one token at a time and several at a time differ. Hence the rule of a deterministic engine: a prompt is computed several
tokens at a time and its output one by one, also when it is computed again, and only prompts are reused.

Other machines have other kernels, so `check` tries it at the start.

Knows the Runner protocol. Does not know requests.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from llmc.errors import EngineError
from llmc.runtime import Chunk, Logits, Runner, Tokens

LENGTH = 48
DECODED = 2
# Nobody else reuses what was computed for the check.
SALT = "\0invariance"


def check(runner: Runner) -> None:
    """Compute some sequences alone and together, whole and in pieces.

    Args:
        runner: With nothing claimed.

    Raises:
        EngineError: A sequence's logits depend on the others.
    """
    limits = runner.limits
    length = min(LENGTH, limits.max_length - DECODED)
    count = min(limits.max_sequences, limits.cache_tokens // (length + DECODED))
    random = np.random.Generator(np.random.PCG64(0))
    # Of different lengths, at least 2.
    texts = [random.integers(0, limits.vocab_size, max(2, length - 3 * each) + DECODED) for each in range(count)]
    try:
        alone = [_compute(runner, {-each - 1: text}, pieces=1)[0] for each, text in enumerate(texts)]
        for size in {count, count - 1, 2, 1} & set(range(1, count + 1)):
            together = _compute(runner, {-each - 1: texts[each] for each in range(size)}, pieces=3)
            if not all(np.array_equal(a, b) for a, b in zip(alone, together, strict=False)):
                raise EngineError(
                    "on this machine, what this engine computes of a sequence depends on the others in the batch, so "
                    "--deterministic cannot be kept: build it with `llmc build-engine --arithmetic float32`, or serve "
                    "it with --max-sequences 1"
                )
    finally:
        for each in range(count):
            runner.free(-each - 1)


def _compute(runner: Runner, texts: dict[int, Tokens], pieces: int) -> list[Logits]:
    """For each text float32 [1 + DECODED, width], from a prompt in up to `pieces` pieces and then token by token."""
    rows: dict[int, list[Logits]] = {each: [] for each in texts}
    for each, text in texts.items():
        runner.claim(each, text[:1], SALT)
        borders = _borders(len(text) - DECODED, pieces)
        for start, end in itertools.pairwise(borders):
            (found,) = runner.step([Chunk(each, start, text[start:end], int(end == borders[-1]))])
        rows[each].append(found.copy())
    for place in range(DECODED, 0, -1):
        chunks = [Chunk(each, len(text) - place, text[len(text) - place :][:1]) for each, text in texts.items()]
        for chunk, found in zip(chunks, runner.step(chunks), strict=True):
            rows[chunk.sequence_id].append(found.copy())
    for each in texts:
        runner.free(each)
    return [np.concatenate(found) for found in rows.values()]


def _borders(length: int, pieces: int) -> Sequence[int]:
    """0 to `length` in pieces of 2, 3, ... and the rest, none of one token."""
    inner = [2, 5][: pieces - 1]
    return [0, *(border for border in inner if border <= length - 2), length]
