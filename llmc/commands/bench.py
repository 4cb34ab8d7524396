"""`llmc bench`: how fast an engine is, or a server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from llmc.commands import values
from llmc.errors import UserError


@click.command("bench")
@click.argument("engine", type=click.Path(path_type=Path), required=False)
@click.option("--url", help="Measure the server there instead: any with OpenAI's API.")
@click.option("--model", help="The model to ask that server for; by default the first that it lists.")
@click.option("--api-key", envvar="LLMC_API_KEY", help="What that server wants to see; or set LLMC_API_KEY.")
@click.option("--batch", default="1,2,4,8,16", show_default=True, callback=values.numbers, help="Sequences at a time.")
@click.option("--concurrency", default="1,4,16", show_default=True, callback=values.numbers, help="Clients at a time.")
@click.option("--rate", type=click.FloatRange(0, min_open=True), help="Requests a second instead of clients at a time.")
@click.option("--requests", default=32, show_default=True, type=click.IntRange(1), help="At each number of clients.")
@click.option("--prompt-tokens", default="128", show_default=True, callback=values.span, help="A server's also 32-512.")
@click.option("--output-tokens", default="64", show_default=True, callback=values.span, help="Likewise.")
@click.option("--ignore-eos/--no-ignore-eos", default=True, help="Ask for all output tokens (vLLM's and llama.cpp's).")
@click.option("--chunk", default=128, show_default=True, type=click.IntRange(1), help="Prompt tokens in one step.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads that compute; by default all.")
@click.option("--json", "json_file", type=values.OutputFile(), help="Write the figures there.")
@click.option("--plot", type=values.OutputFile(), help="Draw them there, as a PNG.")
def command(engine: Path | None, url: str | None, json_file: Path | None, plot: Path | None, **options: Any) -> None:
    """Measure the engine in the folder ENGINE by itself, or a server (--url) as its clients see it."""
    if (engine is None) == (url is None):
        raise UserError("give either ENGINE or --url")
    from llmc.commands.report import offline_bench, online_bench
    from llmc.need import need
    from llmc.serve.bench import plot as plots

    if plot is not None:
        need("matplotlib")
    rows = _offline(engine, options) if engine is not None else _online(str(url), options)
    (offline_bench if engine is not None else online_bench)(rows)
    if json_file is not None:
        json_file.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if plot is not None:
        (plots.offline if engine is not None else plots.online)(rows, plot)


def _offline(engine: Path, options: dict[str, Any]) -> list[dict[str, Any]]:
    from llmc.serve.bench import offline
    from llmc.serve.runners import open_runner

    (prompt, most), (output, longest) = options["prompt_tokens"], options["output_tokens"]
    if (prompt, output) != (most, longest):
        raise UserError("an engine is measured with one length: ranges are for --url")
    runner = open_runner(engine, threads=options["threads"], max_sequences=max(options["batch"]))
    rates = offline.measure(runner, batches=options["batch"], prompt=prompt, output=output, chunk=options["chunk"])
    runner.close()
    return [rate.row() for rate in rates]


def _online(url: str, options: dict[str, Any]) -> list[dict[str, Any]]:
    from llmc.serve.bench.online import Load, measure

    fields = ("model", "api_key", "prompt_tokens", "output_tokens", "requests", "ignore_eos")
    load = Load(url, **{name: options[name] for name in fields})
    if options["rate"] is not None:
        return [measure(load, rate=options["rate"])]
    return [measure(load, concurrency=clients) for clients in options["concurrency"]]
