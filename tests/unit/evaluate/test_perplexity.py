"""llmc.evaluate.perplexity against transformers' own loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from llmc.checkpoint import Checkpoint
from llmc.errors import UserError
from llmc.evaluate import perplexity as module
from llmc.evaluate.perplexity import log_softmax, perplexity
from llmc.evaluate.reference import ReferenceRunner, open_reference
from llmc.model import load

SIZES = (40, 40, 7, 2)


def windows() -> list[np.ndarray]:
    return [np.array(tiny.tokens(size, seed)) for seed, size in enumerate(SIZES)]


@pytest.mark.parametrize("name", ["llama", "qwen2.5-tied", "mistral-window"])
@pytest.mark.parametrize("chunk", [3, 128])
def test_is_the_loss_of_transformers(
    name: str, chunk: int, tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_TOKENS", chunk)
    model = tiny.TINY[name].build()
    total = 0.0
    with torch.inference_mode():
        for window in windows():
            row = torch.from_numpy(window)[None]
            total += float(model(row, labels=row).loss) * (len(window) - 1)
    predicted = sum(SIZES) - len(SIZES)
    score = perplexity(open_reference(tiny_checkpoint(name)), windows())
    assert score.tokens == predicted
    assert score.perplexity == pytest.approx(math.exp(total / predicted), rel=1e-5)
    assert score.tokens_per_second > 0


def test_is_deterministic(tiny_checkpoint: Callable[[str], Path]) -> None:
    runner = open_reference(tiny_checkpoint("llama"))
    assert perplexity(runner, windows()).nll == perplexity(runner, windows()).nll


def test_frees_what_it_claims(tiny_checkpoint: Callable[[str], Path]) -> None:
    runner = open_reference(tiny_checkpoint("llama"), max_sequences=1)
    perplexity(runner, windows())
    runner.claim(0, np.array([1]))


def test_reuse_of_prompts_does_not_hide_tokens(tiny_checkpoint: Callable[[str], Path]) -> None:
    """A runner that has seen a window before still computes every row."""

    class Remembering(ReferenceRunner):
        def claim(self, sequence_id: int, tokens: np.ndarray) -> int:
            super().claim(sequence_id, tokens)
            return len(tokens) - 1  # all that the protocol lets it claim to know

    decoder = load(Checkpoint(tiny_checkpoint("llama")))
    plain = perplexity(ReferenceRunner(decoder), windows())
    assert perplexity(Remembering(decoder), windows()).nll == plain.nll


def test_window_longer_than_the_model(tiny_checkpoint: Callable[[str], Path]) -> None:
    runner = open_reference(tiny_checkpoint("llama"), max_length=16)
    with pytest.raises(UserError, match="at most 16; choose a smaller --window"):
        perplexity(runner, windows())


def test_progress_counts_windows(tiny_checkpoint: Callable[[str], Path]) -> None:
    calls: list[tuple[int, int]] = []
    perplexity(open_reference(tiny_checkpoint("llama")), windows(), lambda *call: calls.append(call))
    assert calls == [(done + 1, len(SIZES)) for done in range(len(SIZES))]


@settings(deadline=None)
@given(hnp.arrays(np.float32, (3, 5), elements=st.floats(-(2.0**100), 2.0**100, width=32)))
def test_log_softmax_is_stable(logits: np.ndarray) -> None:
    found = log_softmax(logits)
    np.testing.assert_allclose(np.exp(found).sum(axis=1), 1, rtol=1e-12)
    expected = torch.log_softmax(torch.from_numpy(logits).double(), dim=1).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
