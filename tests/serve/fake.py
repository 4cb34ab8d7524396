"""A toy model behind the Runner protocol, and a tokenizer to go with it: exact, instant, and strict.

The logits after some tokens are a pure function of these tokens, so whatever a scheduler does, the same prompt must
give the same text. The runner keeps the tokens themselves as its "cache" and raises AssertionError for any breach of
the protocol in llmc/runtime.py.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tiny

from llmc.errors import EngineError
from llmc.runtime import Chunk, Limits, Logits, Tokens
from llmc.tokenizer import Tokenizer

VOCAB = tiny.VOCAB_SIZE
TOKEN_BYTES = 8
STATE_SIZE = 24


def tokenizer(folder: Path) -> Tokenizer:
    """The tiny tokenizer, whose end of text is <|im_end|> (2)."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny.save_tokenizer(folder)
    return Tokenizer.load(folder)


def row(tokens: Sequence[int], vocab_size: int = VOCAB, *, eos: int | None = None) -> Logits:
    """float32 [vocab_size]: what the toy model says after `tokens`.

    Args:
        eos: This token is made the likeliest after some texts, about one in 24; None never.
    """
    digest = 1469598103934665603
    for token in tokens:
        digest = ((digest ^ (int(token) + 1)) * 1099511628211) % 2**64
    logits = np.random.Generator(np.random.PCG64(digest)).standard_normal(vocab_size, np.float32)
    logits[:3] = -9.0
    if eos is not None and digest % 24 == 0:
        logits[eos] = 9.0
    return logits


def greedy(prompt: Sequence[int], count: int, *, eos: int | None = None, ignore_eos: bool = False) -> list[int]:
    """The tokens that any correct engine generates with temperature 0; ends after `eos` unless that is ignored."""
    tokens: list[int] = []
    while len(tokens) < count and (ignore_eos or eos is None or tokens[-1:] != [eos]):
        tokens.append(int(row([*prompt, *tokens], eos=eos).argmax()))
    return tokens


class FakeRunner:
    """The toy model.

    Args:
        delay: Seconds that a step takes.
        eos: See `row`.
        remember: How many freed sequences may be reused.
        num_scores: The model has a scoring head of so many scores, in place of its other.

    Attributes:
        fail_steps: Numbers of steps (from 0) that raise EngineError.
        poison: A step with a sequence that contains this token gives NaN for it.
        gate: Steps wait for it when it is cleared.
    """

    def __init__(
        self,
        *,
        max_sequences: int = 4,
        max_length: int = 128,
        cache_tokens: int | None = None,
        vocab_size: int = VOCAB,
        delay: float = 0.0,
        eos: int | None = None,
        remember: int = 4,
        num_scores: int = 0,
    ) -> None:
        held = cache_tokens or max_sequences * max_length
        self._limits = Limits(
            max_sequences,
            max_length,
            held,
            vocab_size,
            token_bytes=TOKEN_BYTES,
            state_size=STATE_SIZE,
            num_scores=num_scores,
        )
        self.delay = delay
        self.eos = eos
        self.fail_steps: set[int] = set()
        self.poison: int | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.steps = 0
        self.most_sequences = 0
        self.most_tokens = 0
        self.batches: list[int] = []
        self.caches: dict[int, _Cache] = {}
        self.closed = False
        self._remembered: deque[_Cache] = deque(maxlen=remember)
        self._inside = threading.Lock()

    @property
    def limits(self) -> Limits:
        return self._limits

    def claim(self, sequence_id: int, tokens: Tokens, salt: str = "") -> int:
        with _alone(self._inside):
            assert not self.closed
            assert sequence_id not in self.caches, f"{sequence_id} is claimed already"
            assert tokens.dtype == np.int64
            assert tokens.ndim == 1
            assert 1 <= len(tokens) <= self._limits.max_length
            assert len(self.caches) < self._limits.max_sequences, "too many sequences"
            wanted = tokens.tolist()
            # A scope begins with the adapter's name; what was computed with another one is of no use.
            known = [cache for cache in (*self._remembered, *self.caches.values()) if cache.salt == salt]
            reused = min(max((_shared(wanted, other) for other in known), default=0), len(wanted) - 1)
            best = next((cache for cache in known if reused and _shared(wanted, cache) >= reused), None)
            self.caches[sequence_id] = _Cache(wanted[:reused])
            self.caches[sequence_id].salt = salt
            self.caches[sequence_id].adapter = None if best is None else best.adapter
            return reused

    def step(self, chunks: Sequence[Chunk]) -> list[Logits]:
        with _alone(self._inside):
            assert not self.closed
            assert chunks, "an empty step"
            ids = [chunk.sequence_id for chunk in chunks]
            assert len(set(ids)) == len(ids), "a sequence twice in one step"
            self.gate.wait(30)
            if self.delay:
                time.sleep(self.delay)
            number, self.steps = self.steps, self.steps + 1
            self.batches.append(sum(len(chunk.tokens) for chunk in chunks))
            if number in self.fail_steps:
                for each in ids:
                    self.caches[each] = _Cache([-1])
                raise EngineError("told to fail")
            rows = [self._compute(chunk) for chunk in chunks]
            held = sum(len(cache) for cache in self.caches.values())
            self.most_tokens = max(self.most_tokens, held)
            self.most_sequences = max(self.most_sequences, len(self.caches))
            assert held <= self._limits.cache_tokens, f"{held} tokens in a cache of {self._limits.cache_tokens}"
            return rows

    def _compute(self, chunk: Chunk) -> Logits:
        cache = self.caches[chunk.sequence_id]
        count = len(chunk.tokens)
        assert chunk.tokens.dtype == np.int64
        assert count >= 1
        assert 0 <= chunk.logits <= count
        assert chunk.start == len(cache), f"starts at {chunk.start}, computed are {len(cache)}"
        assert cache.adapter in (None, chunk.adapter), "computed with another adapter"
        cache.adapter = chunk.adapter
        cache.extend(chunk.tokens.tolist())
        assert len(cache) <= self._limits.max_length
        ends = range(len(cache) - chunk.logits + 1, len(cache) + 1)
        width = self._limits.state_size if chunk.states else self._limits.width
        rows = [
            row([*chunk.adapter.encode(), *cache[:end]], width, eos=None if width < VOCAB else self.eos) for end in ends
        ]
        if self.poison is not None and self.poison in cache:
            rows = [np.full_like(each, np.nan) for each in rows]
        return np.array(rows, np.float32).reshape(chunk.logits, width)

    def truncate(self, sequence_id: int, length: int) -> None:
        with _alone(self._inside):
            assert not self.closed
            del self.caches[sequence_id][length:]

    def free(self, sequence_id: int) -> None:
        with _alone(self._inside):
            assert not self.closed
            cache = self.caches.pop(sequence_id, None)
            if cache and -1 not in cache:
                self._remembered.append(cache)

    def close(self) -> None:
        self.closed = True


class _Cache(list[int]):
    """Tokens, and the salt that they were claimed with."""

    salt = ""
    adapter: str | None = None


class _alone:  # noqa: N801
    """Fails instead of waiting when two threads are inside the runner."""

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        assert self._lock.acquire(blocking=False), "two threads in the runner"

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def _shared(a: list[int], b: list[int]) -> int:
    count = 0
    for left, right in zip(a, b, strict=False):
        if left != right:
            break
        count += 1
    return count
