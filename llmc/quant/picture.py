"""A picture of what quantizing cost: each matrix's error, and what each part alone does to the output."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure


def draw(errors: Mapping[str, float], sensitivity: Mapping[str, float], path: Path) -> None:
    """Write a PNG.

    Args:
        errors: Matrix -> relative error. Matrices of the same name in different layers form a line.
        sensitivity: Part -> KL in nats; may be empty.
    """
    figure = Figure(figsize=(9, 7 if sensitivity else 4.5), layout="constrained")
    axes = figure.add_subplot(2 if sensitivity else 1, 1, 1)
    lines: dict[str, list[tuple[int, float]]] = {}
    for matrix, error in errors.items():
        words = matrix.split(".")
        if words[0] == "layers":
            lines.setdefault(".".join(words[2:]), []).append((int(words[1]), error))
        else:
            axes.axhline(error, linestyle=":", color="gray")
            axes.annotate(matrix, (0, error), fontsize=8)
    for kind, points in lines.items():
        axes.plot(*zip(*points, strict=True), marker=".", label=kind)
    axes.set_xlabel("layer")
    axes.set_ylabel("relative error")
    axes.grid(alpha=0.3)
    if 0 < len(lines) <= 16:
        axes.legend(fontsize=8, ncols=2)
    if sensitivity:
        bars = figure.add_subplot(2, 1, 2)
        bars.bar([part.removeprefix("layers.") for part in sensitivity], list(sensitivity.values()))
        bars.set_xlabel("the only part that is quantized")
        bars.set_ylabel("KL (nats per token)")
    figure.savefig(path, dpi=110)
