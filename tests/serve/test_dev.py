"""`llmc serve --dev`: waitress in one process, the same routes, and an orderly end."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fake
import openai
import pytest
from test_server import HELLO, Server

from llmc.builders import ort
from llmc.prompt import chat_ids
from llmc.tokenizer import Tokenizer

Start = Callable[..., Server]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    servers: list[Server] = []

    def starting(**options: Any) -> Server:
        servers.append(Server(tmp_path, dev=True, **options))
        return servers[-1]

    yield starting
    for server in servers:
        if server.process.poll() is None:
            server.process.kill()
        server.process.wait(10)
        assert server.process.stdout is not None
        server.process.stdout.close()
        server.errors.close()


def test_the_same_answers_streamed_or_not(start: Start, tokenizer: Tokenizer) -> None:
    server = start(runner={"max_length": 256})
    assert server.worker == server.process.pid, "one process"
    asked: Any = {"model": "toy", "messages": HELLO, "temperature": 0, "max_tokens": 20}
    text = tokenizer.decode(fake.greedy(chat_ids(tokenizer, HELLO), 20))
    with server.openai() as client:
        assert client.chat.completions.create(**asked).choices[0].message.content == text
        chunks = client.chat.completions.create(**asked, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(**{**asked, "model": "other"})
    assert [server.get(path)[0] for path in ("/", "/health", "/ready", "/metrics", "/openapi.json")] == [200] * 5


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_slot(start: Start, stream: bool) -> None:
    step = 0.1
    server = start(runner={"max_length": 100_000, "delay": step, "max_sequences": 2})
    sock = server.open({"prompt": "the", "max_tokens": 50_000, "stream": stream, "ignore_eos": True})
    server.wait_for(lambda: server.metric("generation_tokens_total") >= 2)
    before = server.metric("engine_steps_total")
    sock.close()
    server.wait_for(lambda: server.metric("num_requests_running") == 0, 5)
    assert server.metric("engine_steps_total") - before <= 4
    assert server.metric("request_success_total", 'finished_reason="abort"') == 1


def test_a_reader_that_stops_is_given_up(start: Start) -> None:
    server = start(runner={"max_length": 20_000, "max_sequences": 2})
    body = {"prompt": "the", "max_tokens": 19_000, "stream": True, "ignore_eos": True}
    sock = server.open(body, receive=4096)
    server.wait_for(lambda: server.metric("request_success_total", 'finished_reason="abort"') == 1, 60)
    sock.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_orderly_with_a_stream_running(start: Start, number: signal.Signals) -> None:
    server = start(runner={"max_length": 100_000, "delay": 0.02})
    sock = server.open({"prompt": "the", "max_tokens": 50_000, "stream": True, "ignore_eos": True})
    server.wait_for(lambda: server.metric("generation_tokens_total") >= 2)
    began = time.monotonic()
    server.process.send_signal(number)
    assert server.process.wait(10) == 0
    assert time.monotonic() - began < 4
    assert "Traceback" not in server.log()
    sock.close()
    with socket.socket() as again:
        assert again.connect_ex(("127.0.0.1", server.port)) != 0


def test_the_command(tmp_path: Path, tiny_checkpoint: Callable[[str], Path]) -> None:
    ort.build(tiny_checkpoint("llama"), tmp_path / "engine", max_length=64)
    command = [sys.executable, "-m", "llmc.cli", "serve", str(tmp_path / "engine"), "--dev", "--host", "localhost"]
    command += ["--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        url = process.stdout.readline().rpartition(" at ")[2].strip()
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=30) as client:
            answer = client.completions.create(model="engine", prompt="the", max_tokens=3, temperature=0)
            assert answer.usage is not None
            assert answer.usage.completion_tokens >= 1
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        assert process.stderr.read() == ""
