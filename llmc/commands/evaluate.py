"""`llmc evaluate FOLDER... --text FILE`."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import click

DEFAULT_WINDOW = 512


@click.command()
@click.argument("folders", metavar="FOLDER...", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--text", metavar="FILE", type=click.Path(path_type=Path), required=True, help="UTF-8 text to read.")
@click.option(
    "--window", type=click.IntRange(min=3), help="Tokens read at a time. [default: 512, or what all models can hold]"
)
@click.option("--max-tokens", type=click.IntRange(min=2), help="Tokens of the text to read. [default: all]")
@click.option("--json", "json_path", metavar="FILE", type=click.Path(path_type=Path), help="Write the figures, too.")
def command(
    folders: tuple[Path, ...], text: Path, window: int | None, max_tokens: int | None, json_path: Path | None
) -> None:
    """Perplexity of engines and checkpoints on a text, side by side.

    The first FOLDER is the baseline. Engines run as they are served, checkpoints on the (slow) reference decoder.
    """
    from llmc import text as texts
    from llmc.commands import report, runners
    from llmc.commands.progress import shown
    from llmc.evaluate.agreement import Subject, compare
    from llmc.tokenizer import Tokenizer

    content = texts.read(text)
    with ExitStack() as stack, shown() as progress:
        opened = []
        for folder in folders:
            opened.append(runners.open_any(folder, window or DEFAULT_WINDOW))
            stack.callback(opened[-1][1].close)
        length = window or min(DEFAULT_WINDOW, *(runner.limits.max_length for _, runner in opened))
        subjects = [
            Subject(folder, kind, runner, texts.windows(content, Tokenizer.load(folder), length, limit=max_tokens))
            for folder, (kind, runner) in zip(folders, opened, strict=True)
        ]
        rows = [row.figures() for row in compare(subjects, lambda done, of: progress("reading", done, of))]
    report.evaluation(rows)
    if json_path:
        json_path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
