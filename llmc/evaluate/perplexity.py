"""Perplexity of whatever runs: exp of the mean negative log-likelihood of each token after those before it.

Windows do not see each other, and the first token of a window is not predicted; so the figure is that of transformers'
loss on the same windows, weighted by their predicted tokens. Deterministic: no sampling, fp64 where sums are long.

Knows: the Runner protocol and arithmetic. Does not know: text, folders.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llmc.errors import UserError
from llmc.runtime import Chunk, Logits, Runner, Tokens

Doubles = npt.NDArray[np.float64]
Progress = Callable[[int, int], None]

# Tokens computed at a time, and rows of logits looked at in fp64 at a time: with a vocabulary of 150,000 these are
# 77 and 19 MB.
CHUNK_TOKENS = 128
ROWS = 16


@dataclass
class Score:
    """What was measured of one runner.

    Attributes:
        tokens: Predicted tokens.
        nll: Sum of their negative log-likelihoods, nats.
        seconds: Time in the runner's steps.
    """

    tokens: int = 0
    nll: float = 0.0
    seconds: float = 0.0

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll / self.tokens)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def perplexity(runner: Runner, windows: Sequence[Tokens], progress: Progress | None = None) -> Score:
    """Measure a runner.

    Args:
        windows: int64 [tokens] each, two tokens or more.
        progress: Called after each window with (windows done, windows).

    Raises:
        UserError: A window is longer than the runner's sequences.
    """
    score = Score()
    for done, window in enumerate(windows):
        for logits, targets in predictions(runner, window, score):
            add(score, log_softmax(logits), targets)
        if progress:
            progress(done + 1, len(windows))
    return score


def predictions(runner: Runner, window: Tokens, score: Score) -> Iterator[tuple[Logits, Tokens]]:
    """Compute a window and yield its rows of logits, with the tokens that came, some rows at a time.

    Time spent in the runner is added to `score`.
    """
    inputs, targets = window[:-1], window[1:]
    if runner.limits.num_scores:
        raise UserError("this model gives scores and predicts no tokens, so it has no perplexity: see llmc score")
    if len(inputs) > runner.limits.max_length:
        raise UserError(
            f"a window of {len(window)} tokens does not fit: this model's sequences have at most "
            f"{runner.limits.max_length}; choose a smaller --window",
            param="window",
        )
    # A claim that names only the first token finds nothing to reuse, so every row's logits are computed.
    runner.claim(0, inputs[:1])
    try:
        for start in range(0, len(inputs), CHUNK_TOKENS):
            tokens = inputs[start : start + CHUNK_TOKENS]
            began = time.perf_counter()
            (logits,) = runner.step([Chunk(0, start, tokens, logits=len(tokens))])
            score.seconds += time.perf_counter() - began
            for row in range(0, len(tokens), ROWS):
                yield logits[row : row + ROWS], targets[start + row : start + min(row + ROWS, len(tokens))]
    finally:
        runner.free(0)


def add(score: Score, log_probabilities: Doubles, targets: Tokens) -> None:
    """Count some predicted tokens."""
    score.tokens += len(targets)
    score.nll -= float(log_probabilities[np.arange(len(targets)), targets].sum())


def log_softmax(logits: Logits) -> Doubles:
    """float32 [rows, vocab] to log-probabilities in float64."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=1, keepdims=True))
    return wide
