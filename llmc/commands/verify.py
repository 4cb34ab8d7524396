"""`llmc verify A B`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from llmc.commands import values


@click.command()
@click.argument("a")
@click.argument("b")
@click.option("--text", metavar="FILE", type=click.Path(path_type=Path), help="UTF-8 text to read. [default: samples]")
@click.option("--window", type=click.IntRange(min=3), default=128, show_default=True, help="Tokens read at a time.")
@click.option("--max-tokens", type=click.IntRange(min=2), default=2048, show_default=True, help="Tokens of the text.")
@click.option("--tolerance", type=click.FloatRange(min=0), default=1e-4, show_default=True, help="Part of A's scale.")
@click.option("--json", "json_path", type=values.OutputFile(), help="Write the figures, too.")
@click.option("--save", is_flag=True, help="Keep the result beside B's manifest; llmc inspect shows it.")
def command(
    a: str,
    b: str,
    text: Path | None,
    window: int,
    max_tokens: int,
    tolerance: float,
    json_path: Path | None,
    save: bool,
) -> None:
    """Whether A and B compute the same: the exit status is 0 if so, 3 if not.

    Each is a Hugging Face folder, a checkpoint, an engine, the http:// address of a running server, or whatever else
    llmc convert reads: a GGUF file, a PaddleNLP folder, a model as its authors publish it. Both read the same text, by
    default difficult samples and random tokens.
    """
    from llmc import text as texts
    from llmc import verified
    from llmc.commands import sides
    from llmc.commands.progress import shown
    from llmc.commands.verdict import number, show
    from llmc.errors import GateError
    from llmc.evaluate.parity import compare
    from llmc.evaluate.samples import pieces

    content = texts.read(text) if text else None
    if save:
        verified.check_target(Path(b))
    with sides.opened(a, b) as (one, other), shown() as progress:
        given = pieces(one, other, content, window=window, max_tokens=max_tokens)
        found = compare(one, other, given, tolerance=tolerance, progress=lambda *done: progress("reading", *done))
    figures = found.figures()
    show(figures)
    if json_path:
        json_path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    if save:
        verified.save(Path(b), sides.identity(a), figures)
    if not found.is_within:
        raise GateError(f"{b} differs from {a} by {number(figures['relative_difference'])}, more than {tolerance:g}")
