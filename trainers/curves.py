"""A picture of a run: training and held-out loss over the tokens seen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def draw(history: Sequence[dict[str, Any]], path: Path) -> None:
    """Write a PNG.

    Args:
        history: Entries of log.jsonl: "tokens" with "loss" or "held_out_loss", nats per token.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for key, label, marker in (("loss", "training", ""), ("held_out_loss", "held out", "o")):
        points = [(entry["tokens"], entry[key]) for entry in history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker=marker)
    axes.set_xlabel("tokens")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)
