"""The learning rate, and the two ways for a run to be over."""

from __future__ import annotations

import pytest

from llmc.trainers.config import Training
from llmc.trainers.schedule import Budget, learning_rate


def rates(training: Training, steps: int) -> list[float]:
    budget = Budget(steps)
    return [learning_rate(training, step, budget.fraction(step)) for step in range(steps + 1)]


def test_warmup_then_cosine() -> None:
    found = rates(Training(warmup_steps=4, final_learning_rate=0.1), 100)
    assert found[0] == pytest.approx(0.25, abs=0.01)
    assert found[:4] == sorted(found[:4])
    assert found[3:] == sorted(found[3:], reverse=True)
    assert found[50] == pytest.approx(0.55)
    assert found[100] == pytest.approx(0.1)


def test_constant_stays() -> None:
    assert rates(Training(warmup_steps=0, schedule="constant"), 10) == [1.0] * 11


def test_time_ends_a_run_with_its_rate_decayed() -> None:
    now = [100.0]
    budget = Budget(1000, max_seconds=60, clock=lambda: now[0])
    budget.start(seconds_before=20)
    assert budget.fraction(0) == pytest.approx(20 / 60)
    now[0] += 40
    assert budget.seconds == 60
    assert budget.fraction(10) == 1.0
    assert learning_rate(Training(final_learning_rate=0.0, warmup_steps=0), 10, budget.fraction(10)) == 0.0


def test_without_a_limit_time_does_not_count() -> None:
    now = [0.0]
    budget = Budget(10, clock=lambda: now[0])
    budget.start()
    now[0] = 1e9
    assert budget.fraction(5) == 0.5
