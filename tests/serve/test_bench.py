"""`llmc bench`: figures that add up, from an engine and from a server."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fake
import numpy as np
import pytest
from werkzeug.serving import make_server

from llmc import cli
from llmc.builders import ort as builder
from llmc.errors import LlmcError, UserError
from llmc.serve.app import create_app
from llmc.serve.bench import offline
from llmc.serve.bench.online import Load, measure
from llmc.serve.engine import Engine
from llmc.serve.service import Service

DELAY = 0.02


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(each) for each in arguments])
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


# By itself


def test_offline_figures_are_those_of_the_steps() -> None:
    runner = fake.FakeRunner(max_sequences=4, max_length=64, delay=DELAY)
    rates = offline.measure(runner, batches=[1, 4], prompt=20, output=5, chunk=8)
    assert [(rate.what, rate.batch, rate.tokens) for rate in rates] == [
        ("prefill", 1, 20),
        ("decode", 1, 5),
        ("decode", 4, 20),
    ]
    for rate, steps in zip(rates, (3, 5, 5), strict=True):
        assert steps * DELAY <= rate.seconds < steps * DELAY * 3
        assert rate.step == pytest.approx(1000 * rate.seconds / steps)
        assert rate.row()["tokens_per_second"] == rate.tokens / rate.seconds
    assert not runner.caches


def test_offline_says_what_does_not_fit() -> None:
    runner = fake.FakeRunner(max_sequences=4, max_length=64)
    for batches, prompt in (([8], 10), ([1], 62)):
        with pytest.raises(UserError, match=r"do not fit|longest"):
            offline.measure(runner, batches=batches, prompt=prompt, output=5, chunk=8)


def test_the_command_on_an_engine(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    builder.build(tiny_checkpoint("llama"), tmp_path / "engine", max_length=64)
    files = ["--json", tmp_path / "out.json", "--plot", tmp_path / "out.png"]
    sizes = ["--batch", "1,3", "--prompt-tokens", 20, "--output-tokens", 4]
    status, out, _ = run(capsys, "bench", tmp_path / "engine", *sizes, *files)
    assert status == 0
    assert "decode" in out
    rows = json.loads((tmp_path / "out.json").read_text())
    assert [(row["what"], row["batch"]) for row in rows] == [("prefill", 1), ("decode", 1), ("decode", 3)]
    assert all(row["tokens_per_second"] > 0 for row in rows)
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


# A server


@pytest.fixture
def serve(tokenizer: Any) -> Iterator[Callable[..., tuple[str, Engine]]]:
    running: list[tuple[Any, Engine]] = []

    def start(runner: fake.FakeRunner, **options: Any) -> tuple[str, Engine]:
        engine = Engine(runner, tokenizer)
        engine.start()
        server = make_server("127.0.0.1", 0, create_app(Service(engine, "toy", 1, **options)), threaded=True)
        threading.Thread(target=server.serve_forever).start()
        running.append((server, engine))
        return f"http://127.0.0.1:{server.server_port}", engine

    yield start
    for server, engine in running:
        server.shutdown()
        server.server_close()
        engine.close()


def test_online_figures_are_what_clients_saw(serve: Callable[..., tuple[str, Engine]]) -> None:
    url, engine = serve(fake.FakeRunner(max_sequences=8, max_length=200, delay=DELAY, eos=2))
    load = Load(url, prompt_tokens=(5, 5), output_tokens=(10, 10), requests=8)
    began = time.perf_counter()
    one, four = measure(load, concurrency=1), measure(load, concurrency=4)
    took = time.perf_counter() - began
    for row in (one, four):
        assert (row["requests"], row["failed"], row["output_tokens"]) == (8, 0, 80)
        assert row["output_tokens_per_second"] == row["output_tokens"] / row["seconds"]
        assert row["time_to_first_token"]["p50"] >= 1000 * DELAY
        assert 1000 * DELAY * 0.8 <= row["inter_token_latency"]["p50"] <= 1000 * DELAY * 4
        assert row["request_latency"]["p50"] >= 10 * 1000 * DELAY
        assert row["request_latency"]["p50"] <= row["request_latency"]["p99"] <= 1000 * row["seconds"]
    assert one["seconds"] + four["seconds"] <= took
    assert four["output_tokens_per_second"] > 1.5 * one["output_tokens_per_second"]
    # A warm-up each, beside what is counted.
    assert engine.stats.finished["length"] == 18
    assert one["prompt_tokens"] == four["prompt_tokens"] > 0


def test_lengths_of_a_range_are_drawn_the_same_way_every_time(serve: Callable[..., tuple[str, Engine]]) -> None:
    url, engine = serve(fake.FakeRunner(max_sequences=8, max_length=200, eos=2))
    load = Load(url, prompt_tokens=(3, 9), output_tokens=(2, 30), requests=20)
    rows = [measure(load, concurrency=clients) for clients in (1, 4)]
    assert len({(row["prompt_tokens"], row["output_tokens"]) for row in rows}) == 1
    assert 20 * 2 < rows[0]["output_tokens"] < 20 * 30
    assert engine.stats.finished["length"] == 42


def test_an_open_loop_waits_for_nobody(serve: Callable[..., tuple[str, Engine]]) -> None:
    url, _ = serve(fake.FakeRunner(max_sequences=8, max_length=200, delay=DELAY))
    row = measure(Load(url + "/v1", prompt_tokens=(3, 3), output_tokens=(20, 20), requests=10), rate=50)
    gaps = 9 / 50
    alone = 20 * DELAY
    assert (row["requests"], row["rate"], row["concurrency"]) == (10, 50, None)
    assert row["seconds"] < 10 * alone * 0.7
    assert row["seconds"] >= min(gaps, alone)


def test_failures_are_counted_and_explained(serve: Callable[..., tuple[str, Engine]]) -> None:
    runner = fake.FakeRunner(max_sequences=1, max_length=200)
    runner.fail_steps = {12, 18}
    url, _ = serve(runner)
    row = measure(Load(url, prompt_tokens=(3, 3), output_tokens=(5, 5), requests=4), concurrency=1)
    assert row["failed"] in (1, 2)
    assert row["requests"] + row["failed"] == 4
    with pytest.raises(LlmcError, match=r"status 400: .*maximum context"):
        measure(Load(url, prompt_tokens=(3, 3), output_tokens=(500, 500), requests=2), concurrency=1)
    url, _ = serve(fake.FakeRunner(), api_keys=("secret",))
    with pytest.raises(UserError, match="does not say which models"):
        measure(Load(url, requests=1), concurrency=1)
    assert measure(Load(url, api_key="secret", prompt_tokens=(3, 3), output_tokens=(2, 2), requests=1), concurrency=1)


def test_the_command_on_a_server(
    serve: Callable[..., tuple[str, Engine]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, _ = serve(fake.FakeRunner(max_sequences=4, max_length=100))
    sizes = ["--prompt-tokens", 4, "--output-tokens", 6, "--requests", 4, "--concurrency", "1,2"]
    files = ["--json", tmp_path / "out.json", "--plot", tmp_path / "out.png"]
    status, out, _ = run(capsys, "bench", "--url", url, *sizes, *files)
    assert status == 0
    assert "2 clients" in out
    assert [row["concurrency"] for row in json.loads((tmp_path / "out.json").read_text())] == [1, 2]
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    for arguments, words in (
        (["bench"], "either ENGINE or --url"),
        (["bench", "x", "--url", url], "either ENGINE or --url"),
        (["bench", "--url", "http://127.0.0.1:9"], "does not say which models"),
        (["bench", "--url", "nonsense"], "not the address"),
        (["bench", "--url", url, "--concurrency", "1,x"], "list of numbers"),
        (["bench", "--url", url, "--prompt-tokens", "9-3"], "nor a range like 32-512"),
        (["bench", "x", "--prompt-tokens", "3-9"], "ranges are for --url"),
    ):
        status, _, err = run(capsys, *arguments)
        assert status == 2
        assert words in err


def test_percentiles_are_in_milliseconds() -> None:
    from llmc.serve.bench.online import _percentiles

    found = _percentiles([0.001 * number for number in range(1, 101)])
    assert found["p50"] == pytest.approx(50.5)
    assert found["mean"] == pytest.approx(50.5)
    assert found["p99"] == pytest.approx(float(np.percentile(range(1, 101), 99)))
    assert _percentiles([]) == {}
