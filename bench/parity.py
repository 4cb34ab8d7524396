"""Prints how far the reference decoder and the fp32 engine are from the independent implementation, for every model and
the worst of every family.

    python bench/parity.py [--json FILE] [NAME ...]

Models, truth and tokens are those of the tests (tests/tiny.py, tests/oracles.py): transformers, and where it has no
class a forward written from the authors' formulas. Each figure is the largest difference of a logit, divided by the
largest logit.

    whole      the prompt at once
    chunked    in chunks of 5, 1, 16 and the rest, with what was computed before in the cache
    decode     the last 32 tokens one by one

Prompts are longer than every window (8) and than the original context (32) of every rope scaling, but for the two
scalings whose frequencies depend on the length of the context, which an engine fixes when it is built.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from llmc import model
from llmc.builders import ort
from llmc.checkpoint import Checkpoint
from llmc.converters import hf
from llmc.runtime import Chunk, Runner
from llmc.serve.runners import open_runner

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import tiny

LENGTH, SHORT, DECODED = 96, 32, 32
FIXED_BY_CONTEXT = ("dynamic", "longrope")
WAYS = ("whole", "chunked", "decode")
COLUMNS = [f"{what} {way}" for what in ("decoder", "engine") for way in WAYS]
Array = np.ndarray[Any, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of tests/tiny.py; all when none is given")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as work:
        for name in options.names or tiny.TINY:
            figures = measure(name, Path(work) / name)
            rows.append({"family": tiny.TINY[name].model_type, "case": name, **figures})
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    console = Console()
    console.print(drawn(f"{len(rows)} models", rows, "case"))
    console.print(drawn("the worst of each family", worst(rows), "family", "models"))


def measure(name: str, work: Path) -> dict[str, float]:
    """The six figures of one model."""
    truth = tiny.TINY[name].build()
    kind = (getattr(truth.config, "rope_parameters", None) or {}).get("rope_type")
    length = SHORT if kind in FIXED_BY_CONTEXT else LENGTH
    tokens = np.array(tiny.tokens(length))
    with torch.inference_mode():
        expected = truth(torch.from_numpy(tokens)[None], use_cache=False).logits[0].numpy()
    hf.convert(tiny.save(tiny.TINY[name], work / "source"), work / "checkpoint")
    ort.build(work / "checkpoint", work / "engine", max_length=length)
    decoder = model.load(Checkpoint(work / "checkpoint"))
    runner = open_runner(work / "engine", threads=1, max_sequences=1)
    found = {}
    for way in WAYS:
        parts = list(cuts(way, length))
        computed = {"decoder": by_decoder(decoder, tokens, parts), "engine": by_engine(runner, tokens, parts)}
        for what, logits in computed.items():
            found[f"{what} {way}"] = float(np.abs(logits - expected).max() / np.abs(expected).max())
    runner.close()
    return found


def cuts(way: str, length: int) -> Iterator[tuple[int, int]]:
    """Where chunks begin and end."""
    edges = {
        "whole": [0, length],
        "chunked": [0, 5, 6, 22, length],
        "decode": [0, *range(max(1, length - DECODED), length + 1)],
    }[way]
    yield from itertools.pairwise(edges)


def by_decoder(decoder: model.Decoder, tokens: Array, parts: list[tuple[int, int]]) -> Array:
    cache, context = model.KVCache(), len(tokens)
    with torch.inference_mode():
        found = [
            decoder(torch.from_numpy(tokens[begin:end])[None], cache=cache, context=context)[0] for begin, end in parts
        ]
    return torch.cat(found).numpy()


def by_engine(runner: Runner, tokens: Array, parts: list[tuple[int, int]]) -> Array:
    runner.claim(0, tokens[:1])
    found = [runner.step([Chunk(0, begin, tokens[begin:end], logits=end - begin)])[0].copy() for begin, end in parts]
    runner.free(0)
    return np.concatenate(found)


def worst(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each family's models the largest figures: the table of docs/families.md."""
    found = []
    for family in sorted({row["family"] for row in rows}):
        models = [row for row in rows if row["family"] == family]
        figures = {column: max(row[column] for row in models) for column in COLUMNS}
        found.append({"family": family, "models": len(models), **figures})
    return found


def drawn(title: str, rows: list[dict[str, Any]], *named: str) -> Table:
    """`named`: the columns before the figures."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in named:
        table.add_column(column, no_wrap=True)
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*(str(row[name]) for name in named), *(f"{row[column]:.1e}" for column in COLUMNS))
    return table


if __name__ == "__main__":
    main()
