"""`llmc serve`: an engine behind HTTP."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from llmc import need

if TYPE_CHECKING:
    from llmc.serve.service import Service


@click.command("serve")
@click.argument("engine", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="Where to listen; 0.0.0.0 for all interfaces.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0 takes a free one.")
@click.option("--name", help="The model's name for clients; by default the folder's.")
@click.option("--api-key", envvar="LLMC_API_KEY", help="Clients must send it; or set LLMC_API_KEY.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads that compute; by default all.")
@click.option("--max-sequences", type=click.IntRange(1), help="Sequences that run at a time.")
@click.option("--cache-tokens", type=click.IntRange(1), help="Tokens of the KV cache, all sequences together.")
@click.option("--step-tokens", type=click.IntRange(1), help="Tokens computed in one step, all sequences together.")
@click.option("--max-waiting", default=128, show_default=True, type=click.IntRange(1), help="Sequences in the queue.")
@click.option("--max-body", default=4, show_default=True, type=click.IntRange(1), help="MiB of a request's body.")
@click.option("--allow-origin", multiple=True, metavar="URL", help="Let scripts of these web pages in (CORS).")
@click.option("--drain-seconds", default=60, show_default=True, type=click.IntRange(0), help="After SIGTERM.")
def command(
    engine: Path,
    host: str,
    port: int,
    name: str | None,
    api_key: str | None,
    threads: int | None,
    max_sequences: int | None,
    cache_tokens: int | None,
    step_tokens: int | None,
    max_waiting: int,
    max_body: int,
    allow_origin: tuple[str, ...],
    drain_seconds: int,
) -> None:
    """Serve the engine in the folder ENGINE: OpenAI's API, /health, /ready, /metrics, and PaddleNLP's /api/chat."""
    for module in ("flask", "gunicorn", "prometheus_client"):
        need.need(module)
    from llmc import manifest
    from llmc.serve.server import Address, serve

    manifest.read(engine, "engine")

    def load() -> Service:
        from llmc.serve.engine import Engine
        from llmc.serve.runners import open_runner
        from llmc.serve.service import Service
        from llmc.tokenizer import Tokenizer

        tokenizer = Tokenizer.load(engine)
        runner = open_runner(engine, threads=threads, max_sequences=max_sequences, cache_tokens=cache_tokens)
        loop = Engine(runner, tokenizer, step_tokens=step_tokens, max_waiting=max_waiting)
        model = name or engine.resolve().name
        return Service(loop, model, int(time.time()), api_key, allow_origin, max_body << 20)

    def announce(service: Service, url: str) -> None:
        budget = service.engine.budget
        click.echo(f"Serving '{service.model}' at {url}")
        click.echo(
            f"  {budget.max_sequences} sequences at a time of {budget.longest} tokens at most, "
            f"{budget.cache_tokens} tokens in the cache, {budget.max_waiting} sequences in the queue"
        )
        key = " -H 'Authorization: Bearer KEY'" if service.api_key else ""
        chat = service.tokenizer.chat_template is not None
        route = "chat/completions" if chat else "completions"
        body = '{"messages": [{"role": "user", "content": "Hello"}]}' if chat else '{"prompt": "Once upon a time"}'
        click.echo(f"Try:\n  curl {url}/v1/{route}{key} -H 'Content-Type: application/json' \\\n    -d '{body}'")

    serve(Address(host, port), load, announce, drain_seconds=drain_seconds)
