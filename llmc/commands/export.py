"""`llmc export CHECKPOINT OUT`."""

from __future__ import annotations

import time
from pathlib import Path

import click

# llmc.converters.export has what they are; a test compares.
FORMATS = ["hf", "original", "paddle", "gguf", "gptq", "awq", "compressed-tensors", "modelopt"]
TYPES = ["f32", "f16", "bf16", "q8_0", "q4_0"]


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "form",
    type=click.Choice(FORMATS),
    default="hf",
    show_default=True,
    help="hf: Hugging Face, for transformers; original: as its authors publish it; paddle: PaddleNLP; gguf: llama.cpp. "
    "Of quantized checkpoints: gptq, awq, compressed-tensors, modelopt.",
)
@click.option("--type", "kind", type=click.Choice(TYPES), help="Of the matrices, for gguf; else they stay as they are.")
@click.option("--overwrite", is_flag=True, help="Replace OUT.")
def command(checkpoint: Path, out: Path, form: str, kind: str | None, overwrite: bool) -> None:
    """Write CHECKPOINT as a folder OUT that another project loads, its tensors or packed codes unchanged to the bit.

    docs/quantized-formats.md says what each format of packed weights carries.
    """
    from llmc.commands.progress import shown
    from llmc.commands.report import folder_size
    from llmc.converters import export as formats

    began = time.perf_counter()
    with shown() as progress:
        made = formats.export(form, checkpoint, out, kind=kind, overwrite=overwrite, progress=progress)

    click.echo(f"{out}: {folder_size(out)}, {time.perf_counter() - began:.1f} s")
    click.echo(f"  format  {form} ({formats.FORMATS[form].about}): {', '.join(made.files)}")
    click.echo(f"next: {formats.FORMATS[form].next.format(out=out, checkpoint=checkpoint)}")
