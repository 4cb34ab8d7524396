"""The same tokens whatever the neighbours: what that takes, and whether a runner gives it.

Kernels choose their way by the number of rows: one new token of a sequence is rounded differently from several, and
several at times differently from more. With int8 arithmetic a difference in the last bit can become one in the first
decimal, and another token. So a deterministic engine computes a sequence in the same pieces always: its prompt in
blocks, each a run of its own, and its output one by one, also when it is computed again; and only whole blocks of
prompts are reused from the cache.

What is left are the others in a batch that decodes. On ONNX Runtime's CPU kernels a row does not depend on them, bit
for bit, in float32 and in int8 arithmetic (docs/serving.md); other machines have other kernels, so `check` tries it at
the start.

Knows the Runner protocol. Does not know requests.
"""

from __future__ import annotations

import numpy as np

from llmc.errors import EngineError, UserError
from llmc.runtime import Chunk, Logits, Runner, Tokens

BLOCK = 32
LENGTH = 48
DECODED = 2
# Nobody else reuses what was computed for the check.
SALT = "\0invariance"


def check(runner: Runner, *, drafting: bool = False) -> None:
    """Compute some sequences alone, then together with one other, with most, and with as many as there may be.

    Args:
        runner: With nothing claimed.
        drafting: Tokens are going to be drafted.

    Raises:
        UserError: Drafts are computed several tokens at a time, or not, as the load allows.
        EngineError: A sequence's logits depend on the others.
    """
    if drafting:
        raise UserError(
            "drafts are computed several tokens at a time, or not, as the load allows: --speculate and --deterministic "
            "exclude each other"
        )
    limits = runner.limits
    length = min(LENGTH, limits.max_length - DECODED)
    count = min(limits.max_sequences, limits.cache_tokens // (length + DECODED))
    random = np.random.Generator(np.random.PCG64(0))
    lengths = [max(1, length - 3 * each) + DECODED for each in range(count)]
    texts = {-each - 1: random.integers(0, limits.vocab_size, size) for each, size in enumerate(lengths)}
    try:
        alone = {each: _compute(runner, {each: text})[each] for each, text in texts.items()}
        for size in {2, count - 1, count} & set(range(2, count + 1)):
            together = _compute(runner, dict(list(texts.items())[:size]))
            if not all(np.array_equal(rows, alone[each]) for each, rows in together.items()):
                raise EngineError(
                    "on this machine, what this engine computes of a sequence depends on the others in the batch, so "
                    "--deterministic cannot be kept: build it with `llmc build-engine --device cpu --arithmetic "
                    "float32`, or serve it with --max-sequences 1"
                )
    finally:
        for each in texts:
            runner.free(each)


def _compute(runner: Runner, texts: dict[int, Tokens]) -> dict[int, Logits]:
    """For each text float32 [1 + DECODED, vocab_size], from its prompt in blocks and then token by token."""
    rows: dict[int, list[Logits]] = {}
    for each, text in texts.items():
        runner.claim(each, text[:1], SALT)
        end = len(text) - DECODED
        for start in range(0, end, BLOCK):
            (found,) = runner.step([Chunk(each, start, text[start : min(start + BLOCK, end)])])
        rows[each] = [found.copy()]
    for place in range(DECODED, 0, -1):
        chunks = [Chunk(each, len(text) - place, text[len(text) - place :][:1]) for each, text in texts.items()]
        for chunk, found in zip(chunks, runner.step(chunks), strict=True):
            rows[chunk.sequence_id].append(found.copy())
    for each in texts:
        runner.free(each)
    return {each: np.concatenate(found) for each, found in rows.items()}
