"""What the engine counts, for /metrics. Plain numbers: who exports them, and how, is no matter of the engine's.

Written by the engine's thread alone. Readers may see one counter a step ahead of another.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field

SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
TOKENS = (1.0, 4.0, 16.0, 64.0, 256.0, 1024.0, 4096.0, 16384.0, 65536.0)


class Histogram:
    """Counts of values by upper bound; the last count is of those over all bounds."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


@dataclass(frozen=True, slots=True)
class Health:
    """How the engine is.

    Attributes:
        ok: It can be expected to finish what it is given.
        reason: Why not.
        draining: It takes nothing new.
    """

    ok: bool
    reason: str
    draining: bool


@dataclass(slots=True)
class Stats:
    """Since the engine was started. Times are in seconds.

    Attributes:
        steps, failed_steps: Calls of the runner, and how many of them raised.
        prompt_tokens, generation_tokens: Of all requests: computed or reused, and sampled.
        prefix_queries, prefix_hits: Tokens asked for, and found, in the cache when a sequence began.
        finished: Sequences by finish reason.
        refused: Requests by why they were not taken in.
        queue_time: From arrival to the first step.
        step_time: One call of the runner.
        overhead_time: The engine's own work around it.
        first_token_time: From arrival to the first token.
        inter_token_time: From token to token of a sequence.
        request_time: From arrival to the end.
    """

    steps: int = 0
    failed_steps: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    finished: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    queue_time: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    step_time: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    overhead_time: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    first_token_time: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    inter_token_time: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    request_time: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    prompt_length: Histogram = field(default_factory=lambda: Histogram(TOKENS))
    generation_length: Histogram = field(default_factory=lambda: Histogram(TOKENS))
