"""`llmc convert SOURCE OUT`."""

from __future__ import annotations

import time
from pathlib import Path

import click


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--base", type=click.Path(path_type=Path), help="What SOURCE, a PEFT adapter, was trained on.")
@click.option(
    "--dtype",
    type=click.Choice(["keep", "float32", "float16", "bfloat16"]),
    default="keep",
    show_default=True,
    help="Type of all tensors; keep leaves each in its own (and gives float32 for GGUF's quantized ones).",
)
@click.option("--overwrite", is_flag=True, help="Replace OUT.")
def command(source: Path, out: Path, base: Path | None, dtype: str, overwrite: bool) -> None:
    """Make the checkpoint OUT of SOURCE.

    SOURCE is a Hugging Face or PaddleNLP folder, a .gguf file, a PEFT adapter (with --base), a DeepSpeed ZeRO
    checkpoint, or the folder of a training run. Weights that are packed already (gptq, awq, compressed-tensors,
    modelopt) stay so, unchanged.
    """
    from llmc import names
    from llmc.commands.progress import shown
    from llmc.commands.report import folder_size, use
    from llmc.converters.convert import convert
    from llmc.tokenizer import Tokenizer

    began = time.perf_counter()
    with shown() as progress:
        made = convert(source, out, base=base, dtype=dtype, overwrite=overwrite, progress=progress)

    sizes = list(names.tensors(made.spec).values())
    parameters = sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in sizes)
    has_tokenizer = (out / "tokenizer.json").is_file()
    click.echo(f"{out}: {folder_size(out)}, {time.perf_counter() - began:.1f} s")
    click.echo(f"  family      {made.spec.family}, {made.spec.num_layers} layers, {made.spec.max_positions} positions")
    click.echo(f"  parameters  {parameters / 1e6:,.1f} M in {len(sizes)} tensors")
    click.echo(f"  types       {', '.join(sorted({str(info.dtype) for info in made.infos.values()}))}")
    click.echo(f"  tokenizer   {f'{Tokenizer.load(out).vocab_size:,} tokens' if has_tokenizer else 'none'}")
    if made.recipe and made.recipe.weights:
        form = made.recipe.weights
        groups = f"groups of {form.group_size}" if form.group_size else "one scale" if form.per_tensor else "rows"
        kind = f"{form.bits} bits" if form.kind == "int" else form.kind
        inputs = made.recipe.activations
        order = " in act-order" if made.recipe.ordered else ""
        rounded = f", inputs in {inputs.kind}" if inputs else ""
        click.echo(f"  packed      {kind}, {groups}{order}{rounded}: taken over as they are")
        click.echo(f"next: {use(made.recipe, out)}")
    else:
        click.echo(f"next: llmc quantize {out} OUT    (or: llmc build-engine {out} ENGINE)")
