"""How far models agree: perplexity side by side, and where words are the same, divergence and equal first choices.

The first subject is the baseline. KL divergence is sum p log(p / q), p being the baseline's distribution of the next
token, its mean over all predicted tokens in nats; it notices what a mean likelihood hides (Dutta et al. 2024,
"Accuracy is not all you need").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llmc.evaluate.perplexity import Doubles, Progress, Score, add, log_softmax, perplexity, predictions
from llmc.runtime import Runner, Tokens


@dataclass(frozen=True, slots=True)
class Subject:
    """Something to measure.

    Attributes:
        folder: Where it lies.
        kind: What its manifest says it is.
        runner: It, opened.
        windows: The text as its own tokenizer cuts it.
    """

    folder: Path
    kind: str
    runner: Runner
    windows: Sequence[Tokens]


@dataclass
class Agreement:
    """Of one runner with the baseline, on the same tokens.

    Attributes:
        tokens: Predicted tokens.
        divergence: Sum of KL(baseline || runner), nats.
        agreed: How often both put the same token first.
    """

    tokens: int = 0
    divergence: float = 0.0
    agreed: int = 0

    @property
    def kl(self) -> float:
        return self.divergence / self.tokens

    @property
    def top1(self) -> float:
        return self.agreed / self.tokens

    def add(self, baseline: Doubles, other: Doubles) -> None:
        """Count rows of log-probabilities [rows, vocab]."""
        self.tokens += len(baseline)
        self.divergence += float((np.exp(baseline) * (baseline - other)).sum())
        self.agreed += int((baseline.argmax(axis=1) == other.argmax(axis=1)).sum())


@dataclass
class Row:
    """What was measured of a subject; `agreement` is None where words or tokens are not the baseline's."""

    subject: Subject
    score: Score = field(default_factory=Score)
    agreement: Agreement | None = None

    def figures(self) -> dict[str, Any]:
        """Plain values, for a table or for JSON."""
        return {
            "folder": str(self.subject.folder),
            "kind": self.subject.kind,
            "bytes": sum(path.stat().st_size for path in self.subject.folder.rglob("*") if path.is_file()),
            "tokens": self.score.tokens,
            "perplexity": self.score.perplexity,
            "kl": self.agreement.kl if self.agreement else None,
            "top1": self.agreement.top1 if self.agreement else None,
            "tokens_per_second": self.score.tokens_per_second,
        }


def comparable(baseline: Subject, other: Subject) -> bool:
    """Whether both read the same tokens and choose among the same words."""
    return (
        baseline.runner.limits.vocab_size == other.runner.limits.vocab_size
        and len(baseline.windows) == len(other.windows)
        and all(np.array_equal(one, two) for one, two in zip(baseline.windows, other.windows, strict=True))
    )


def compare(subjects: Sequence[Subject], progress: Progress | None = None) -> list[Row]:
    """Measure all subjects: those comparable with the first in step with it, so that no logits need be kept.

    Args:
        subjects: One or more, each with a runner of its own; the first is the baseline.
        progress: Called after each window of each subject with (done, of all).
    """
    baseline = subjects[0]
    rows = [Row(subject, agreement=Agreement() if comparable(baseline, subject) else None) for subject in subjects]
    tick = _counter(progress, sum(len(subject.windows) for subject in subjects))
    together = [row for row in rows if row.agreement]
    for window in baseline.windows:
        _read_together(together, window)
        tick(len(together))
    for row in rows:
        if row.agreement is None:
            row.score = perplexity(row.subject.runner, row.subject.windows, lambda *_: tick(1))
    return rows


def _read_together(rows: Sequence[Row], window: Tokens) -> None:
    """One window by all, block of rows by block of rows."""
    streams = [predictions(row.subject.runner, window, row.score) for row in rows]
    for blocks in zip(*streams, strict=True):
        expected = log_softmax(blocks[0][0])
        for row, (logits, targets) in zip(rows, blocks, strict=True):
            met = log_softmax(logits)
            add(row.score, met, targets)
            if row.agreement:
                row.agreement.add(expected, met)


def _counter(progress: Progress | None, total: int) -> Callable[[int], None]:
    done = 0

    def tick(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(done, total)

    return tick
