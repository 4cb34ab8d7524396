"""Ends training at a step's end: when a signal asks for it, or when the time is spent."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llmc.trainers.schedule import Budget


class Interrupted(KeyboardInterrupt):
    """A signal stopped the training after a checkpoint was saved."""

    def __init__(self, signal_number: int, step: int) -> None:
        super().__init__(f"stopped by signal {signal_number} after step {step}")
        self.signal, self.step = signal_number, step


class StopOnSignal(TrainerCallback):
    """Turns SIGINT and SIGTERM into "save and stop after this step"; a second one interrupts at once."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.signal: int | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals; elsewhere than in the main thread, which alone may, do nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def received(number: int, _frame: FrameType | None) -> None:
            self.signal = number
            for each, handler in before.items():
                signal.signal(each, handler)

        for number in before:
            signal.signal(number, received)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self.signal is not None:
            control.should_log = control.should_save = control.should_training_stop = True
        elif self.budget.fraction(state.global_step) >= 1:
            control.should_log = control.should_training_stop = True
        return control
