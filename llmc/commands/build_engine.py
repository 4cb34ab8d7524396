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
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    help="What it is for: cpu computes in float32, cuda in float16. [default: cuda if this machine has it]",
)
@click.option(
    "--kv-cache",
    type=click.Choice(["float32", "float16", "int8"]),
    help="How keys and values are kept. [default: int8 if the checkpoint has scales for it, else as it is computed]",
)
@click.option(
    "--arithmetic",
    type=click.Choice(["int8", "float32", "float16"]),
    help="Of products with quantized weights. On a CPU int8 is faster, float32 does not depend on what else is in the "
    "batch. [default: int8 on a CPU, float16 on cuda]",
)
@click.option("--lora", is_flag=True, help="LoRA adapters can be served beside it (llmc serve --lora).")
@click.option("--overwrite", is_flag=True, help="Replace OUT.")
def command(
    checkpoint: Path,
    out: Path,
    max_length: int | None,
    device: str | None,
    kv_cache: str | None,
    arithmetic: str | None,
    lora: bool,
    overwrite: bool,
) -> None:
    """Make the engine folder OUT, that can be served, from a checkpoint.

    The engine runs on ONNX Runtime and holds everything a server needs: graph, weights, tokenizer, prompt template.
    """
    from llmc.builders import ort
    from llmc.commands.progress import shown
    from llmc.commands.report import folder_size
    from llmc.serve.runners import ort_devices

    began = time.perf_counter()
    with shown() as progress:
        engine = ort.build(
            checkpoint,
            out,
            max_length=max_length,
            device=device or ort_devices.best(),  # type: ignore[arg-type]
            kv_cache=kv_cache,  # type: ignore[arg-type]
            arithmetic=arithmetic,  # type: ignore[arg-type]
            lora=lora,
            overwrite=overwrite,
            progress=lambda done, total: progress("writing megabytes", done // 1_000_000, total // 1_000_000),
        )
    click.echo(f"{out}: {engine.spec.family} engine, {folder_size(out)}, {time.perf_counter() - began:.1f} s")
    click.echo(f"  device     {engine.device}, computes in {engine.compute}")
    for name, count in engine.weights.items():
        click.echo(f"  matrices   {count} x {name}: {engine.kernels[name]}")
    if engine.spec.score:
        click.echo(f"  head       scores of {engine.spec.score.labels} labels")
    click.echo(f"  KV cache   {engine.kv_cache}, up to {engine.max_length} tokens a sequence")
    other = f"score {out} FILE" if engine.spec.score else f"generate {out} --prompt ..."
    click.echo(f"next: llmc serve {out}    (or: llmc {other})")
