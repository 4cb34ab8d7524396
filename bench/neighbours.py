"""How often a request's text changes with what else runs, with and without --deterministic.

    python bench/neighbours.py ENGINE TEXT [--requests 24] [--tokens 64]

Each request is a piece of TEXT, continued greedily: first alone with an empty cache, then all at once, in a batch of
16, after each has been asked once already, as happens to a server.
"""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from llmc.serve.engine import Engine
from llmc.serve.handle import Handle
from llmc.serve.request import GREEDY, Request
from llmc.serve.runners import open_runner
from llmc.tokenizer import Tokenizer


def text_of(handle: Handle) -> str:
    return "".join(event.text for event in handle.events())


@click.command()
@click.argument("engine", type=click.Path(path_type=Path))
@click.argument("text", type=click.Path(path_type=Path))
@click.option("--requests", default=24, show_default=True)
@click.option("--tokens", default=64, show_default=True)
def main(engine: Path, text: Path, requests: int, tokens: int) -> None:
    """Run it and print a table."""
    tokenizer = Tokenizer.load(engine)
    ids = tokenizer.encode(text.read_text(encoding="utf-8"))
    borders = [sum(24 + 7 * (each % 12) for each in range(number)) for number in range(requests + 1)]
    prompts = [tuple(ids[start:end]) for start, end in pairwise(borders)]
    table = Table("", "texts that differ", "all at once, tokens/s")
    for deterministic in (False, True):
        runner = open_runner(engine, cache_tokens=16384, deterministic=deterministic)
        loop = Engine(runner, tokenizer, deterministic=deterministic)
        loop.start()
        alone = [
            text_of(loop.submit(Request(prompt, GREEDY, tokens, cache_salt=str(number))))
            for number, prompt in enumerate(prompts)
        ]
        for prompt in prompts:
            text_of(loop.submit(Request(prompt, GREEDY, 1)))
        began = time.monotonic()
        handles = [loop.submit(Request(prompt, GREEDY, tokens)) for prompt in prompts]
        together = [text_of(handle) for handle in handles]
        rate = sum(handle.completion_tokens for handle in handles) / (time.monotonic() - began)
        differ = sum(a != b for a, b in zip(alone, together, strict=True))
        table.add_row("--deterministic" if deterministic else "default", f"{differ} of {requests}", f"{rate:.0f}")
        loop.close()
    Console().print(table)


if __name__ == "__main__":
    main()
