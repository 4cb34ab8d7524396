"""Sixteen streaming clients at `llmc serve`, beside another server of OpenAI's API in the same run:

    python bench/serving.py ENGINE [--threads 2] [--llama-server PROGRAM --gguf FILE] [--rival URL] [--json FILE]

The clients are those of `llmc bench --url`: prompts of 32 to 512 words and answers of 16 to 128 tokens, the same ones
for all servers. Servers run one after the other, twice, and the better round of each counts: what else a machine does
only ever slows it. Then, of ours alone: what a shared beginning of prompts saves, and how soon a request that joins
fifteen streams has its first token.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from llmc.serve.bench.online import WORDS, Load, measure
from llmc.serve.local import serving

CLIENTS = 16
REQUESTS = 64
ROUNDS = 2
PROMPT, OUTPUT = (32, 512), (16, 128)
# A system prompt that many share.
SHARED = 400
console = Console()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--llama-server", type=Path, help="llama.cpp's server, to be started with --gguf")
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--rival", help="the URL of a server that runs already")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    def ours() -> contextlib.AbstractContextManager[str]:
        return serving(options.engine, "--threads", str(options.threads), "--max-sequences", str(CLIENTS))

    servers = {"llmc": ours}
    if options.llama_server is not None:
        name = f"llama-server, {options.gguf.name}"
        servers[name] = lambda: llama_server(options.llama_server, options.gguf, options.threads)
    if options.rival is not None:
        servers[options.rival] = lambda: contextlib.nullcontext(options.rival)

    figures: dict[str, Any] = {name: [] for name in servers}
    for _ in range(ROUNDS):
        for name, start in servers.items():
            with start() as url:
                load = Load(url, prompt_tokens=PROMPT, output_tokens=OUTPUT, requests=REQUESTS)
                figures[name].append(measure(load, concurrency=CLIENTS))
    best = {name: max(rows, key=lambda row: row["output_tokens_per_second"]) for name, rows in figures.items()}
    console.print(table(best, options.threads))
    with ours() as url:
        alone = own(url)
    for what, figure in alone.items():
        console.print(f"{what}: {figure}")
    if options.json is not None:
        options.json.write_text(json.dumps({"servers": figures, "llmc": alone}, indent=1) + "\n", encoding="utf-8")


def table(best: dict[str, dict[str, Any]], threads: int) -> Table:
    """The servers side by side."""
    title = f"{CLIENTS} clients, prompts {PROMPT[0]}-{PROMPT[1]}, answers {OUTPUT[0]}-{OUTPUT[1]}, {threads} threads"
    rows = Table("server", "tokens/s", "first token p50, p95 ms", "between tokens p50, p95 ms", "failed", title=title)
    for name, row in best.items():
        times = [row[each] for each in ("time_to_first_token", "inter_token_latency")]
        waits = [f"{each['p50']:.0f}  {each['p95']:.0f}" for each in times]
        rows.add_row(name, f"{row['output_tokens_per_second']:.1f}", *waits, str(row["failed"]))
    return rows


@contextlib.contextmanager
def llama_server(program: Path, gguf: Path, threads: int) -> Iterator[str]:
    """llama.cpp's server with a place for each client; yields its URL once it is ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = CLIENTS * (PROMPT[1] + OUTPUT[1]) * 2
    command = [program, "-m", gguf, "-np", CLIENTS, "-t", threads, "-tb", threads, "-c", context, "--port", port]
    server = subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while not answers(f"{url}/health"):
            if server.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{program} did not start; try: {' '.join(map(str, command))}")
            time.sleep(0.2)
        yield url
    finally:
        server.terminate()
        server.wait()


def answers(url: str) -> bool:
    """Whether a GET succeeds."""
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def first_token(url: str, prompt: str, output: int = 1) -> float:
    """Milliseconds until the first token of an answer of `output` tokens came."""
    body = {"prompt": prompt, "max_tokens": output, "temperature": 0, "stream": True, "ignore_eos": True}
    data, kind = json.dumps(body).encode(), {"Content-Type": "application/json"}
    began = time.perf_counter()
    with urllib.request.urlopen(urllib.request.Request(f"{url}/v1/completions", data, kind)) as answer:
        answer.readline()
        found = 1000 * (time.perf_counter() - began)
        answer.read()
    return found


def own(url: str) -> dict[str, Any]:
    """A shared beginning, and a request that joins."""
    shared = " ".join((WORDS * SHARED)[:SHARED])
    first = first_token(url, f"{shared} one")
    second = min(first_token(url, f"{shared} {word}") for word in ("two", "three", "four"))
    prompt = " ".join(reversed((WORDS * SHARED)[:128]))
    lone = first_token(url, prompt)

    streams = [
        threading.Thread(target=first_token, args=(url, f"{number} {word}", 200))
        for number, word in enumerate(WORDS[: CLIENTS - 1])
    ]
    for thread in streams:
        thread.start()
    time.sleep(1.5)
    joining = first_token(url, f"a {prompt}")
    for thread in streams:
        thread.join()
    step = measure(Load(url, prompt_tokens=(4, 4), output_tokens=(64, 64), requests=CLIENTS), concurrency=CLIENTS)
    return {
        f"first token of a prompt of {SHARED} words, ms": round(first, 1),
        "of another with the same beginning, ms": round(second, 1),
        "times shorter": round(first / second, 1),
        "first token of 128 words alone, ms": round(lone, 1),
        "of 128 words joining fifteen streams, ms": round(joining, 1),
        "a step of sixteen streams, ms": round(step["inter_token_latency"]["p50"], 1),
    }


if __name__ == "__main__":
    main()
