"""The reference decoder as a Runner: slow, simple and true. What an engine computes is compared with it.

One cache a sequence and one forward pass a chunk: nothing is batched and nothing reused, so nothing can leak.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from llmc.checkpoint import Checkpoint
from llmc.errors import EngineError
from llmc.model import Decoder, KVCache, load
from llmc.runtime import Chunk, Limits, Logits, Tokens


class ReferenceRunner:
    """Runs a Decoder behind the protocol of llmc/runtime.py.

    Args:
        max_length: Tokens of one sequence; by default what the model was made for.
        cache_tokens: Tokens of all sequences together; by default enough for all to be as long as they may.
        context: The length that rope scalings see; by default `max_length`, which is what an engine built for that
            length does, and makes results independent of how a prompt is cut into chunks.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        max_sequences: int = 16,
        max_length: int | None = None,
        cache_tokens: int | None = None,
        context: int | None = None,
    ) -> None:
        length = max_length or decoder.spec.max_positions
        spec = decoder.spec
        self._limits = Limits(
            max_sequences=max_sequences,
            max_length=length,
            cache_tokens=cache_tokens or max_sequences * length,
            vocab_size=spec.vocab_size,
            prefix_end=spec.prefix.end if spec.prefix else None,
            state_size=spec.embedding_size or spec.hidden_size,
            num_scores=spec.score.labels if spec.score else 0,
        )
        self._decoder = decoder
        self._context = context or length
        self._caches: dict[int, KVCache] = {}

    @property
    def limits(self) -> Limits:
        return self._limits

    def claim(self, sequence_id: int, tokens: Tokens, salt: str = "") -> int:
        """See Runner. Always 0: nothing is reused."""
        if sequence_id in self._caches:
            raise EngineError(f"sequence {sequence_id} is claimed already")
        if len(self._caches) >= self._limits.max_sequences:
            raise EngineError(f"no room: {len(self._caches)} sequences are claimed")
        self._caches[sequence_id] = KVCache()
        return 0

    def step(self, chunks: Sequence[Chunk]) -> list[Logits]:
        """See Runner."""
        new = sum(len(chunk.tokens) for chunk in chunks)
        held = sum(cache.length for cache in self._caches.values())
        if held + new > self._limits.cache_tokens:
            raise EngineError(f"no room for {new} tokens: {held} of {self._limits.cache_tokens} are in use")
        with torch.inference_mode():
            return [self._run(chunk) for chunk in chunks]

    def _run(self, chunk: Chunk) -> Logits:
        cache = self._caches.get(chunk.sequence_id)
        if cache is None:
            raise EngineError(f"sequence {chunk.sequence_id} was never claimed")
        if chunk.start != cache.length:
            raise EngineError(
                f"sequence {chunk.sequence_id} has {cache.length} tokens, the chunk begins at {chunk.start}"
            )
        if chunk.start + len(chunk.tokens) > self._limits.max_length:
            raise EngineError(f"sequence {chunk.sequence_id} is longer than {self._limits.max_length} tokens")
        hidden = self._decoder.hidden(torch.from_numpy(chunk.tokens)[None], cache=cache, context=self._context)[0]
        wanted = hidden[len(hidden) - chunk.logits :]
        found: Logits = (wanted if chunk.states else self._decoder.logits(wanted)).numpy()
        return found

    def truncate(self, sequence_id: int, length: int) -> None:
        """See Runner."""
        if sequence_id in self._caches:
            self._caches[sequence_id].truncate(length)

    def free(self, sequence_id: int) -> None:
        """See Runner."""
        self._caches.pop(sequence_id, None)

    def close(self) -> None:
        """See Runner."""
        self._caches.clear()
        del self._decoder


def open_reference(folder: Path, *, max_sequences: int = 16, max_length: int | None = None) -> ReferenceRunner:
    """The runner of a checkpoint; its sequences are never longer than the model was made for."""
    checkpoint = Checkpoint(folder)
    longest = checkpoint.spec.max_positions
    length = min(max_length or longest, longest)
    return ReferenceRunner(load(checkpoint), max_sequences=max_sequences, max_length=length)
