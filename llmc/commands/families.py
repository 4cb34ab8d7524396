"""`llmc families`."""

from __future__ import annotations

import dataclasses
import json

import click


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the table as JSON.")
def command(as_json: bool) -> None:
    """Print the model families that llmc converts, with what each supports.

    All are quantized, built and served alike. The last columns are the formats of `llmc export`: original is under
    the authors' own names, hf for a class of transformers (LlmcForCausalLM is llmc's own, which `import llmc.modeling`
    adds to it), paddle for a class of PaddleNLP, gguf as which llama.cpp has a family, packed those of quantized
    checkpoints: all are gptq, awq, compressed-tensors and modelopt.
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
    for column in ("family", "positions", "norm", "experts", "original", "hf", "paddle", "gguf", "packed"):
        table.add_column(column, overflow="fold")
    for family in found:
        table.add_row(
            family.name,
            " ".join(family.positions),
            family.norm,
            "yes" if family.experts else "",
            " ".join(family.architectures),
            " ".join(family.hf),
            family.paddle or "",
            family.gguf or "",
            "all" if len(family.packed) == of_all else " ".join(family.packed),
        )
    Console().print(table)
