"""`llmc score FOLDER FILE`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click

from llmc.commands import values

SHOWN = 20


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--json", "json_path", type=values.OutputFile(), help="Write all scores, too.")
def command(folder: Path, file: Path, json_path: Path | None) -> None:
    """What a reward model says of the texts in FILE: one JSON object a line.

    A line has "text", "messages", or "chosen" and "rejected" (with or without a "prompt"); of these pairs it is counted
    how often the chosen one has the higher score. FOLDER is an engine, or a checkpoint (slow).
    """
    from rich.console import Console
    from rich.table import Table

    from llmc import manifest as manifests
    from llmc.commands import runners
    from llmc.commands.progress import shown
    from llmc.evaluate import scores
    from llmc.tokenizer import Tokenizer

    rows = scores.read_rows(file)
    kind = manifests.read(folder).kind
    runner = runners.opened(kind, folder)
    try:
        with shown() as progress:
            pad = runners.spec_of(kind, folder).score
            found = list(
                scores.score_rows(
                    runner,
                    Tokenizer.load(folder),
                    rows,
                    pad.pad if pad else None,
                    lambda done, of: progress("scoring", done, of),
                )
            )
    finally:
        runner.close()
    pairs = found[0].rejected is not None
    table = Table(box=None)
    for heading in ("row", *(("chosen", "rejected") if pairs else ("score",))):
        table.add_column(heading, justify="right")
    for number, each in enumerate(found[:SHOWN], 1):
        values = [each.scores, *([each.rejected] if each.rejected is not None else [])]
        table.add_row(str(number), *(" ".join(f"{score:.5f}" for score in value) for value in values))
    Console().print(table)
    if len(found) > SHOWN:
        click.echo(f"and {len(found) - SHOWN} more: --json FILE has all")
    accuracy = scores.accuracy(found)
    if accuracy is not None:
        click.echo(f"chosen over rejected: {accuracy:.1%} of {len(found)}")
    if json_path:
        lines = (json.dumps(dataclasses.asdict(each)) + "\n" for each in found)
        json_path.write_text("".join(lines), encoding="utf-8")
