"""How `llmc verify` shows what it found. Not a command."""

from __future__ import annotations

from typing import Any


def show(figures: dict[str, Any]) -> None:
    """Print a comparison's figures (see `llmc.evaluate.parity.Parity.figures`) as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for side in "ab":
        table.add_row(side.upper(), f"{figures[side]['kind']} {figures[side]['name']}")
    of, scale = figures["compared"], number(figures["scale"])
    table.add_row("compared", f"{of} of {figures['tokens']:,} tokens")
    relative, largest = number(figures["relative_difference"]), number(figures["max_difference"])
    table.add_row("largest difference", f"{largest}, {relative} of the largest of A's ({scale})")
    table.add_row("mean difference", number(figures["mean_difference"]))
    if of != "logits":
        table.add_row("of the likeliest", f"{number(figures['top_max_difference'])} at most; a server says no others")
    table.add_row("KL(A || B)", "a server does not say enough" if of != "logits" else f"{number(figures['kl'])} nats")
    table.add_row("top-1", f"{figures['top1']:.2%} the same")
    table.add_row("layers", _layers(figures["layers"], figures["first_layer"]))
    table.add_row("result", f"{'within' if figures['within'] else 'BEYOND'} the tolerance of {figures['tolerance']:g}")
    Console().print(table)


def _layers(layers: dict[str, float | None] | None, first: str | None) -> str:
    if layers is None:
        return "not compared: a server does not say them"
    if first is not None:
        return f"the first beyond the tolerance: {first}, by {number(layers[first])} of its length"
    worst = max(layers, key=lambda name: layers[name] or 0.0)
    return f"all within the tolerance; the largest difference: {worst}, {number(layers[worst])} of its length"


def number(value: float | None) -> str:
    """A figure for people; None is what was no finite number."""
    return "no number" if value is None else f"{value:.2g}"
