"""`llmc quantize CHECKPOINT OUT`."""

from __future__ import annotations

import time
from pathlib import Path

import click


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--algo", default="rtn", show_default=True, help="rtn rounds to the nearest code; none keeps weights.")
@click.option("--bits", type=click.Choice(["4", "8"]), default="4", show_default=True, help="Of a weight.")
@click.option(
    "--group-size",
    type=click.Choice(["16", "32", "64", "128", "256"]),
    default="32",
    show_default=True,
    help="Consecutive weights of a row that share a scale.",
)
@click.option("--asymmetric", is_flag=True, help="Give each group a zero point.")
@click.option(
    "--keep", metavar="GLOB", multiple=True, help="Keep matrices, say embed or 'layers.0.*'. May be repeated."
)
@click.option("--kv-cache", type=click.Choice(["int8"]), help="Also give the engine an int8 KV cache.")
@click.option("--calibration", metavar="FILE", type=click.Path(path_type=Path), help="Text to calibrate on.")
@click.option("--calibration-tokens", type=click.IntRange(min=2), default=8192, show_default=True, help="Read at most.")
@click.option("--overwrite", is_flag=True, help="Replace OUT.")
def command(
    checkpoint: Path,
    out: Path,
    algo: str,
    bits: str,
    group_size: str,
    asymmetric: bool,
    keep: tuple[str, ...],
    kv_cache: str | None,
    calibration: Path | None,
    calibration_tokens: int,
    overwrite: bool,
) -> None:
    """Make a smaller checkpoint OUT of CHECKPOINT. Embedding and head are quantized, too, unless kept."""
    from llmc.commands.progress import shown
    from llmc.commands.report import folder_size, human
    from llmc.config import parse
    from llmc.quant.quantize import NONE, Calibration, quantize
    from llmc.recipe import QuantRecipe

    weights = {"bits": int(bits), "group_size": int(group_size), "symmetric": not asymmetric}
    values = {
        "algorithm": algo,
        "weights": None if algo == NONE else weights,
        "keep": keep,
        "kv_cache": {"kind": kv_cache} if kv_cache else None,
    }
    recipe = parse(QuantRecipe, values, where="quantize")
    text = Calibration(path=calibration, tokens=calibration_tokens) if calibration else None
    began = time.perf_counter()
    with shown() as progress:
        figures = quantize(checkpoint, out, recipe, calibration=text, overwrite=overwrite, progress=progress)

    click.echo(f"{out}: {folder_size(out)}, {time.perf_counter() - began:.1f} s")
    click.echo(
        f"  tensors    {human(figures.bytes_before)} -> {human(figures.bytes_after)}"
        f" ({figures.bytes_after / figures.bytes_before:.0%})"
    )
    if figures.worst:
        bad = figures.errors[figures.worst]
        click.echo(
            f"  matrices   {len(figures.errors)} in {bits} bits, groups of {group_size}; kept {len(figures.kept)}"
        )
        click.echo(f"  |W-W'|/|W| {figures.mean_error:.2%} on average, {bad:.2%} at worst ({figures.worst})")
    if kv_cache:
        click.echo(f"  KV cache   {kv_cache}, a scale for each channel")
    click.echo(f"next: llmc build-engine {out} ENGINE    (or: llmc evaluate {checkpoint} {out} --text FILE)")
