"""A picture of what quantizing cost: each matrix's error, and what each part alone does to the output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


def draw(
    errors: Mapping[str, float],
    sensitivity: Mapping[str, float],
    bits: Mapping[str, Sequence[int | None]],
    path: Path,
) -> None:
    """Write a PNG.

    Args:
        errors: Matrix -> relative error. Matrices of the same name in different layers form a line.
        sensitivity: Part -> KL in nats; may be empty.
        bits: Part -> the widths of its matrices in the end, None for what was kept.
    """
    figure = Figure(figsize=(9, 7 if sensitivity else 4.5), layout="constrained")
    axes = figure.add_subplot(2 if sensitivity else 1, 1, 1)
    lines: dict[str, list[tuple[int, float]]] = {}
    for matrix, error in errors.items():
        words = matrix.split(".")
        if words[0] == "layers":
            lines.setdefault(".".join(words[2:]), []).append((int(words[1]), error))
        else:
            axes.axhline(error, linestyle=":" if matrix == "head" else "--", color="gray", label=matrix)
    for kind, points in lines.items():
        axes.plot(*zip(*points, strict=True), marker=".", label=kind)
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("relative error")
    axes.grid(alpha=0.3)
    if 0 < len(lines) <= 16:
        axes.legend(fontsize=8, ncols=2)
    if sensitivity:
        _bars(figure.add_subplot(2, 1, 2), sensitivity, bits)
    figure.savefig(path, dpi=110)


def _bars(axes: Axes, sensitivity: Mapping[str, float], bits: Mapping[str, Sequence[int | None]]) -> None:
    """A bar for each part, its color saying which bits it got."""
    got = {part: "+".join(str(width or "kept") for width in bits.get(part, [None])) for part in sensitivity}
    for index, kind in enumerate(sorted(set(got.values()))):
        chosen = [part for part in sensitivity if got[part] == kind]
        places = [list(sensitivity).index(part) for part in chosen]
        label = kind if kind == "kept" else f"{kind} bits"
        axes.bar(places, [sensitivity[part] for part in chosen], color=f"C{index}", label=label)
    axes.set_xticks(range(len(sensitivity)), [part.removeprefix("layers.") for part in sensitivity], fontsize=7)
    axes.set_xlabel("the only part that is quantized")
    axes.set_ylabel("KL (nats per token)")
    axes.legend(fontsize=8)
