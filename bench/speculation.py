"""What drafts are worth: output tokens per second with and without, for one stream and for eight.

    python bench/speculation.py ENGINE [--speculate ngram]... [--speculate draft=ENGINE]... [--tokens 128]

Two prompts: one that asks for a piece of code back with a change, and one that asks for a story. Each row is the best
of `--repeat` rounds, that take turns, so that a busy machine is unfair to all alike.
"""

from __future__ import annotations

import time
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from llmc.prompt import chat_ids
from llmc.serve.engine import Engine
from llmc.serve.request import GREEDY, Request
from llmc.serve.runners import open_runner
from llmc.serve.speculate import Drafting, open_speculation
from llmc.tokenizer import Tokenizer

CODE = """def mean(values):
    total = 0.0
    for value in values:
        total += value
    return total / len(values)


def variance(values):
    center = mean(values)
    total = 0.0
    for value in values:
        total += (value - center) ** 2
    return total / len(values)
"""
PROMPTS = {
    "edit code": f"Rename the variable `total` to `acc` in this file and print the whole file:\n\n```python\n{CODE}```",
    "a story": "Tell me a long story about a lighthouse keeper who finds a strange map.",
}


def measure(loop: Engine, prompt: tuple[int, ...], streams: int, tokens: int) -> tuple[float, list[str]]:
    """Output tokens per second after the prompts were read, and the texts."""
    # The prompt is in the cache by then, so that decoding is what is measured.
    list(loop.submit(Request(prompt, GREEDY, 1)).events())
    began = time.monotonic()
    handles = [loop.submit(Request(prompt, GREEDY, tokens)) for _ in range(streams)]
    texts = ["".join(event.text for event in handle.events()) for handle in handles]
    return sum(handle.completion_tokens for handle in handles) / (time.monotonic() - began), texts


@click.command()
@click.argument("engine", type=click.Path(path_type=Path))
@click.option("--speculate", multiple=True, default=("ngram",), show_default=True)
@click.option("--streams", multiple=True, type=int, default=(1, 8), show_default=True)
@click.option("--tokens", default=128, show_default=True)
@click.option("--repeat", default=3, show_default=True)
def main(engine: Path, speculate: tuple[str, ...], streams: tuple[int, ...], tokens: int, repeat: int) -> None:
    """Run it and print a table."""
    tokenizer = Tokenizer.load(engine)
    loops: dict[str, Engine] = {}
    for how in ("off", *speculate):
        runner = open_runner(engine, max_sequences=8, cache_tokens=4096)
        speculation = (
            None if how == "off" else open_speculation(Drafting.read(how), tokenizer, runner.limits.vocab_size)
        )
        loops[how] = Engine(runner, tokenizer, speculation=speculation)
        loops[how].start()
    table = Table("prompt", "streams", "speculate", "tokens/s", "accepted of drafted", "same texts as off")
    for name, text in PROMPTS.items():
        prompt = tuple(chat_ids(tokenizer, [{"role": "user", "content": text}]))
        for count in streams:
            before = {how: (loop.stats.accepted_tokens, loop.stats.draft_tokens) for how, loop in loops.items()}
            rounds = [{how: measure(loop, prompt, count, tokens) for how, loop in loops.items()} for _ in range(repeat)]
            for how, loop in loops.items():
                rate = max(each[how][0] for each in rounds)
                accepted = loop.stats.accepted_tokens - before[how][0]
                drafted = loop.stats.draft_tokens - before[how][1]
                pairs = [pair for each in rounds for pair in zip(each[how][1], each["off"][1], strict=True)]
                same = sum(a == b for a, b in pairs)
                table.add_row(
                    name, str(count), how, f"{rate:.1f}", f"{accepted} of {drafted}", f"{same} of {len(pairs)}"
                )
    for loop in loops.values():
        loop.close()
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
