"""`llmc quantize CHECKPOINT OUT`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from llmc.commands import formats, recipes
from llmc.commands.values import Assignment, Percent


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@recipes.CONFIG
@click.option(
    "--algo",
    default="rtn",
    show_default=True,
    help="rtn rounds to the nearest code; gptq and awq look at a text; w8a8, smoothquant, fp8 round inputs, too; "
    "nvfp4, mxfp4, mxfp8 are for CUDA; none keeps weights.",
)
@formats.options
@click.option("--option", type=Assignment(), multiple=True, help="Of the algorithm, say act_order=false. Repeatable.")
@click.option("--override", metavar="GLOB=BITS", type=Assignment(), multiple=True, help="Say head=8. Repeatable.")
@click.option("--keep", metavar="GLOB", multiple=True, help="Keep matrices, say embed or 'layers.0.*'. Repeatable.")
@click.option("--kv-cache", type=click.Choice(["int8", "fp8"]), help="Also give the engine an 8-bit KV cache.")
@click.option("--kv-scale", type=click.Choice(["channel", "head", "dynamic"]), help="A scale each. [default: channel]")
@click.option("--kv-observer", type=click.Choice(["max", "average"]), help="Of a window's extremes. [default: max]")
@recipes.CALIBRATION
@click.option("--calibration-tokens", type=click.IntRange(min=2), default=8192, show_default=True, help="Read at most.")
@click.option("--text", metavar="FILE", type=click.Path(path_type=Path), help="Held-out text to be judged by.")
@click.option("--text-tokens", type=click.IntRange(min=2), default=2048, show_default=True, help="Read at most.")
@click.option("--max-ppl-increase", metavar="PERCENT", type=Percent(), help="More bits until it is met, else exit 3.")
@click.option(
    "--target-bits", metavar="BITS", type=click.FloatRange(min=0), help="Of a parameter, on average, say 4.8."
)
@click.option("--no-evaluate", is_flag=True, help="Do not measure the result.")
@click.option("--overwrite", is_flag=True, help="Replace OUT.")
def command(checkpoint: Path, out: Path, overwrite: bool, **choices: Any) -> None:
    """Make a smaller checkpoint OUT of CHECKPOINT. Embedding and head are quantized, too, unless kept.

    What it cost is measured on --text (by default on a part of Python's own documentation and library), printed, and
    written into OUT as report.json and report.png.
    """
    from llmc.commands import judge, report
    from llmc.commands.progress import shown
    from llmc.quant.corpus import Calibration
    from llmc.quant.quantize import quantize

    with shown() as progress:
        figures = quantize(
            checkpoint,
            out,
            recipes.chosen(choices, checkpoint),
            calibration=Calibration(path=choices["calibration"] or None, tokens=choices["calibration_tokens"]),
            judge=judge.chosen(choices, progress),
            probe=judge.probe(choices, progress),
            max_increase=choices["max_ppl_increase"],
            target_bits=choices["target_bits"],
            overwrite=overwrite,
            progress=progress,
        )
    report.quantization(out, figures)
    click.echo(f"next: {report.use(figures.recipe, out)}    (or: llmc evaluate {checkpoint} {out} --text FILE)")
