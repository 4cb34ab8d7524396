"""What an engine offers to whoever runs it: the server, `llmc generate`, the evaluation.

A Runner computes logits for chunks of sequences and owns the KV cache: where it lies, in which layout and type, and
what of it can be used again. It knows nothing of requests, sampling or text. Only numpy types pass through here, so
that the server needs no torch.

    claim(7, prompt) -> 32           sequence 7 begins; its first 32 tokens are in the cache already
    step([Chunk(7, 32, ...)])        compute the rest, perhaps in several chunks
    step([Chunk(7, n, [token])])     decode: the same thing with one token
    truncate(7, n)                   its last token is taken back
    free(7)                          what it computed may serve a later claim
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Limits:
    """What a runner can hold.

    Attributes:
        max_sequences: Sequences that may be claimed at a time.
        max_length: Tokens of one sequence, prompt and output together.
        cache_tokens: Tokens of all claimed sequences together.
        vocab_size: Tokens that there are, and width of a row of logits.
        prefix_end: All tokens of a sequence before its first `prefix_end` see each other. So its first chunk holds
            them and that token, or none is there at all; None where chunks may be cut anywhere.
        token_bytes: Memory that one token takes in the cache; 0 where that is not known.
        state_size: Width of a row of what the head reads; 0 where that cannot be asked for.
        num_scores: Width of a row of a scoring head, which gives these in place of logits; 0 where there is none.
    """

    max_sequences: int
    max_length: int
    cache_tokens: int
    vocab_size: int
    prefix_end: int | None = None
    token_bytes: int = 0
    state_size: int = 0
    num_scores: int = 0

    @property
    def cache_bytes(self) -> int:
        """Memory that the cache takes at most."""
        return self.cache_tokens * self.token_bytes

    @property
    def width(self) -> int:
        """Of a row of what the head gives."""
        return self.num_scores or self.vocab_size


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some consecutive tokens of one sequence, to be computed in the next step.

    Attributes:
        sequence_id: A claimed sequence.
        start: Position of the first token; all before it are in the cache.
        tokens: int64 [count], count >= 1.
        logits: How many of the last tokens want their logits: 0 in the midst of a prompt, 1 to sample, more for
            scoring and for checking speculated tokens.
        adapter: Name of the low-rank adapter that the sequence is computed with; the same in all its chunks.
        states: These tokens want what the head reads in place of what it gives, and the head is not computed.
    """

    sequence_id: int
    start: int
    tokens: Tokens
    logits: int = 1
    states: bool = False
    adapter: str = ""


class Runner(Protocol):
    """One loaded model. Used by one thread at a time."""

    @property
    def limits(self) -> Limits: ...

    def claim(self, sequence_id: int, tokens: Tokens, salt: str = "") -> int:
        """Begin a sequence.

        Args:
            sequence_id: Any number not in use.
            tokens: int64 [count], its tokens so far.
            salt: Only what was claimed with the same salt may be reused.

        Returns:
            How many of its first tokens are in the cache already; always less than `count`, so that at least one
            token is left to compute logits from.

        Raises:
            EngineError: No room; the caller counts against `limits` and does not let this happen.
        """
        ...

    def step(self, chunks: Sequence[Chunk]) -> list[Logits]:
        """Compute one chunk of each of some claimed sequences, all different.

        Returns:
            For each chunk, in order, float32 [chunk.logits, limits.width], or [chunk.logits, limits.state_size] of
            states; valid until the next step, which may write over them.

        Raises:
            EngineError: The step failed; the caches of these sequences are as undefined as their results.
        """
        ...

    def truncate(self, sequence_id: int, length: int) -> None:
        """Take back what was computed of a sequence behind its first `length` tokens; unknown ids are ignored."""
        ...

    def free(self, sequence_id: int) -> None:
        """End a sequence. Unknown ids are ignored, so that an abort may cross a finish."""
        ...

    def close(self) -> None:
        """Give back all memory. Nothing may be called afterwards."""
        ...
