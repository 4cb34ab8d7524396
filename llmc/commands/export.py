"""`llmc export CHECKPOINT OUT`."""

from __future__ import annotations

import time
from pathlib import Path

import click


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--format", "form", type=click.Choice(["hf"]), default="hf", show_default=True, help="hf: Hugging Face.")
@click.option("--overwrite", is_flag=True, help="Replace OUT.")
def command(checkpoint: Path, out: Path, form: str, overwrite: bool) -> None:
    """Write CHECKPOINT as a folder OUT that another project loads, the tensors unchanged to the bit."""
    from llmc.commands.progress import shown
    from llmc.commands.report import folder_size
    from llmc.converters import hf

    began = time.perf_counter()
    with shown() as progress:
        made = hf.export(checkpoint, out, overwrite=overwrite, progress=progress)

    click.echo(f"{out}: {folder_size(out)}, {time.perf_counter() - began:.1f} s")
    click.echo(f"  format  {form}: {', '.join(made.files)}")
    click.echo(f"next: python -c 'import transformers as t; t.AutoModelForCausalLM.from_pretrained(\"{out}\")'")
