"""`llmc generate`: continue a text on the terminal."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click

from llmc.errors import UserError


@click.command("generate")
@click.argument("engine", type=click.Path(path_type=Path))
@click.option("--prompt", metavar="TEXT", help="Continue this text; - reads it from standard input.")
@click.option("--chat", metavar="TEXT", help="Answer this message, in the model's chat form; - reads it.")
@click.option("--max-tokens", default=256, show_default=True, type=click.IntRange(1))
@click.option("--temperature", default=0.0, show_default=True, type=float, help="0 takes the likeliest token.")
@click.option("--top-k", default=0, show_default=True, type=int, help="Only the k likeliest; 0 takes all.")
@click.option("--top-p", default=1.0, show_default=True, type=float, help="Only the likeliest that make up p.")
@click.option("--min-p", default=0.0, show_default=True, type=float, help="Only those p times as likely as the first.")
@click.option("--repetition-penalty", default=1.0, show_default=True, type=float)
@click.option("--seed", type=int, help="The same seed gives the same text.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; may be repeated.")
@click.option("--ignore-eos", is_flag=True, help="Go on after the model's end of text.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads that compute; by default all.")
def command(
    engine: Path, prompt: str | None, chat: str | None, max_tokens: int, threads: int | None, **sampling: object
) -> None:
    """Continue a text with the engine in the folder ENGINE, and say how fast it was."""
    if (prompt is None) == (chat is None):
        raise UserError("give either --prompt or --chat")
    text = sys.stdin.read() if "-" in (prompt, chat) else prompt or chat or ""
    from llmc.config import parse
    from llmc.prompt import chat_ids, completion_ids
    from llmc.serve.engine import Engine
    from llmc.serve.request import Request, Sampling
    from llmc.serve.runners import open_runner
    from llmc.tokenizer import Tokenizer

    settings = parse(Sampling, {**sampling, "stop": list(sampling["stop"])}, where="options")  # type: ignore[call-overload]
    runner = open_runner(engine, threads=threads, max_sequences=1)
    tokenizer = Tokenizer.load(engine)
    message = [{"role": "user", "content": text}]
    ids = completion_ids(tokenizer, text) if chat is None else chat_ids(tokenizer, message)
    loop = Engine(runner, tokenizer)
    loop.start()
    try:
        most = min(max_tokens, max(1, loop.budget.longest - len(ids)))
        began = time.monotonic()
        first = 0.0
        handle = loop.submit(Request(tuple(ids), settings, most))
        for event in handle.events():
            first = first or time.monotonic()
            click.echo(event.text, nl=False)
            sys.stdout.flush()
        ended = time.monotonic()
    finally:
        loop.close()
    click.echo()
    rate = (handle.completion_tokens - 1) / (ended - first) if handle.completion_tokens > 1 else 0.0
    click.echo(
        f"{len(ids)} prompt tokens in {first - began:.2f} s ({len(ids) / max(first - began, 1e-9):.0f} tokens/s), "
        f"{handle.completion_tokens} tokens in {ended - first:.2f} s ({rate:.1f} tokens/s)",
        err=True,
    )
