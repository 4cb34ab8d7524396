"""Shows how a training run goes: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llmc.trainers.schedule import Budget

_LINE_SECONDS = 10.0


class ShowProgress(TrainerCallback):
    """Reports each entry that the Trainer logs."""

    def __init__(self, console: Console, budget: Budget) -> None:
        self.console, self.budget = console, budget
        self._last_line = 0.0
        self._held_out = ""
        self._bar = Progress(
            BarColumn(), TextColumn("{task.percentage:>3.0f}% {task.description}"), TimeElapsedColumn(), console=console
        )
        self._task = self._bar.add_task("", total=1.0)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._last_line = time.monotonic()
        if self.console.is_terminal:
            self._bar.start()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        if "held_out_loss" in logs:
            self._held_out = f"  held-out {logs['held_out_loss']:.3f}"
        if "loss" not in logs:
            return
        text = (
            f"step {state.global_step}/{state.max_steps}  loss {logs['loss']:.3f}{self._held_out}"
            f"  {logs['tokens_per_second']:,.0f} tokens/s"
        )
        fraction = self.budget.fraction(state.global_step)
        if self.console.is_terminal:
            self._bar.update(self._task, completed=fraction, description=text)
        elif time.monotonic() - self._last_line >= _LINE_SECONDS:
            self._last_line = time.monotonic()
            self.console.print(f"{fraction:4.0%}  {text}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar off the terminal; also when training failed."""
        self._bar.stop()
