"""The reference decoder against transformers, for every tiny model: logits to 1e-5 of their size, and greedy tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from llmc.checkpoint import Checkpoint
from llmc.model import Decoder, KVCache, load

# Beyond the original context (32) of every tiny model with a scaled rotary embedding, and beyond every window.
LENGTHS = (1, 24, 100)
NEW_TOKENS = 32


@dataclass(frozen=True)
class Pair:
    """One tiny model twice."""

    ours: Decoder
    theirs: Any
    name: str

    @property
    def depends_on_context(self) -> bool:
        return self.name in {"llama-dynamic", "llama-longrope"}


@pytest.fixture(scope="module", params=tiny.TINY)
def pair(request: pytest.FixtureRequest, tiny_checkpoint: Callable[[str], Path]) -> Pair:
    ours = load(Checkpoint(tiny_checkpoint(request.param)))
    return Pair(ours, tiny.TINY[request.param].build(), request.param)


def ids(count: int, rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.tensor([tiny.tokens(count, seed + row) for row in range(rows)])


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Equal to 1e-5 of the largest logit, which is fp32's own noise after some layers."""
    assert ours.dtype == torch.float32
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max()) <= 1e-5 * max(1.0, float(theirs.abs().max()))


@pytest.mark.parametrize("length", LENGTHS)
@torch.inference_mode()
def test_whole(pair: Pair, length: int) -> None:
    tokens = ids(length, rows=2)
    close(pair.ours(tokens), pair.theirs(tokens, use_cache=False).logits)


@pytest.mark.parametrize("sizes", [(1,) * 24, (7, 9, 8), (50, 1, 49)], ids=str)
@torch.inference_mode()
def test_chunks(pair: Pair, sizes: tuple[int, ...]) -> None:
    """Cut in any way and through a cache, a prompt gives what it gives whole, if the context's length is told."""
    tokens = ids(sum(sizes))
    cache = KVCache()
    parts = [pair.ours(part, cache=cache, context=tokens.shape[1]) for part in tokens.split(sizes, dim=1)]
    assert cache.length == tokens.shape[1]
    close(torch.cat(parts, dim=1), pair.theirs(tokens, use_cache=False).logits)


@torch.inference_mode()
def test_ragged_batch(pair: Pair) -> None:
    """Rows padded on the right have the logits that they have alone."""
    lengths = (3, 30, 17)
    tokens = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    for row, length in enumerate(lengths):
        tokens[row, :length] = ids(length, seed=row)
    batch = pair.ours(tokens)
    for row, length in enumerate(lengths):
        close(batch[row : row + 1, :length], pair.theirs(tokens[row : row + 1, :length], use_cache=False).logits)


@torch.inference_mode()
def test_greedy(pair: Pair) -> None:
    """32 tokens, equal to transformers' generate, past every window (8) and the original context (32)."""
    prompt = ids(20)
    expected = pair.theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=-1
    )
    cache, tokens = KVCache(), prompt
    logits = pair.ours(prompt, cache=cache)
    for _ in range(NEW_TOKENS):
        new = logits[:, -1:].argmax(-1)
        tokens = torch.cat((tokens, new), dim=1)
        logits = pair.ours(new, cache=cache)
    assert tokens.tolist() == expected.tolist()


@torch.inference_mode()
def test_only_some_scalings_look_at_the_context(pair: Pair) -> None:
    tokens = ids(24)
    same = torch.equal(pair.ours(tokens), pair.ours(tokens, context=100))
    assert same == (not pair.depends_on_context)
