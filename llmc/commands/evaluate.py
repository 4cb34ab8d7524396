"""`llmc evaluate FOLDER... --text FILE`."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument("folders", metavar="FOLDER...", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--text", metavar="FILE", type=click.Path(path_type=Path), required=True, help="UTF-8 text to read.")
@click.option("--window", type=click.IntRange(min=3), default=512, show_default=True, help="Tokens read at a time.")
@click.option("--max-tokens", type=click.IntRange(min=2), help="Tokens of the text to read. [default: all]")
@click.option("--json", "json_path", metavar="FILE", type=click.Path(path_type=Path), help="Write the figures, too.")
def command(folders: tuple[Path, ...], text: Path, window: int, max_tokens: int | None, json_path: Path | None) -> None:
    """Perplexity of engines and checkpoints on a text, side by side.

    The first FOLDER is the baseline. Engines run as they are served, checkpoints on the (slow) reference decoder.
    """
    from llmc import text as texts
    from llmc.commands.progress import shown
    from llmc.evaluate.agreement import Subject, compare
    from llmc.tokenizer import Tokenizer

    content = texts.read(text)
    with ExitStack() as stack, shown() as progress:
        subjects = []
        for folder in folders:
            kind, runner = _open(folder, window)
            stack.callback(runner.close)
            windows = texts.windows(content, Tokenizer.load(folder), window, limit=max_tokens)
            subjects.append(Subject(folder, kind, runner, windows))
        rows = [row.figures() for row in compare(subjects, lambda done, of: progress("reading", done, of))]
    _show(rows)
    if json_path:
        json_path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def _open(folder: Path, window: int) -> tuple[str, Any]:
    """The kind of a folder, and a runner for it."""
    from llmc import manifest as manifests

    kind = manifests.read(folder).kind
    if kind == "engine":
        from llmc.serve.runners import open_runner

        return kind, open_runner(folder, max_sequences=1)
    from llmc.need import need

    need("torch")
    from llmc.evaluate.reference import open_reference

    return kind, open_reference(folder, max_sequences=1, max_length=window)


def _show(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    from llmc.commands.report import human

    table = Table(title=f"{rows[0]['tokens']} predicted tokens; KL and top-1 against the first", box=None)
    table.add_column("folder", overflow="fold")
    for heading in ("kind", "size", "perplexity", "vs first", "KL", "top-1", "tokens/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        versus = ("", "", "")
        if row["kl"] is not None:
            change = row["perplexity"] / rows[0]["perplexity"] - 1
            versus = (f"{change:+.1%}", f"{row['kl']:.4f}", f"{row['top1']:.1%}")
        speed = f"{row['tokens_per_second']:.0f}"
        table.add_row(row["folder"], row["kind"], human(row["bytes"]), f"{row['perplexity']:.3f}", *versus, speed)
    Console().print(table)
