"""`llmc families`."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from collections.abc import Iterable

    from llmc.converters.overview import Overview


@click.command()
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def command(name: str | None, as_json: bool) -> None:
    """Print the model families that llmc converts, with what each supports; or one, by NAME, with its classes.

    All are quantized, built and served alike, and all are exported under their authors' own names (original). The
    columns hf, paddle and gguf are the other formats of `llmc export`: for which model of transformers (Llmc is llmc's
    own, which `import llmc.modeling` adds to it), for which of PaddleNLP, and as which architecture of llama.cpp. Of
    one family also the formats in which its quantized checkpoints are exported.
    """
    from llmc.converters.overview import of, overview

    found = overview() if name is None else [of(name)]
    if as_json:
        families = [dataclasses.asdict(family) for family in found]
        click.echo(json.dumps(families if name is None else families[0], indent=1))
    elif name is None:
        _print_table(found)
    else:
        _print_one(found[0])


def _print_table(found: list[Overview]) -> None:
    """In 80 columns: of a class only what tells it from others."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{len(found)} model families", title_justify="left", box=None, pad_edge=False)
    for column in ("family", "positions", "norm", "experts", "hf", "paddle", "gguf"):
        table.add_column(column, no_wrap=True)
    for family in found:
        hf, paddle = _short(family.hf), _short([family.paddle] if family.paddle else [])
        table.add_row(*_kinds(family), hf, paddle, family.gguf or "-")
    Console().print(table)
    click.echo("The names of their classes: llmc families NAME")


def _print_one(family: Overview) -> None:
    names = ("family", "positions", "norm", "experts", "original", "hf", "paddle", "gguf", "packed")
    lists = [", ".join(cell) or "-" for cell in (family.architectures, family.hf, family.packed)]
    formats = (*lists[:2], family.paddle or "-", family.gguf or "-", lists[2])
    for name, cell in zip(names, (*_kinds(family), *formats), strict=True):
        click.echo(f"{name:<9}  {cell}")


def _kinds(family: Overview) -> tuple[str, ...]:
    return family.name, ", ".join(family.positions), family.norm, "yes" if family.experts else "-"


def _short(classes: Iterable[str]) -> str:
    return ", ".join(re.sub("(For[A-Z]|LMHead).*", "", name) for name in classes) or "-"
