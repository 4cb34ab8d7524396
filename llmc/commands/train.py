"""`llmc train METHOD CONFIG`: train a model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmc.errors import UserError
from llmc.need import need

if TYPE_CHECKING:
    from llmc.trainers.pretrain import Result


@click.group()
def command() -> None:
    """Train a model. Each method reads one TOML or JSON file and writes a run folder."""


@command.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), help="The run folder to write, in place of the file's.")
@click.option("--overwrite", is_flag=True, help="Replace the output, and unfinished work of other settings.")
def pretrain(config: Path, output: Path | None, overwrite: bool) -> None:
    """Train a small LLaMA from scratch on plain text files.

    An interrupt saves the state in OUTPUT.work; the same command goes on from there. The fields of CONFIG are
    described in trainers/config.py, and examples/01_pretrain has one to begin with.
    """
    from llmc.trainers import config as configs

    settings = configs.load(config)
    target = output or (Path(settings.output) if settings.output else None)
    if target is None:
        raise UserError(f'where should the run go? Set output = "FOLDER" in {config}, or pass --output')
    for module in ("torch", "transformers", "accelerate", "matplotlib"):
        need(module)
    from llmc.trainers import pretrain as pretraining
    from llmc.trainers.interrupts import Interrupted

    try:
        result = pretraining.run(settings, target, overwrite=overwrite)
    except Interrupted as stop:
        click.echo(f"stopped after step {stop.step}; the same command goes on from there", err=True)
        sys.exit(128 + stop.signal)
    _show(result)


def _show(result: Result) -> None:
    from rich.console import Console
    from rich.table import Table

    steps: dict[int, dict[str, Any]] = {}
    for entry in result.history:
        steps.setdefault(entry["step"], {}).update(entry)
    table = Table("step", "tokens", "training loss", "held-out loss", "minutes", title=f"{result.folder}")
    for step, entry in steps.items():
        if "held_out_loss" in entry or step == result.steps:
            losses = [f"{entry[key]:.3f}" if key in entry else "" for key in ("loss", "held_out_loss")]
            table.add_row(f"{step:,}", f"{entry['tokens']:,}", *losses, f"{entry['seconds'] / 60:.1f}")
    console = Console(markup=False, highlight=False, soft_wrap=True)
    console.print(table)
    console.print(
        f"{result.parameters / 1e6:.1f} M parameters, {result.steps:,} steps, {result.seconds / 60:.1f} minutes"
    )
    console.print(f"next: llmc convert {result.folder} CHECKPOINT")
