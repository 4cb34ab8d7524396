"""`llmc serve`: an engine behind HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmc import need

if TYPE_CHECKING:
    from llmc.serve.service import Service


@click.command("serve")
@click.argument("engine", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="Where to listen; 0.0.0.0 for all interfaces.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0 takes a free one.")
@click.option("--name", help="The model's name for clients; by default the folder's.")
@click.option("--lora", multiple=True, metavar="NAME=FOLDER", help="Serve a PEFT adapter beside it; repeatable.")
@click.option("--pooling", type=click.Choice(["mean", "last"]), default="last", show_default=True, help="Embeddings.")
@click.option("--api-key", envvar="LLMC_API_KEY", help="Clients must send it; or set LLMC_API_KEY.")
@click.option("--api-key-file", type=click.Path(path_type=Path), help="More keys, one a line.")
@click.option("--allow-origin", multiple=True, metavar="URL", help="Let scripts of these web pages in (CORS).")
@click.option("--strict", is_flag=True, help="Refuse unknown fields; else ignored, with a Warning header.")
@click.option(
    "--metrics-prefix", default="llmc", show_default=True, metavar="NAME", help="Of /metrics; vllm for its dashboards."
)
@click.option("--threads", type=click.IntRange(1), help="CPU threads that compute; by default all.")
@click.option("--max-sequences", type=click.IntRange(1), help="Sequences that run at a time.")
@click.option("--max-step-tokens", type=click.IntRange(1), help="Tokens computed in one step, all sequences together.")
@click.option("--kv-cache-gib", type=click.FloatRange(0, min_open=True), help="By default half of the free memory.")
@click.option("--max-queue", default=128, show_default=True, type=click.IntRange(1), help="Sequences in the queue.")
@click.option("--max-queued-tokens", type=click.IntRange(1), help="Tokens in the queue.")
@click.option("--max-body", default=4, show_default=True, type=click.IntRange(1), help="MiB of a request's body.")
@click.option("--request-timeout", type=click.FloatRange(0, min_open=True), help="Seconds that a request may take.")
@click.option("--drain-timeout", default=60, show_default=True, type=click.IntRange(0), help="Seconds after SIGTERM.")
@click.option("--speculate", metavar="ngram[:K]|draft=ENGINE", help="Draft tokens that are checked in one step.")
@click.option("--deterministic", is_flag=True, help="The same tokens whatever else runs; checked at the start.")
@click.option("--dev", is_flag=True, help="One process of waitress's that ends at once, in place of gunicorn's two.")
def command(engine: Path, host: str, port: int, drain_timeout: int, dev: bool, **options: Any) -> None:
    """Serve the engine in the folder ENGINE: OpenAI's API, /health, /ready, /metrics, and PaddleNLP's /api/chat."""
    for module in ("flask", "waitress" if dev else "gunicorn", "prometheus_client"):
        need.need(module)
    from llmc import manifest
    from llmc.config import parse
    from llmc.serve.address import Address
    from llmc.serve.opening import Settings, api_keys, open_service, welcome

    settings = parse(Settings, options, where="llmc serve")
    manifest.read(engine, "engine")
    api_keys(settings)
    folders = settings.adapters

    def load() -> Service:
        from llmc.engine import describe

        adapters = []
        if folders:
            from llmc.converters import lora

            spec = describe(engine).spec
            adapters = [lora.read(name, folder, spec) for name, folder in folders.items()]
        return open_service(engine, settings, adapters)

    def announce(service: Service, url: str) -> None:
        click.echo(welcome(service, url))

    address = Address(host, port)
    if dev:
        from llmc.serve.dev import serve as serve_here

        return serve_here(address, load, announce)
    from llmc.serve.server import serve

    return serve(address, load, announce, drain_timeout=drain_timeout)
