"""What quantizing costs on a real model, by algorithm: `python bench/quantization.py CHECKPOINT WORK [NAME...]`.

Each row of ROWS is made by `llmc quantize` in a process of its own (WORK/NAME) and read beside the original on 10,000
tokens of English (pydoc's topics) and 10,000 of Python (textwrap.py ...), in windows of 512; nothing of either is in
the calibration text. A row NAME-kv8 is WORK/NAME with an int8 KV cache. What was made and measured stays in WORK for
the next time: WORK/table.json has the figures, of which every run prints a table. LLMC_BENCH_TOKENS=2000 is a quick
look (use another WORK for it).
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from llmc import sample_text, text
from llmc.checkpoint import Checkpoint
from llmc.evaluate.agreement import Agreement
from llmc.evaluate.perplexity import Score
from llmc.layerwise import States, Walker
from llmc.names import FRONT, TAIL, parts
from llmc.runtime import Logits, Tokens
from llmc.tokenizer import Tokenizer

TOKENS, WINDOW = int(os.environ.get("LLMC_BENCH_TOKENS", "10240")), 512
AT_A_TIME = 128  # rows of logits: 78 MB each with a vocabulary of 152,000

# Name -> options of `llmc quantize`. A row more is a line more.
_WEIGHTS = {
    "rtn8-g32": ["--algo", "rtn", "--bits", "8", "--group-size", "32"],
    "rtn4-g32": ["--algo", "rtn", "--group-size", "32"],
    "awq4-g32": ["--algo", "awq", "--group-size", "32"],
    "gptq4-g32": ["--algo", "gptq", "--group-size", "32"],
    "gptq4-g64-head4": ["--algo", "gptq", "--group-size", "64", "--head-bits", "4"],
    "rtn4-g128": ["--algo", "rtn", "--group-size", "128"],
    "awq4-g128-lite": ["--algo", "awq", "--group-size", "128", "--option", "variant=lite"],
    "awq4-g128-clip": ["--algo", "awq", "--group-size", "128", "--option", "variant=clip"],
    "awq4-g128": ["--algo", "awq", "--group-size", "128"],
    "gptq4-g128": ["--algo", "gptq", "--group-size", "128"],
    "awq4-mixed": ["--algo", "awq", "--group-size", "128", "--target-bits", "5.5"],
    "w8a8": ["--algo", "w8a8"],
    "w8a8-static": ["--algo", "w8a8", "--activations", "static"],
    "smoothquant": ["--algo", "smoothquant"],
    "smoothquant-shift": ["--algo", "smoothquant", "--shift"],
    "smoothquant-pieces": ["--algo", "smoothquant", "--smooth-pieces", "3"],
    "fp8": ["--algo", "fp8"],
}
KV8 = "kv8"
_KV_CACHE = ["--algo", "none", "--kv-cache", "int8"]

# Name -> what it is made from (None: the original) and how.
ROWS: dict[str, tuple[str | None, list[str]]] = {KV8: (None, _KV_CACHE)}
for _name, _options in _WEIGHTS.items():
    ROWS |= {_name: (None, _options), f"{_name}-{KV8}": (_name, _KV_CACHE)}


def held_out(tokenizer: Tokenizer, tokens: int = TOKENS) -> dict[str, list[Tokens]]:
    """What is read: windows of two texts."""
    texts = {"English": sample_text.english("held-out"), "Python": sample_text.code("held-out")}
    return {name: text.windows(content, tokenizer, WINDOW, limit=tokens) for name, content in texts.items()}


@torch.inference_mode()
def final_states(checkpoint: Checkpoint, windows: Sequence[Tokens], kept: Path) -> tuple[Walker, States]:
    """What goes into the head, and a walker that has it loaded.

    Args:
        kept: Where it lies, or is put.
    """
    walker = Walker(checkpoint)
    if kept.exists():
        states = States(map(torch.from_numpy, np.split(np.load(kept), np.cumsum([len(x) for x in windows])[:-1], 1)))
    else:
        walker.load(FRONT)
        states = walker.enter(windows)
        for part in list(parts(checkpoint.spec))[1:-1]:
            walker.drop()
            walker.advance(walker.load(part), states)
        walker.drop()
        walker.load(TAIL)
        states = States(walker.decoder.leave(state) for state in states)
        np.save(kept, np.concatenate([state.numpy() for state in states], 1))
    walker.drop()
    walker.load(TAIL)
    return walker, states


# (index of a window, some of its rows) -> logits [rows, vocab]
Reader = Callable[[int, slice], Logits]


def reader(walker: Walker, states: States) -> Reader:
    """Logits from what `final_states` gave."""

    @torch.inference_mode()
    def read(index: int, rows: slice) -> Logits:
        found: Logits = walker.decoder.logits(states[index][0, rows]).numpy()
        return found

    return read


@torch.inference_mode()
def measure(original: Reader, others: Sequence[Reader], windows: Sequence[Tokens], at: range) -> list[dict[str, float]]:
    """The figures of one text, the windows `at`, for each of the others.

    As llmc.evaluate's, in float32 and on all cores, with sums in float64: 20,000 rows of 152,000 logits each, of which
    the original's are computed once.
    """
    figures = [(Score(), Agreement()) for _ in others]
    for index in at:
        targets = torch.from_numpy(windows[index][1:])
        for start in range(0, len(targets), AT_A_TIME):
            rows = slice(start, min(start + AT_A_TIME, len(targets)))
            exact = torch.from_numpy(original(index, rows)).log_softmax(1)
            likely, first = exact.exp(), exact.argmax(1)
            for read, (score, agreement) in zip(others, figures, strict=True):
                met = torch.from_numpy(read(index, rows)).log_softmax(1)
                score.tokens += len(met)
                score.nll -= float(met.gather(1, targets[rows, None]).sum(dtype=torch.float64))
                agreement.tokens += len(met)
                agreement.agreed += int((first == met.argmax(1)).sum())
                agreement.divergence += float(met.sub_(exact).mul_(likely).neg_().sum(dtype=torch.float64))
    return [
        {"perplexity": score.perplexity, "kl": agreement.kl, "top1": agreement.top1, "tokens": score.tokens}
        for score, agreement in figures
    ]


def quantized(source: Path, target: Path, options: list[str]) -> dict[str, Any]:
    """What `llmc quantize` reports, and the seconds of all cores that it took, if it was run just now."""
    before = cpu_seconds()
    if not target.exists():
        command = [sys.executable, "-m", "llmc.cli", "quantize", str(source), str(target), "--no-evaluate", *options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    report: dict[str, Any] = json.loads((target / "report.json").read_text(encoding="utf-8"))
    return report | {"cpu_seconds": cpu_seconds() - before}


def cpu_seconds() -> float:
    """Of the processes that this one has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


class Bench:
    """The text, the original on it, and the table so far."""

    def __init__(self, source: Path, work: Path) -> None:
        work.mkdir(exist_ok=True)
        self.work, self.original = work, Checkpoint(source)
        texts = held_out(Tokenizer.load(source))
        # One walk for both texts: windows of the second follow those of the first.
        self.windows = [window for some in texts.values() for window in some]
        cuts = np.cumsum([0, *map(len, texts.values())]).tolist()
        self.texts = {name: range(cuts[at], cuts[at + 1]) for at, name in enumerate(texts)}
        self._table = work / "table.json"
        self.rows: dict[str, Any] = json.loads(self._table.read_text("utf-8")) if self._table.exists() else {}

    def reader(self, name: str, checkpoint: Checkpoint) -> Reader:
        """Of a checkpoint, whose last hidden states are kept."""
        return reader(*final_states(checkpoint, self.windows, self.work / f"{name}.npy"))

    def add(self, made: Mapping[str, tuple[Reader, Mapping[str, Any]]]) -> None:
        """Measure rows, and keep them.

        Args:
            made: Name -> its logits, and the figures of how it was made.
        """
        exact, readers = self.reader("fp32", self.original), [read for read, _ in made.values()]
        found = {which: measure(exact, readers, self.windows, at) for which, at in self.texts.items()}
        for index, (name, (_, how)) in enumerate(made.items()):
            row = {key: how.get(key, 0) for key in ("bytes_after", "seconds", "cpu_seconds", "peak_bytes")}
            self.rows[name] = row | {which: figures[index] for which, figures in found.items()}
        self._table.write_text(json.dumps(self.rows, indent=1) + "\n", encoding="utf-8")


def main(source: Path, work: Path, names: Sequence[str]) -> None:
    bench = Bench(source, work)
    made: dict[str, tuple[Reader, Mapping[str, Any]]] = {}
    if "fp32" not in bench.rows:
        size = sum(info.nbytes for info in bench.original.infos.values())
        made["fp32"] = bench.reader("fp32", bench.original), {"bytes_after": size}
    for name in names:
        if name not in bench.rows:
            made_from, options = ROWS[name]
            report = quantized(work / made_from if made_from else source, work / name, options)
            made[name] = bench.reader(name, Checkpoint(work / name)), report
    if made:
        bench.add(made)
    show(bench.rows, list(bench.texts))


def show(rows: Mapping[str, Any], which: Sequence[str]) -> None:
    """The table; the first row is the baseline."""
    heads = [f"{name}: ppl, KL, top-1" for name in which]
    table = Table("", "size", "seconds", "of cores", "peak", *heads, box=None)
    first = next(iter(rows.values()))
    for name, row in rows.items():
        cells = []
        for each in which:
            here = row[each]
            change = here["perplexity"] / first[each]["perplexity"] - 1
            cells.append(f"{here['perplexity']:.3f} ({change:+.2%}) {here['kl']:.4f} {here['top1']:.1%}")
        took = [f"{row[key]:.0f}" if row[key] else "" for key in ("seconds", "cpu_seconds")]
        peak = f"{row['peak_bytes'] / 1e9:.1f} GB" if row["peak_bytes"] else ""
        table.add_row(name, f"{row['bytes_after'] / 1e6:.0f} MB", *took, peak, *cells)
    Console(width=160).print(table)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:] or list(ROWS))
