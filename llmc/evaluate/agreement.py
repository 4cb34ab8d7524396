"""How far models agree: perplexity side by side, and where words are the same, divergence and equal first choices.

The first subject is the baseline. KL divergence is sum p log(p / q), p being the baseline's distribution of the next
token, its mean over all predicted tokens in nats; it notices what a mean likelihood hides (Dutta et al. 2024,
"Accuracy is not all you need"). A server says no distribution, only the likeliest words, and so has no KL.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from llmc.evaluate.perplexity import Doubles, Progress, Score, add, log_softmax, perplexity, predictions
from llmc.runtime import Runner, Tokens

if TYPE_CHECKING:
    from llmc.evaluate.parity import Piece, Scores


@dataclass(frozen=True, slots=True)
class Subject:
    """Something to measure, by a runner or by what a server says.

    Attributes:
        name: As the user gave it.
        kind: "hf", "checkpoint", "engine" or "server".
        windows: The text as its own tokenizer cuts it; for a server that has none, pieces of the text.
        runner: It, opened; None for a server.
        score: What a server says of a piece; None for the others.
        word: A token as a text, as servers write it.
        size: Bytes on disk; None for a server.
    """

    name: str
    kind: str
    windows: Sequence[Piece]
    runner: Runner | None = None
    score: Callable[[Piece], Scores] | None = None
    word: Callable[[int], str] = str
    size: int | None = None

    @property
    def tokens(self) -> list[Tokens]:
        """The windows that are tokens."""
        return [window for window in self.windows if not isinstance(window, str)]


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
            "folder": self.subject.name,
            "kind": self.subject.kind,
            "bytes": self.subject.size,
            "tokens": self.score.tokens,
            "perplexity": self.score.perplexity,
            "kl": self.agreement.kl if self.agreement and self.subject.runner else None,
            "top1": self.agreement.top1 if self.agreement else None,
            "tokens_per_second": self.score.tokens_per_second,
        }


def comparable(baseline: Subject, other: Subject) -> bool:
    """Whether both read the same tokens and choose among the same words, as far as they say."""
    if baseline.runner is None or len(baseline.windows) != len(other.windows):
        return False
    if other.runner and other.runner.limits.vocab_size != baseline.runner.limits.vocab_size:
        return False
    return all(np.array_equal(one, two) for one, two in zip(baseline.tokens, other.tokens, strict=True))


def compare(subjects: Sequence[Subject], progress: Progress | None = None) -> list[Row]:
    """Measure all subjects: those comparable with the first in step with it, so that no logits need be kept.

    Args:
        subjects: One or more, each with a runner of its own, or a server; the first is the baseline.
        progress: Called after each window of each subject with (done, of all).
    """
    baseline = subjects[0]
    rows = [Row(subject, agreement=Agreement() if comparable(baseline, subject) else None) for subject in subjects]
    tick = _counter(progress, sum(len(subject.windows) for subject in subjects))
    together = [row for row in rows if row.agreement and row.subject.runner]
    first_choices = []
    for window in baseline.tokens if together else ():
        first_choices.append(_read_together(together, window))
        tick(len(together))
    for row in rows:
        if row.subject.runner is None:
            _ask(row, [[baseline.word(token) for token in choices] for choices in first_choices], tick)
        elif row.agreement is None:
            row.score = perplexity(row.subject.runner, row.subject.tokens, lambda *_: tick(1))
    return rows


def _read_together(rows: Sequence[Row], window: Tokens) -> list[int]:
    """One window by all, block of rows by block of rows; returns the tokens that the baseline puts first."""
    streams = [predictions(row.subject.runner, window, row.score) for row in rows if row.subject.runner]
    choices: list[int] = []
    for blocks in zip(*streams, strict=True):
        expected = log_softmax(blocks[0][0])
        choices += expected.argmax(axis=1).tolist()
        for row, (logits, targets) in zip(rows, blocks, strict=True):
            met = log_softmax(logits)
            add(row.score, met, targets)
            if row.agreement:
                row.agreement.add(expected, met)
    return choices


def _ask(row: Row, first_choices: Sequence[Sequence[str]], tick: Callable[[int], None]) -> None:
    """All windows by a server, which says the likeliest words and no distribution."""
    if row.subject.score is None:
        raise ValueError(f"{row.subject.name} has neither a runner nor a score")
    for at, window in enumerate(row.subject.windows):
        began = time.perf_counter()
        said = row.subject.score(window)
        row.score.seconds += time.perf_counter() - began
        row.score.tokens += len(said.logprobs)
        row.score.nll -= math.fsum(said.logprobs)
        if row.agreement:
            pairs = zip(said.top, first_choices[at], strict=True)
            row.agreement.tokens += len(said.top)
            row.agreement.agreed += sum(max(top, key=top.__getitem__) == word for top, word in pairs)
        tick(1)


def _counter(progress: Progress | None, total: int) -> Callable[[int], None]:
    done = 0

    def tick(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(done, total)

    return tick
