"""How far a run is, and what its learning rate is there.

Knows steps and seconds. Knows no torch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from llmc.trainers.config import Training


class Budget:
    """Steps and, with a time limit, seconds: the run is over when either is spent.

    Attributes:
        total_steps: All the steps, were there no time limit.
    """

    def __init__(
        self, total_steps: int, max_seconds: float | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.total_steps, self._max_seconds, self._clock = total_steps, max_seconds, clock
        self._started = clock()

    def start(self, seconds_before: float = 0.0) -> None:
        """Begin to count time; a resumed run has spent `seconds_before` already."""
        self._started = self._clock() - seconds_before

    @property
    def seconds(self) -> float:
        """Spent in training, in earlier processes as well."""
        return self._clock() - self._started

    def fraction(self, step: int) -> float:
        """How much of the run is done after `step` steps, 0 to 1."""
        spent = self.seconds / self._max_seconds if self._max_seconds else 0.0
        return min(1.0, max(step / self.total_steps, spent))


def learning_rate(training: Training, step: int, fraction: float) -> float:
    """The factor of `learning_rate` at a step: linear warmup, then the schedule over the rest of the run.

    Args:
        step: Steps done.
        fraction: Of the run, done.
    """
    warmup = (step + 1) / training.warmup_steps if step < training.warmup_steps else 1.0
    if training.schedule == "constant":
        return warmup
    low = training.final_learning_rate
    return warmup * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * fraction)))
