"""`llmc quantize CHECKPOINT OUT`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from llmc.commands.values import Assignment, Percent


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--algo",
    default="rtn",
    show_default=True,
    help="rtn rounds to the nearest code; gptq and awq look at a text; none keeps weights.",
)
@click.option("--bits", type=click.Choice(["4", "8"]), default="4", show_default=True, help="Of a weight.")
@click.option(
    "--group-size",
    type=click.Choice(["16", "32", "64", "128", "256"]),
    default="32",
    show_default=True,
    help="Consecutive weights of a row that share a scale.",
)
@click.option("--asymmetric/--symmetric", default=None, help="With a zero point a group. [default: in 4 bits]")
@click.option("--head-bits", type=click.Choice(["4", "8"]), default="8", help="Of the head, at least. [default: 8]")
@click.option("--option", type=Assignment(), multiple=True, help="Of the algorithm, say act_order=false. Repeatable.")
@click.option("--override", metavar="GLOB=BITS", type=Assignment(), multiple=True, help="Say head=8. Repeatable.")
@click.option("--keep", metavar="GLOB", multiple=True, help="Keep matrices, say embed or 'layers.0.*'. Repeatable.")
@click.option("--kv-cache", type=click.Choice(["int8"]), help="Also give the engine an int8 KV cache.")
@click.option("--calibration", metavar="FILE", type=click.Path(path_type=Path), help="Text. [default: Python's own]")
@click.option("--calibration-tokens", type=click.IntRange(min=2), default=8192, show_default=True, help="Read at most.")
@click.option("--text", metavar="FILE", type=click.Path(path_type=Path), help="Held-out text to be judged by.")
@click.option("--text-tokens", type=click.IntRange(min=2), default=2048, show_default=True, help="Read at most.")
@click.option("--max-ppl-increase", metavar="PERCENT", type=Percent(), help="More bits until it is met, else exit 3.")
@click.option("--no-evaluate", is_flag=True, help="Do not measure the result.")
@click.option("--overwrite", is_flag=True, help="Replace OUT.")
def command(checkpoint: Path, out: Path, overwrite: bool, **choices: Any) -> None:
    """Make a smaller checkpoint OUT of CHECKPOINT. Embedding and head are quantized, too, unless kept.

    What it cost is measured on --text (by default on a part of Python's own documentation and library), printed, and
    written into OUT as report.json and report.png.
    """
    from llmc.commands import judge, report
    from llmc.commands.progress import shown
    from llmc.config import parse
    from llmc.quant.defaults import with_head
    from llmc.quant.quantize import NONE, Calibration, quantize
    from llmc.recipe import QuantRecipe

    weights = {"bits": int(choices["bits"]), "group_size": int(choices["group_size"])}
    weights["symmetric"] = weights["bits"] == 8 if choices["asymmetric"] is None else not choices["asymmetric"]
    values = {
        "algorithm": choices["algo"],
        "weights": None if choices["algo"] == NONE else weights,
        "keep": choices["keep"],
        "overrides": {glob: {**weights, "bits": bits} for glob, bits in choices["override"]},
        "kv_cache": {"kind": choices["kv_cache"]} if choices["kv_cache"] else None,
        "options": dict(choices["option"]),
    }
    with shown() as progress:
        figures = quantize(
            checkpoint,
            out,
            with_head(parse(QuantRecipe, values, where="quantize"), checkpoint, int(choices["head_bits"])),
            calibration=Calibration(path=choices["calibration"], tokens=choices["calibration_tokens"]),
            judge=judge.chosen(choices, progress),
            max_increase=choices["max_ppl_increase"],
            overwrite=overwrite,
            progress=progress,
        )
    report.quantization(out, figures)
    click.echo(f"next: llmc build-engine {out} ENGINE    (or: llmc evaluate {checkpoint} {out} --text FILE)")
