"""What 4-bit weights cost on a real model, by algorithm: `python bench/quantization.py CHECKPOINT WORK [NAME...]`.

Each result is made by `llmc quantize` in a process of its own (WORK/NAME, kept for the next time) and read beside the
original on 3,000 tokens of English (pydoc's topics) and 3,000 of Python (textwrap.py ...), in windows of
512; nothing of either is in the calibration text. Prints a table and writes WORK/table.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from llmc import sample_text, text
from llmc.checkpoint import Checkpoint
from llmc.evaluate.agreement import Agreement
from llmc.evaluate.perplexity import ROWS, Score, add, log_softmax
from llmc.layerwise import States, Walker
from llmc.names import FRONT, TAIL, parts
from llmc.runtime import Tokens
from llmc.tokenizer import Tokenizer

TOKENS, WINDOW, CALIBRATION = 3000, 512, 4096

RUNS = {
    f"{algorithm}-g{size}": ["--algo", algorithm, "--group-size", str(size)]
    + ([] if algorithm == "rtn" else ["--calibration-tokens", str(CALIBRATION)])
    for size in (32, 128)
    for algorithm in ("rtn", "gptq", "awq")
}


@torch.inference_mode()
def final_states(checkpoint: Checkpoint, windows: Sequence[Tokens]) -> tuple[Walker, States]:
    """What goes into the head, and a walker that has it loaded."""
    walker = Walker(checkpoint)
    walker.load(FRONT)
    states = walker.enter(windows)
    for part in list(parts(checkpoint.spec))[1:-1]:
        walker.drop()
        walker.advance(walker.load(part), states)
    walker.drop()
    walker.load(TAIL)
    return walker, States(walker.decoder.leave(state) for state in states)


@torch.inference_mode()
def measure(
    original: tuple[Walker, States], other: tuple[Walker, States], windows: Sequence[Tokens]
) -> tuple[Score, Agreement]:
    score, agreement = Score(), Agreement()
    for index, window in enumerate(windows):
        targets = window[1:]
        for start in range(0, len(targets), ROWS):
            rows = slice(start, min(start + ROWS, len(targets)))
            exact, met = (
                log_softmax(walker.decoder.logits(states[index][0, rows]).numpy())
                for walker, states in (original, other)
            )
            add(score, met, targets[rows])
            agreement.add(exact, met)
    return score, agreement


def quantized(source: Path, target: Path, options: list[str]) -> dict[str, float]:
    if not target.exists():
        command = [sys.executable, "-m", "llmc.cli", "quantize", str(source), str(target), "--no-evaluate", *options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    report: dict[str, float] = json.loads((target / "report.json").read_text(encoding="utf-8"))
    return report


def main(source: Path, work: Path, names: Sequence[str]) -> None:
    original = Checkpoint(source)
    tokenizer = Tokenizer.load(source)
    texts = {"English": sample_text.english("held-out"), "Python": sample_text.code("held-out")}
    held_out = {name: text.windows(content, tokenizer, WINDOW, limit=TOKENS) for name, content in texts.items()}
    # One walk for both texts: windows of the second follow those of the first.
    windows = [window for some in held_out.values() for window in some]
    cuts = np.cumsum([0, *map(len, held_out.values())]).tolist()
    exact = final_states(original, windows)
    rows = []
    for name in ["fp32", *names]:
        found = exact if name == "fp32" else None
        report = {"seconds": 0, "peak_bytes": 0, "bytes_after": sum(info.nbytes for info in original.infos.values())}
        if found is None:
            report = quantized(source, work / name, RUNS[name])
            found = final_states(Checkpoint(work / name), windows)
        row = {"name": name, **{key: report[key] for key in ("bytes_after", "seconds", "peak_bytes")}}
        for at, which in enumerate(held_out):
            part = slice(cuts[at], cuts[at + 1])
            pair = [(walker, States(list(states)[part])) for walker, states in (exact, found)]
            score, agreement = measure(pair[0], pair[1], windows[part])
            row[which] = {"perplexity": score.perplexity, "kl": agreement.kl, "top1": agreement.top1}
        rows.append(row)
        (work / "table.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    show(rows, list(held_out))


def show(rows: list[dict[str, object]], which: list[str]) -> None:
    table = Table("", "bytes", "quantizing, s", "peak, GB", *(f"{name}: ppl, KL, top-1" for name in which), box=None)
    for row in rows:
        cells = []
        for name in which:
            here, base = row[name], rows[0][name]
            change = here["perplexity"] / base["perplexity"] - 1
            cells.append(f"{here['perplexity']:.3f} ({change:+.1%}) {here['kl']:.4f} {here['top1']:.1%}")
        table.add_row(
            row["name"],
            f"{row['bytes_after'] / 1e6:.0f} MB",
            f"{row['seconds']:.0f}",
            f"{row['peak_bytes'] / 1e9:.1f}",
            *cells,
        )
    Console(width=160).print(table)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:] or list(RUNS))
