"""Times every stage between a model and its answers, and prints a table. `make bench`, or:

    python bench/spine.py MODEL [--work DIR] [--threads N] [--bits 4] [--group-size 32] [--no-http]

MODEL is a Hugging Face folder or a GGUF file. The stages are the commands themselves, as a user runs them; the raw
rates are those of the runner alone, without scheduler, sampler or HTTP.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from llmc.runtime import Chunk, Runner
from llmc.serve.local import serving
from llmc.serve.runners import open_runner

PROMPT = 512
CONTEXT = 128  # tokens before the first timed step of a decode
STEPS = 32
console = Console()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--work", type=Path, default=Path("bench-work"))
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--bits", default="4")
    parser.add_argument("--group-size", default="32")
    parser.add_argument("--max-length", default="4096")
    parser.add_argument("--no-http", action="store_true")
    options = parser.parse_args()

    table = Table(title=f"{options.model.name}, {options.threads or len(os.sched_getaffinity(0))} threads")
    table.add_column("what")
    table.add_column("figure", justify="right")
    engine = stages(options, table)
    raw = rates(engine, options.threads, table)
    if not options.no_http:
        for streams, prompt in ((1, 32), (16, 32)):
            rate = http_rate(engine, options.threads, streams, prompt)
            table.add_row(f"HTTP, {streams} streams", f"{rate:.1f} tokens/s, {rate / raw[streams]:.2f} of raw")
    console.print(table)


def stages(options: argparse.Namespace, table: Table) -> Path:
    """convert, quantize, build-engine; returns the engine."""
    shutil.rmtree(options.work, ignore_errors=True)
    options.work.mkdir(parents=True)
    checkpoint, quantized, engine = (options.work / name for name in ("checkpoint", "quantized", "engine"))
    total = 0.0
    for name, arguments in (
        ("convert", [options.model, checkpoint]),
        (
            "quantize",
            [
                checkpoint,
                quantized,
                "--algo",
                "rtn",
                "--bits",
                options.bits,
                "--group-size",
                options.group_size,
                "--no-evaluate",
            ],
        ),
        ("build-engine", [quantized, engine, "--max-length", options.max_length]),
    ):
        began = time.perf_counter()
        command = [sys.executable, "-m", "llmc.cli", name, *map(str, arguments)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        total += time.perf_counter() - began
        table.add_row(name, f"{time.perf_counter() - began:.1f} s")
    table.add_row("convert + quantize + build-engine", f"{total:.1f} s")
    return engine


def rates(engine: Path, threads: int | None, table: Table) -> dict[int, float]:
    """Rows for opening, prefill and decoding; returns tokens/s of decoding by the number of sequences."""
    began = time.perf_counter()
    runner = open_runner(engine, threads=threads, max_sequences=16)
    table.add_row("open, hashes compared", f"{time.perf_counter() - began:.2f} s")
    rng = np.random.default_rng(0)
    for chunk in (64, 128, 256):
        table.add_row(f"prefill, chunks of {chunk}", f"{prefill_rate(runner, rng, chunk):.1f} tokens/s")
    found = {}
    for count in (1, 2, 4, 8, 16):
        found[count], step = decode_rate(runner, rng, count)
        table.add_row(f"decode, {count} sequences", f"{found[count]:.1f} tokens/s, {1000 * step:.1f} ms a step")
    runner.close()
    return found


def prefill_rate(runner: Runner, rng: np.random.Generator, chunk: int) -> float:
    """Tokens a second of a prompt of 512, the better of two."""
    best = float("inf")
    for _ in range(2):
        tokens = rng.integers(0, runner.limits.vocab_size, PROMPT)
        start = runner.claim(1, tokens)
        began = time.perf_counter()
        for begin in range(start, PROMPT, chunk):
            end = min(begin + chunk, PROMPT)
            runner.step([Chunk(1, begin, tokens[begin:end], int(end == PROMPT))])
        best = min(best, (time.perf_counter() - began) / (PROMPT - start))
        runner.free(1)
    return 1 / best


def decode_rate(runner: Runner, rng: np.random.Generator, count: int) -> tuple[float, float]:
    """(tokens a second of all sequences, seconds a step), after a first round that touches the cache's pages."""
    for index in range(count):
        tokens = rng.integers(0, runner.limits.vocab_size, CONTEXT)
        start = runner.claim(index, tokens)
        runner.step([Chunk(index, start, tokens[start:], 0)])
    took = 0.0
    for round_ in range(2):
        began = time.perf_counter()
        for step in range(STEPS):
            position = CONTEXT + step
            runner.step([Chunk(index, position, np.array([index + step]), 1) for index in range(count)])
        took = time.perf_counter() - began
        if round_ == 0:
            for index in range(count):
                # Back to the prompt: the cache lets a sequence continue from any point that it holds.
                runner.step([Chunk(index, CONTEXT - 1, np.array([0]), 0)])
    for index in range(count):
        runner.free(index)
    return count * STEPS / took, took / STEPS


def http_rate(engine: Path, threads: int | None, streams: int, prompt: int) -> float:
    """Tokens a second that all streaming clients together receive, between the last one's first token and the
    first one's last."""
    options = ["--max-sequences", str(streams), *(["--threads", str(threads)] if threads else [])]
    with serving(engine, *options) as url:
        asyncio.run(_streams(url, streams, prompt, 4))
        return asyncio.run(_streams(url, streams, prompt, 96))


async def _streams(url: str, streams: int, prompt: int, max_tokens: int) -> float:
    from openai import AsyncOpenAI

    arrivals: list[list[float]] = [[] for _ in range(streams)]
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600) as client:
        model = (await client.models.list()).data[0].id

        async def one(index: int) -> None:
            ids = np.random.default_rng(index).integers(1000, 20000, prompt).tolist()
            stream = await client.completions.create(
                model=model,
                prompt=ids,
                max_tokens=max_tokens,
                stream=True,
                temperature=0,
                extra_body={"ignore_eos": True},
            )
            async for _ in stream:
                arrivals[index].append(time.perf_counter())

        await asyncio.gather(*(one(index) for index in range(streams)))
    begin, end = max(times[0] for times in arrivals), min(times[-1] for times in arrivals)
    inside = sum(begin < at <= end for times in arrivals for at in times)
    return inside / max(end - begin, 1e-9)


if __name__ == "__main__":
    main()
