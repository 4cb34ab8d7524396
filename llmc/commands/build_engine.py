"""`llmc build-engine CHECKPOINT OUT`."""

from __future__ import annotations

import time
from pathlib import Path

import click


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--max-length", type=int, help="Tokens of the longest sequence. [default: what the model was made for]")
@click.option(
    "--kv-cache",
    type=click.Choice(["float32", "int8"]),
    help="How keys and values are kept. [default: int8 if the checkpoint has scales for it]",
)
@click.option(
    "--arithmetic",
    type=click.Choice(["int8", "float32"]),
    default="int8",
    show_default=True,
    help="Of products with quantized weights: int8 is faster, float32 does not depend on what else is in the batch.",
)
@click.option("--lora", is_flag=True, help="LoRA adapters can be served beside it (llmc serve --lora).")
@click.option("--overwrite", is_flag=True, help="Replace OUT.")
def command(
    checkpoint: Path,
    out: Path,
    max_length: int | None,
    kv_cache: str | None,
    arithmetic: str,
    lora: bool,
    overwrite: bool,
) -> None:
    """Make the engine folder OUT, that can be served, from a checkpoint.

    The engine runs on ONNX Runtime and holds everything a server needs: graph, weights, tokenizer, prompt template.
    """
    from llmc.builders import ort
    from llmc.commands.progress import shown
    from llmc.commands.report import folder_size

    began = time.perf_counter()
    with shown() as progress:
        engine = ort.build(
            checkpoint,
            out,
            max_length=max_length,
            kv_cache=kv_cache,  # type: ignore[arg-type]
            arithmetic=arithmetic,  # type: ignore[arg-type]
            lora=lora,
            overwrite=overwrite,
            progress=lambda done, total: progress("writing megabytes", done // 1_000_000, total // 1_000_000),
        )
    click.echo(f"{out}: {engine.spec.family} engine, {folder_size(out)}, {time.perf_counter() - began:.1f} s")
    for name, count in engine.weights.items():
        click.echo(f"  matrices   {count} x {name}: {engine.kernels[name]}")
    if engine.spec.score:
        click.echo(f"  head       scores of {engine.spec.score.labels} labels")
    click.echo(f"  KV cache   {engine.kv_cache}, up to {engine.max_length} tokens a sequence")
    other = f"score {out} FILE" if engine.spec.score else f"generate {out} --prompt ..."
    click.echo(f"next: llmc serve {out}    (or: llmc {other})")
