"""The whole line on a small model, by the commands a user would type: `make demo`, or `python examples/demo.py FOLDER`.

Trains on the sources of Python's standard library, converts, quantizes, builds two engines, compares them on text that
was never trained on, serves one, asks it eight things at a time, and prints what was made.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from llmc.serve.local import serving

console = Console(highlight=False, soft_wrap=True)

TRAINING = """\
output = "run"

[data]
paths = ["{stdlib}"]
suffixes = [".py"]
exclude = ["test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data", "turtledemo"]
undecodable = "skip"
held_out_fraction = 0.01

[tokenizer]
vocab_size = 4096

[model]
hidden_size = 256
num_layers = 4
num_heads = 4
num_kv_heads = 2
intermediate_size = 704
max_positions = 256

[training]
steps = {steps}
max_minutes = {minutes}
batch_size = 4
learning_rate = 3e-3
warmup_steps = 60
evaluate_every = 300
"""

PROMPTS = [
    "def read_file(path):\n    ",
    "class Stack:\n    def __init__(self):\n",
    "import os\nimport sys\n\n",
    "    def test_split(self):\n        ",
    "for name in names:\n    ",
    "    def __repr__(self):\n        return ",
    '"""A module that ',
    "if __name__ == '__main__':\n    ",
]


@dataclass(frozen=True)
class Answer:
    """One streamed completion: its text, tokens, and seconds to the first of them and to the end."""

    text: str
    tokens: int
    first: float
    total: float


def llmc(*arguments: object) -> None:
    """Run one command, shown as it is typed; the demo ends where a command fails."""
    command = ["llmc", *map(str, arguments)]
    console.print(f"\n[bold]$ {' '.join(command)}[/bold]")
    status = subprocess.run(command, check=False).returncode
    if status:
        sys.exit(f"demo: the command above ended with exit status {status}")


def ask(address: str, prompts: list[str], max_tokens: int) -> tuple[list[Answer], float]:
    """Send all prompts at once and stream the answers; returns them and the seconds it took."""
    from openai import OpenAI

    client = OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    model = client.models.list().data[0].id

    def one(prompt: str) -> Answer:
        began = time.monotonic()
        first, text, tokens = 0.0, "", 0
        stream = client.completions.create(
            model=model,
            prompt=prompt,
            max_tokens=max_tokens,
            temperature=0.7,
            seed=1,
            stream=True,
            stream_options={"include_usage": True},
        )
        for event in stream:
            for choice in event.choices:
                first = first or time.monotonic() - began
                text += choice.text
            tokens = event.usage.completion_tokens if event.usage else tokens
        return Answer(text, tokens, first, time.monotonic() - began)

    with ThreadPoolExecutor(len(prompts)) as pool:
        began = time.monotonic()
        answers = list(pool.map(one, prompts))
        return answers, time.monotonic() - began


def size(path: Path) -> str:
    """Megabytes of a folder."""
    return f"{sum(item.stat().st_size for item in path.rglob('*') if item.is_file()) / 1e6:.1f} MB"


def fresh(folder: Path) -> None:
    """Empty the demo's own folder; refuse any other."""
    mark = folder / ".llmc-demo"
    if folder.exists() and any(folder.iterdir()) and not mark.exists():
        sys.exit(f"demo: {folder} is not empty and was not made by the demo; choose another folder")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    mark.touch()


def report(folder: Path, answers: list[Answer], seconds: float) -> None:
    """What was made, in one table."""
    figures = {Path(row["folder"]).name: row for row in json.loads((folder / "evaluation.json").read_text("utf-8"))}
    tokens = sum(answer.tokens for answer in answers)
    first = statistics.median(answer.first for answer in answers)
    table = Table("folder", "size", "perplexity", "tokens/s", "first token", title="What the demo made")
    for name in ("run", "checkpoint", "checkpoint-int4", "engine", "engine-int4"):
        perplexity = f"{figures[name]['perplexity']:.2f}" if name in figures else ""
        speed = (f"{tokens / seconds:.0f}", f"{first * 1000:.0f} ms") if name == "engine-int4" else ("", "")
        table.add_row(str(folder / name), size(folder / name), perplexity, *speed)
    console.print()
    console.print(table)
    console.print(
        f"perplexity on held-out files; served {len(answers)} concurrent streams, {tokens} tokens in {seconds:.2f} s, "
        f"the last had its first token after {max(answer.first for answer in answers) * 1000:.0f} ms."
    )
    console.print("\none of them, the prompt in green:")
    console.print(PROMPTS[0], style="green", end="", markup=False)
    console.print(answers[0].text, markup=False)


def goodbye(folder: Path) -> None:
    """How to go on."""
    console.print(f"""
[bold]Look closer[/bold]
  llmc inspect {folder}/engine-int4
  llmc serve {folder}/engine-int4          then POST to http://127.0.0.1:8000/v1/completions

[bold]The same with your own model[/bold] (a Hugging Face folder or a .gguf file; `llmc families` lists which)
  llmc convert /path/to/model my/checkpoint
  llmc quantize my/checkpoint my/checkpoint-int4 --algo rtn --bits 4 --group-size 32
  llmc build-engine my/checkpoint-int4 my/engine
  llmc serve my/engine

[bold]The same with your own text[/bold]: examples/01_pretrain/README.md
""")


def main(folder: Path, steps: int, minutes: float) -> None:
    """Run the demo in `folder`, which it owns."""
    began = time.monotonic()
    fresh(folder)
    config = folder / "pretrain.toml"
    config.write_text(
        TRAINING.format(stdlib=sysconfig.get_paths()["stdlib"], steps=steps, minutes=minutes), encoding="utf-8"
    )
    console.print(f"[bold]{config}[/bold]")
    console.print(config.read_text(encoding="utf-8"), markup=False)

    llmc("train", "pretrain", config)
    llmc("convert", folder / "run", folder / "checkpoint")
    llmc(
        "quantize", folder / "checkpoint", folder / "checkpoint-int4",
        "--algo", "rtn", "--bits", 4, "--group-size", 32,
    )  # fmt: skip
    llmc("build-engine", folder / "checkpoint", folder / "engine")
    llmc("build-engine", folder / "checkpoint-int4", folder / "engine-int4")
    llmc(
        "evaluate", folder / "engine", folder / "engine-int4",
        "--text", folder / "run" / "held_out.txt", "--json", folder / "evaluation.json",
    )  # fmt: skip
    console.print(f"\n[bold]$ llmc serve {folder}/engine-int4 &[/bold]")
    with serving(folder / "engine-int4") as address:
        ask(address, PROMPTS[:1], 8)  # the first request of a process pays for touching fresh memory
        console.print(f"asking {len(PROMPTS)} things at a time")
        answers, seconds = ask(address, PROMPTS, 128)
    console.print("SIGTERM: the server finished what ran and ended with exit status 0")
    report(folder, answers, seconds)
    goodbye(folder)
    console.print(f"the demo took {(time.monotonic() - began) / 60:.1f} minutes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("demo-output"), help="replaced on every run")
    parser.add_argument("--steps", type=int, default=1500, help="of training")
    parser.add_argument("--minutes", type=float, default=4.5, help="at most, of training")
    main(**vars(parser.parse_args()))
