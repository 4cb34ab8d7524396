"""PyTorch models as Runners: slow, simple and true. What an engine computes is compared with the reference decoder.

One cache a sequence and one forward pass a chunk: nothing is batched and nothing reused, so nothing can leak.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from llmc.checkpoint import Checkpoint
from llmc.errors import EngineError
from llmc.model import Decoder, KVCache, load
from llmc.runtime import Chunk, Limits, Logits, Tokens

Cache = TypeVar("Cache")


class SequentialRunner(Generic[Cache]):
    """The protocol of llmc/runtime.py for whatever computes a chunk of one sequence.

    Args:
        compute: (the chunk, what it returned for the chunk before, None for the first) -> rows [chunk.logits, width]
            and what to remember of the sequence.
        cut: (what is remembered, tokens) forgets all that come behind so many.
    """

    def __init__(
        self,
        limits: Limits,
        compute: Callable[[Chunk, Cache | None], tuple[Tensor, Cache]],
        cut: Callable[[Cache, int], None],
    ) -> None:
        self._limits = limits
        self._cut = cut
        self._compute: Callable[[Chunk, Cache | None], tuple[Tensor, Cache]] | None = compute
        self._caches: dict[int, Cache | None] = {}
        self._lengths: dict[int, int] = {}

    @property
    def limits(self) -> Limits:
        return self._limits

    def claim(self, sequence_id: int, tokens: Tokens, salt: str = "") -> int:
        """See Runner. Always 0: nothing is reused."""
        if sequence_id in self._caches:
            raise EngineError(f"sequence {sequence_id} is claimed already")
        if len(self._caches) >= self._limits.max_sequences:
            raise EngineError(f"no room: {len(self._caches)} sequences are claimed")
        self._caches[sequence_id], self._lengths[sequence_id] = None, 0
        return 0

    def step(self, chunks: Sequence[Chunk]) -> list[Logits]:
        """See Runner."""
        new = sum(len(chunk.tokens) for chunk in chunks)
        held = sum(self._lengths.values())
        if held + new > self._limits.cache_tokens:
            raise EngineError(f"no room for {new} tokens: {held} of {self._limits.cache_tokens} are in use")
        with torch.inference_mode():
            return [self._run(chunk) for chunk in chunks]

    def _run(self, chunk: Chunk) -> Logits:
        sequence = chunk.sequence_id
        if sequence not in self._caches or self._compute is None:
            raise EngineError(f"sequence {sequence} was never claimed")
        if chunk.start != self._lengths[sequence]:
            raise EngineError(
                f"sequence {sequence} has {self._lengths[sequence]} tokens, the chunk begins at {chunk.start}"
            )
        if chunk.start + len(chunk.tokens) > self._limits.max_length:
            raise EngineError(f"sequence {sequence} is longer than {self._limits.max_length} tokens")
        logits, self._caches[sequence] = self._compute(chunk, self._caches[sequence])
        self._lengths[sequence] += len(chunk.tokens)
        found: Logits = logits.float().numpy()
        return found

    def truncate(self, sequence_id: int, length: int) -> None:
        """See Runner."""
        cache = self._caches.get(sequence_id)
        if cache is not None and length < self._lengths[sequence_id]:
            self._cut(cache, length)
            self._lengths[sequence_id] = length

    def free(self, sequence_id: int) -> None:
        """See Runner."""
        self._caches.pop(sequence_id, None)
        self._lengths.pop(sequence_id, None)

    def close(self) -> None:
        """See Runner."""
        self._caches.clear()
        self._lengths.clear()
        self._compute = None


class ReferenceRunner(SequentialRunner[KVCache]):
    """Runs a Decoder.

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
        limits = Limits(
            max_sequences=max_sequences,
            max_length=length,
            cache_tokens=cache_tokens or max_sequences * length,
            vocab_size=spec.vocab_size,
            prefix_end=spec.prefix.end if spec.prefix else None,
            state_size=spec.embedding_size or spec.hidden_size,
            num_scores=spec.score.labels if spec.score else 0,
        )

        def compute(chunk: Chunk, cache: KVCache | None) -> tuple[Tensor, KVCache]:
            cache = cache or KVCache()
            hidden = decoder.hidden(torch.from_numpy(chunk.tokens)[None], cache=cache, context=context or length)[0]
            wanted = hidden[len(hidden) - chunk.logits :]
            return wanted if chunk.states else decoder.logits(wanted), cache

        super().__init__(limits, compute, KVCache.truncate)


def open_hugging_face(folder: Path, *, max_sequences: int = 1, max_length: int) -> SequentialRunner[Any]:
    """The runner of a Hugging Face folder: transformers' model of it in float32, with its own cache.

    Raises:
        LlmcError: As `modules.load_hugging_face`.
    """
    from llmc.evaluate.modules import load_hugging_face

    model = load_hugging_face(folder)
    config = model.config.get_text_config()
    length = min(max_length, getattr(config, "max_position_embeddings", None) or max_length)
    scores = model.config.num_labels if hasattr(model, "score") else 0
    limits = Limits(max_sequences, length, max_sequences * length, config.vocab_size, num_scores=scores)

    def compute(chunk: Chunk, cache: Any) -> tuple[Tensor, Any]:
        out = model(torch.from_numpy(chunk.tokens)[None], past_key_values=cache, use_cache=True)
        return out.logits[0, len(chunk.tokens) - chunk.logits :], out.past_key_values

    return SequentialRunner(limits, compute, lambda cache, tokens: cache.crop(tokens))


def open_reference(folder: Path, *, max_sequences: int = 16, max_length: int | None = None) -> ReferenceRunner:
    """The runner of a checkpoint; its sequences are never longer than the model was made for."""
    checkpoint = Checkpoint(folder)
    longest = checkpoint.spec.max_positions
    length = min(max_length or longest, longest)
    return ReferenceRunner(load(checkpoint), max_sequences=max_sequences, max_length=length)
