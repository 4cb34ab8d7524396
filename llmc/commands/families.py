"""`llmc families`."""

from __future__ import annotations

import dataclasses
import json

import click


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the table as JSON.")
def command(as_json: bool) -> None:
    """Print the model families that llmc converts, with what each supports.

    All are quantized, built and served alike, and exported under their authors' names. GGUF is the architecture as
    which llama.cpp has a family. Packed are the formats in which its quantized checkpoints are exported: all are
    gptq, awq, compressed-tensors and modelopt.
    """
    from rich.console import Console
    from rich.table import Table

    from llmc.converters.overview import overview

    found = overview()
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(family) for family in found], indent=1))
        return
    of_all = max(len(family.packed) for family in found)
    table = Table(title=f"{len(found)} model families", title_justify="left", box=None)
    for column in ("family", "architectures", "positions", "norm", "experts", "GGUF", "packed"):
        table.add_column(column, overflow="fold")
    for family in found:
        table.add_row(
            family.name,
            " ".join(family.architectures),
            " ".join(family.positions),
            family.norm,
            "yes" if family.experts else "",
            family.gguf or "",
            "all" if len(family.packed) == of_all else " ".join(family.packed),
        )
    Console().print(table)
