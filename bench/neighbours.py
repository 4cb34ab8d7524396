"""How often a request's text changes with what else runs, with and without --deterministic.

    python bench/neighbours.py ENGINE TEXT [--requests 16] [--tokens 32]

Each request is a piece of TEXT of 24 to 101 tokens, continued greedily: first alone with an empty cache, then all at
once, 16 in a batch, after each has been asked once already, as happens to a server.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from llmc.commands.progress import shown
from llmc.serve.engine import Engine
from llmc.serve.handle import Handle
from llmc.serve.request import GREEDY, Request
from llmc.serve.runners import open_runner
from llmc.tokenizer import Tokenizer

BATCH = 16
Progress = Callable[[str, int, int], None]


def text_of(handle: Handle) -> str:
    return "".join(event.text for event in handle.events())


def run(loop: Engine, prompts: list[tuple[int, ...]], tokens: int, progress: Progress) -> tuple[int, float]:
    """Texts that differ, and tokens per second of all at once."""
    alone = []
    for number, prompt in enumerate(prompts, 1):
        alone.append(text_of(loop.submit(Request(prompt, GREEDY, tokens, cache_salt=str(number)))))
        progress("alone", number, len(prompts))
    for number, prompt in enumerate(prompts, 1):
        text_of(loop.submit(Request(prompt, GREEDY, 1)))
        progress("asked once", number, len(prompts))
    began = time.monotonic()
    handles = [loop.submit(Request(prompt, GREEDY, tokens)) for prompt in prompts]
    together = []
    for number, handle in enumerate(handles, 1):
        together.append(text_of(handle))
        progress("all at once", number, len(prompts))
    rate = sum(handle.completion_tokens for handle in handles) / (time.monotonic() - began)
    return sum(a != b for a, b in zip(alone, together, strict=True)), rate


@click.command()
@click.argument("engine", type=click.Path(path_type=Path))
@click.argument("text", type=click.Path(path_type=Path))
@click.option("--requests", default=16, show_default=True)
@click.option("--tokens", default=32, show_default=True)
def main(engine: Path, text: Path, requests: int, tokens: int) -> None:
    """Run it and print a table."""
    tokenizer = Tokenizer.load(engine)
    ids = tokenizer.encode(text.read_text(encoding="utf-8"))
    borders = [sum(24 + 7 * (each % 12) for each in range(number)) for number in range(requests + 1)]
    if len(ids) < borders[-1]:
        raise click.UsageError(f"{text} has {len(ids)} tokens: {requests} requests need {borders[-1]}")
    prompts = [tuple(ids[start:end]) for start, end in pairwise(borders)]
    table = Table("", "texts that differ", "all at once, tokens/s")
    for deterministic in (False, True):
        runner = open_runner(engine, max_sequences=BATCH, cache_tokens=16384, deterministic=deterministic)
        loop = Engine(runner, tokenizer, max_queue=requests, deterministic=deterministic)
        loop.start()
        with shown() as progress:
            differ, rate = run(loop, prompts, tokens, progress)
        table.add_row("--deterministic" if deterministic else "default", f"{differ} of {requests}", f"{rate:.0f}")
        loop.close()
    Console().print(table)


if __name__ == "__main__":
    main()
