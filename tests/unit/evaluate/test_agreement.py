"""llmc.evaluate.agreement against torch's KL divergence, on runners whose logits are known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from llmc.evaluate.agreement import Subject, compare
from llmc.evaluate.perplexity import perplexity
from llmc.runtime import Chunk, Limits, Logits, Tokens

WINDOWS = [np.arange(200) % 11, np.array([3, 1, 4, 1, 5])]


class Fixed:
    """A runner whose logits after a token are a row of a table."""

    def __init__(self, vocab_size: int, seed: int) -> None:
        self.limits = Limits(1, 512, 512, vocab_size)
        common, own = (np.random.default_rng(number).normal(0, 2, (11, vocab_size)) for number in (99, seed))
        self.table = (common + 0.5 * own).astype(np.float32)
        self.claimed: set[int] = set()

    def claim(self, sequence_id: int, tokens: Tokens) -> int:
        assert sequence_id not in self.claimed
        self.claimed.add(sequence_id)
        return 0

    def step(self, chunks: Sequence[Chunk]) -> list[Logits]:
        return [self.table[chunk.tokens[len(chunk.tokens) - chunk.logits :]] for chunk in chunks]

    def free(self, sequence_id: int) -> None:
        self.claimed.discard(sequence_id)

    def close(self) -> None:
        self.claimed.clear()


def subject(vocab_size: int = 11, seed: int = 0, windows: list[np.ndarray] = WINDOWS) -> Subject:
    return Subject("nowhere", "engine", windows, Fixed(vocab_size, seed))


def test_divergence_is_that_of_torch() -> None:
    subjects = [subject(seed=0), subject(seed=1)]
    _, row = compare(subjects)
    inputs = np.concatenate([window[:-1] for window in WINDOWS])
    first, second = (
        torch.log_softmax(torch.from_numpy(item.runner.table[inputs]).double(), dim=1)  # type: ignore[attr-defined]
        for item in subjects
    )
    expected = torch.nn.functional.kl_div(second, first, log_target=True, reduction="batchmean")
    assert row.agreement is not None
    assert row.agreement.tokens == len(inputs)
    assert row.agreement.kl == pytest.approx(float(expected), rel=1e-9)
    assert row.agreement.top1 == pytest.approx(float((first.argmax(1) == second.argmax(1)).double().mean()))
    assert 0 < row.agreement.top1 < 1


def test_scores_are_those_of_each_alone() -> None:
    rows = compare([subject(seed=0), subject(seed=1), subject(vocab_size=12, seed=2)])
    for row in rows:
        alone = perplexity(row.subject.runner, WINDOWS)
        assert (row.score.tokens, row.score.nll) == (alone.tokens, pytest.approx(alone.nll, rel=1e-12))


def test_baseline_agrees_with_itself() -> None:
    (row,) = compare([subject()])
    assert row.agreement is not None
    assert (row.agreement.kl, row.agreement.top1) == (0.0, 1.0)


@pytest.mark.parametrize(
    "other",
    [subject(vocab_size=12), subject(windows=WINDOWS[:1]), subject(windows=[WINDOWS[0], WINDOWS[1][::-1]])],
    ids=["other words", "fewer windows", "other tokens"],
)
def test_no_agreement_where_it_means_nothing(other: Subject) -> None:
    first, second = compare([subject(), other])
    assert first.agreement is not None
    assert second.agreement is None
    assert second.score.tokens == sum(len(window) - 1 for window in other.windows)
    assert second.figures()["kl"] is None


def test_progress_counts_windows_of_all() -> None:
    calls: list[tuple[int, int]] = []
    compare([subject(), subject(seed=1), subject(vocab_size=12)], lambda *call: calls.append(call))
    assert calls == [(2, 6), (4, 6), (5, 6), (6, 6)]
