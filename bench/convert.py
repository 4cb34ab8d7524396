"""Times converting a synthetic checkpoint beside copying the same file, and prints a table.

    python bench/convert.py [--work DIR] [--size GB] [--rounds N]

All read the file from the page cache and write one of the same size, so the figures compare per byte read and written.
Ways take turns, and the best of all rounds counts: what else the machine does can only add to a time.

    cp                      the kernel's own copy, without sharing blocks
    read, rename, write     the safetensors package, all tensors in memory: the idea of llama.cpp's converter and most
                            others; no hashes, nothing checked
    convert                 llmc's function: every tensor accounted for, every file hashed
    llmc convert            the command, from the start of Python to its end

GPT-2's linears are stored transposed, so there every matrix is turned on the way.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
from rich.console import Console
from rich.table import Table

from llmc import names, tensors
from llmc.converters import families, hf
from llmc.converters.rules import Tensors, from_canonical
from llmc.spec import Attention, Learned, Mlp, ModelSpec, Norm, Rope
from llmc.tensors import TensorInfo

HIDDEN, HEADS = 2048, 16
LLAMA = ModelSpec(
    family="llama",
    vocab_size=32000,
    hidden_size=HIDDEN,
    num_layers=1,
    max_positions=2048,
    norm=Norm(eps=1e-5),
    position=Rope(),
    attention=Attention(num_heads=HEADS, num_kv_heads=HEADS, head_dim=HIDDEN // HEADS),
    mlp=Mlp(intermediate_size=5632),
)
GPT2 = LLAMA.model_copy(
    update={
        "family": "gpt2",
        "norm": Norm(kind="layer", eps=1e-5),
        "position": Learned(),
        "attention": LLAMA.attention.model_copy(update={"qkv_bias": True, "o_bias": True}),
        "mlp": Mlp(intermediate_size=4 * HIDDEN, activation="gelu_tanh", gated=False, bias=True),
        "tied": True,
    }
)
BF16 = np.dtype(ml_dtypes.bfloat16)
console = Console()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("bench-work"))
    parser.add_argument("--size", type=float, default=1.0, help="GB of the synthetic checkpoint (default 1)")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    logging.getLogger("llmc").setLevel(logging.ERROR)  # there is no tokenizer, and none is missed
    for spec in (LLAMA, GPT2):
        source = options.work / spec.family
        shutil.rmtree(source, ignore_errors=True)
        size = synthesize(spec, int(options.size * 1e9), source)
        best = measure(source, options.work / "out", options.rounds)
        console.print(table(f"{spec.family}, {size / 1e9:.2f} GB of bfloat16", size, best))
        shutil.rmtree(source)


def synthesize(spec: ModelSpec, size: int, folder: Path) -> int:
    """A Hugging Face folder of about `size` bytes, of random numbers; returns the bytes of its tensors."""

    def bytes_of(layers: int) -> int:
        shapes = names.tensors(spec.model_copy(update={"num_layers": layers})).values()
        return BF16.itemsize * sum(int(np.prod(shape)) for shape in shapes)

    per_layer = bytes_of(2) - bytes_of(1)
    spec = spec.model_copy(update={"num_layers": max(1, (size - bytes_of(1)) // per_layer + 1)})
    family = families.by_name(spec.family)
    rng = np.random.default_rng(0)

    def load(name: str) -> tensors.Array:
        shape = names.tensors(spec)[name]
        return rng.integers(0, 1 << 14, shape, np.uint16).view(BF16)  # finite, from 0 to 2

    infos = {name: TensorInfo(BF16, shape) for name, shape in names.tensors(spec).items()}
    theirs = from_canonical(family.rules, spec, Tensors(infos, load))
    folder.mkdir(parents=True)
    values = ((name, theirs.load(name)) for name in theirs.infos)
    tensors.write_sharded(folder, theirs.infos, values, max_bytes=sys.maxsize)
    (folder / hf.CONFIG).write_text(json.dumps(family.write(spec)), encoding="utf-8")
    return sum(info.nbytes for info in theirs.infos.values())


def measure(source: Path, out: Path, rounds: int) -> dict[str, float]:
    """The least seconds that each way took."""
    command = [sys.executable, "-m", "llmc.cli", "--log-level", "error", "convert", str(source), str(out)]
    ways: dict[str, Callable[[], object]] = {
        "cp": lambda: subprocess.run(["cp", "--reflink=never", source / hf.WEIGHTS, out], check=True),
        "read, rename, write": lambda: rename_all(source / hf.WEIGHTS, out),
        "convert": lambda: hf.convert(source, out),
        "llmc convert": lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL),
    }
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for name, way in ways.items():
            (source / hf.WEIGHTS).read_bytes()  # into the page cache
            os.sync()  # what the last way wrote is not this one's work
            began = time.perf_counter()
            way()
            best[name] = min(best[name], time.perf_counter() - began)
            shutil.rmtree(out) if out.is_dir() else out.unlink()
    return best


def rename_all(source: Path, out: Path) -> None:
    """What a converter does that knows nothing but names."""
    from safetensors.torch import load_file, save_file

    save_file({f"model/{name}": values for name, values in load_file(source).items()}, out)


def table(title: str, size: int, best: dict[str, float]) -> Table:
    """One row a way."""
    found = Table(title=title)
    found.add_column("way")
    for heading in ("seconds", "GB/s read + written", "of cp's speed"):
        found.add_column(heading, justify="right")
    for name, seconds in best.items():
        found.add_row(name, f"{seconds:.2f}", f"{2 * size / seconds / 1e9:.2f}", f"{best['cp'] / seconds:.2f}")
    return found


if __name__ == "__main__":
    main()
