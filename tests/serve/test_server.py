"""The whole server, gunicorn and sockets and signals, around the toy model in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fake
import openai
import pytest

from llmc.prompt import chat_ids
from llmc.tokenizer import Tokenizer

HELLO: Any = [{"role": "user", "content": "hello"}]


class Server:
    """A running server; `stop` ends it."""

    def __init__(self, folder: Path, **options: Any) -> None:
        script = str(Path(__file__).parent / "fake_server.py")
        self.errors = (folder / "stderr.txt").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, script, str(folder), json.dumps(options)],
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            return
        said = json.loads(line)
        self.url, self.worker = said["url"], said["pid"]
        self.port = int(self.url.rpartition(":")[2])

    def openai(self, **options: Any) -> openai.OpenAI:
        options = {"max_retries": 0, "api_key": "none", "timeout": 30, **options}
        return openai.OpenAI(base_url=f"{self.url}/v1", **options)

    def get(self, path: str, timeout: float = 5) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(self.url + path, timeout=timeout) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def metric(self, name: str, label: str = "") -> float:
        for line in self.get("/metrics")[1].splitlines():
            if line.startswith(f"llmc:{name}{{") and label in line:
                return float(line.rpartition(" ")[2])
        return 0.0

    def open(self, body: dict[str, Any], path: str = "/v1/completions", *, receive: int | None = None) -> socket.socket:
        """Send a request over a bare socket."""
        sock = socket.socket()
        if receive is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
        sock.settimeout(20)
        sock.connect(("127.0.0.1", self.port))
        data = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        sock.sendall(head.encode() + data)
        return sock

    def wait_for(self, condition: Callable[[], bool], seconds: float = 10) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it did not happen in time"
            time.sleep(0.01)

    def stop(self, wait: float = 20) -> int:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)
        return self.end(wait)

    def end(self, wait: float = 20) -> int:
        try:
            return self.process.wait(wait)
        finally:
            self.process.kill()
            self.process.wait()
            assert self.process.stdout is not None
            self.process.stdout.close()

    def log(self) -> str:
        self.errors.seek(0)
        return self.errors.read()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def starting(**options: Any) -> Server:
        folder = tmp_path / str(len(servers))
        folder.mkdir()
        servers.append(Server(folder, **options))
        return servers[-1]

    yield starting
    for server in servers:
        if server.process.poll() is None:
            server.stop()
        server.errors.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One for all tests that leave it as they found it: 16 sequences, half a millisecond a step."""
    runner = {"max_sequences": 16, "max_length": 512, "delay": 0.0005, "eos": 2}
    running = Server(tmp_path_factory.mktemp("server"), runner=runner, engine={"max_step_tokens": 32})
    yield running
    assert running.stop() == 0
    assert "Traceback" not in running.log()
    running.errors.close()


def answer(tokenizer: Tokenizer, ids: list[int], count: int) -> tuple[str, str]:
    tokens = fake.greedy(ids, count, eos=2)
    return tokenizer.decode(tokens), "stop" if tokens[-1] == 2 else "length"


# The openai package as a client.


def test_openai_chat(server: Server, tokenizer: Tokenizer) -> None:
    with server.openai() as client:
        assert [model.id for model in client.models.list()] == ["toy"]
        assert client.models.retrieve("toy").id == "toy"
        asked: Any = {"model": "toy", "messages": HELLO, "temperature": 0, "max_tokens": 20}
        whole = client.chat.completions.create(**asked, n=2, logprobs=True, top_logprobs=1, seed=3)
        text, reason = answer(tokenizer, chat_ids(tokenizer, HELLO), 20)
        assert [choice.message.content for choice in whole.choices] == [text] * 2
        assert {choice.finish_reason for choice in whole.choices} == {reason}
        content = whole.choices[0].logprobs
        assert content is not None
        assert content.content
        assert content.content[0].top_logprobs[0].token == content.content[0].token
        stream = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
        chunks = list(stream)
        assert chunks[-1].usage is not None
        assert whole.usage is not None
        assert chunks[-1].usage.completion_tokens * 2 == whole.usage.completion_tokens
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
        stopped = client.chat.completions.create(**asked, stop=[text[4:6]])
        assert stopped.choices[0].message.content == text[: text.index(text[4:6])]
        assert stopped.choices[0].finish_reason == "stop"


def test_openai_completions(server: Server, tokenizer: Tokenizer) -> None:
    with server.openai() as client:
        asked: Any = {"model": "toy", "prompt": ["the quick", "fox"], "temperature": 0, "max_tokens": 9}
        whole = client.completions.create(**asked, logprobs=2)
        texts = [answer(tokenizer, tokenizer.encode(prompt), 9)[0] for prompt in asked["prompt"]]
        assert [choice.text for choice in whole.choices] == texts
        assert whole.choices[0].logprobs is not None
        streamed = ["", ""]
        for chunk in client.completions.create(**asked, stream=True):
            streamed[chunk.choices[0].index] += chunk.choices[0].text
        assert streamed == texts


def test_openai_exceptions(server: Server) -> None:
    asked: Any = {"model": "toy", "messages": HELLO, "max_tokens": 2}
    with server.openai() as client:
        with pytest.raises(openai.NotFoundError, match="other"):
            client.chat.completions.create(**{**asked, "model": "other"})
        with pytest.raises(openai.BadRequestError, match="temperature") as caught:
            client.chat.completions.create(**asked, temperature=9)
        assert caught.value.param == "temperature"
        assert caught.value.type == "invalid_request_error"
        with pytest.raises(openai.BadRequestError, match="tools"):
            client.chat.completions.create(**asked, tools=[{"type": "function", "function": {"name": "f"}}])
        with pytest.raises(openai.BadRequestError, match="maximum context length") as caught:
            client.chat.completions.create(**{**asked, "max_tokens": 10_000})
        assert caught.value.code == "context_length_exceeded"


def test_openai_with_a_key_and_an_engine_that_fails(start: Callable[..., Server]) -> None:
    server = start(service={"api_keys": ["other", "secret"]}, runner={"max_sequences": 1}, engine={"max_queue": 1})
    asked: Any = {"model": "toy", "messages": HELLO, "max_tokens": 2}
    with server.openai(api_key="wrong") as client, pytest.raises(openai.AuthenticationError):
        client.chat.completions.create(**asked)
    with server.openai(api_key="secret") as client:
        assert client.chat.completions.create(**asked).choices
        with pytest.raises(openai.BadRequestError, match="2 sequences"):
            client.chat.completions.create(**asked, n=3)
    assert server.get("/health")[0] == server.get("/ready")[0] == 200
    assert server.get("/metrics")[0] == 401


def test_sixteen_streams_with_random_arrivals_are_as_alone(server: Server, tokenizer: Tokenizer) -> None:
    words = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "and", "there", "other", "user"]
    results: dict[int, str] = {}
    reused = server.metric("prefix_cache_hits_total")

    def prompt(number: int) -> str:
        return " ".join(random.Random(number).choices(words, k=3 + number % 20))

    def ask(number: int) -> None:
        time.sleep(random.Random(number).random() * 0.2)
        with server.openai() as client:
            asked: Any = {"model": "toy", "prompt": prompt(number), "temperature": 0, "max_tokens": 20 + number * 5}
            results[number] = "".join(
                chunk.choices[0].text for chunk in client.completions.create(**asked, stream=True)
            )

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for number in range(16):
        wanted = answer(tokenizer, tokenizer.encode(prompt(number)), 20 + number * 5)[0]
        assert results[number] == wanted
    assert server.metric("num_requests_running") == server.metric("num_requests_waiting") == 0
    assert server.metric("prefix_cache_hits_total") >= reused


# Clients that go away.


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("how", ["close", "reset"])
def test_a_client_that_goes_away_frees_its_slot_within_two_steps(
    start: Callable[..., Server], stream: bool, how: str
) -> None:
    step = 0.15
    server = start(runner={"max_length": 100_000, "delay": step, "max_sequences": 2})
    sock = server.open({"prompt": "the", "max_tokens": 50_000, "stream": stream, "ignore_eos": True})
    if stream:
        assert b"200 OK" in sock.recv(4096)
    server.wait_for(lambda: server.metric("generation_tokens_total") >= 2)
    before = server.metric("engine_steps_total")
    if how == "reset":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    sock.close()
    server.wait_for(lambda: server.metric("num_requests_running") == 0, 5)
    time.sleep(3 * step)
    # The step under way when it left, and the one that began before its absence was seen.
    assert server.metric("engine_steps_total") - before <= 3
    assert server.metric("request_success_total", 'finished_reason="abort"') == 1


def test_clients_that_leave_the_queue_or_a_long_prompt(start: Callable[..., Server]) -> None:
    server = start(runner={"max_length": 4000, "delay": 0.02, "max_sequences": 1}, engine={"max_step_tokens": 4})
    reading = server.open({"prompt": "fox " * 1500, "max_tokens": 5, "stream": True})
    server.wait_for(lambda: server.metric("num_requests_running") == 1)
    queued = [server.open({"prompt": "the", "max_tokens": 5, "stream": which}) for which in (True, False)]
    server.wait_for(lambda: server.metric("num_requests_waiting") == 2)
    for sock in queued:
        sock.close()
    server.wait_for(lambda: server.metric("num_requests_waiting") == 0, 2)
    assert server.metric("num_requests_running") == 1
    reading.close()
    server.wait_for(lambda: server.metric("num_requests_running") == 0, 2)
    assert server.metric("generation_tokens_total") == 0


def test_many_clients_killed_at_random(server: Server, tokenizer: Tokenizer) -> None:
    choose = random.Random(5)
    asked = {"prompt": "the quick", "max_tokens": 400, "stream": True, "temperature": 0, "ignore_eos": True}
    survivor = server.open({**asked, "stream": False})
    socks = [server.open({**asked, "prompt": f"fox {number}"}) for number in range(40)]
    choose.shuffle(socks)
    for sock in socks:
        time.sleep(choose.random() * 0.01)
        sock.close()
    server.wait_for(lambda: server.metric("num_requests_running") + server.metric("num_requests_waiting") <= 1)
    with survivor, survivor.makefile("rb") as file:
        data = file.read(1)
        while b"usage" not in data:
            data += file.readline()
    body = json.loads(data.split(b"\r\n\r\n", 1)[1])
    wanted = tokenizer.decode(fake.greedy(tokenizer.encode("the quick"), 400, eos=2, ignore_eos=True))
    assert body["usage"]["completion_tokens"] == 400
    assert body["choices"][0]["text"] == wanted
    assert server.metric("kv_cache_usage_perc") == 0


def test_a_reader_that_stops_reading_harms_nobody(start: Callable[..., Server]) -> None:
    server = start(runner={"max_length": 200_000, "max_sequences": 2})
    stalled = server.open({"prompt": "the", "max_tokens": 150_000, "stream": True, "ignore_eos": True}, receive=4096)
    server.wait_for(lambda: server.metric("generation_tokens_total") > 100)
    with server.openai() as client:
        asked: Any = {"model": "toy", "prompt": "fox", "max_tokens": 50}
        assert client.completions.create(**asked).usage is not None
    server.wait_for(lambda: server.metric("request_success_total", 'finished_reason="abort"') == 1, 30)
    server.wait_for(lambda: server.metric("num_requests_running") == 0)
    stalled.close()


# Health under load, and the end.


def test_health_answers_while_every_stream_is_taken(start: Callable[..., Server]) -> None:
    server = start(runner={"max_length": 5000, "delay": 0.02, "max_sequences": 4}, engine={"max_queue": 6})
    asked = {"prompt": "the", "max_tokens": 4000, "stream": True, "ignore_eos": True}
    socks = [server.open(asked) for _ in range(10)]
    server.wait_for(lambda: server.metric("num_requests_waiting") == 6)
    for path in ("/health", "/ready", "/metrics"):
        assert server.get(path, timeout=2)[0] == 200
    with server.openai() as client, pytest.raises(openai.RateLimitError) as caught:
        client.completions.create(model="toy", prompt="x")
    assert int(caught.value.response.headers["Retry-After"]) >= 1
    for sock in socks:
        sock.close()
    server.wait_for(lambda: server.metric("num_requests_running") + server.metric("num_requests_waiting") == 0)


def test_sigterm_finishes_what_runs_and_refuses_the_rest(start: Callable[..., Server], tokenizer: Tokenizer) -> None:
    server = start(runner={"max_length": 500, "delay": 0.02})
    texts: list[str] = []

    def stream() -> None:
        with server.openai() as client:
            asked: Any = {"model": "toy", "prompt": "the", "max_tokens": 80, "temperature": 0}
            texts.append("".join(each.choices[0].text for each in client.completions.create(**asked, stream=True)))

    thread = threading.Thread(target=stream)
    thread.start()
    server.wait_for(lambda: server.metric("generation_tokens_total") >= 5)
    server.process.send_signal(signal.SIGTERM)
    server.wait_for(lambda: server.get("/ready")[0] == 503, 3)
    assert server.get("/health")[0] == 200
    with server.openai() as client, pytest.raises(openai.InternalServerError) as caught:
        client.completions.create(model="toy", prompt="x")
    assert caught.value.status_code == 503
    assert int(caught.value.response.headers["Retry-After"]) >= 1
    thread.join(20)
    assert texts == [tokenizer.decode(fake.greedy(tokenizer.encode("the"), 80))]
    assert server.end() == 0
    with pytest.raises(OSError):  # noqa: PT011
        os.kill(server.worker, 0)
    with pytest.raises(OSError):  # noqa: PT011
        socket.create_connection(("127.0.0.1", server.port), 1)


def test_sigterm_ends_what_takes_too_long(start: Callable[..., Server]) -> None:
    server = start(runner={"max_length": 50_000, "delay": 0.02}, drain_timeout=1)
    sock = server.open({"prompt": "the", "max_tokens": 40_000, "stream": True, "ignore_eos": True})
    server.wait_for(lambda: server.metric("generation_tokens_total") >= 2)
    began = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    with sock, sock.makefile("rb") as file:
        data = file.read()
    assert b"shut down before this request was finished" in data
    assert server.end() == 0
    assert time.monotonic() - began < 8


def test_ctrl_c_ends_at_once(start: Callable[..., Server]) -> None:
    server = start(runner={"max_length": 50_000, "delay": 0.02})
    with server.open({"prompt": "the", "max_tokens": 40_000, "stream": True, "ignore_eos": True}):
        server.wait_for(lambda: server.metric("generation_tokens_total") >= 2)
        began = time.monotonic()
        server.process.send_signal(signal.SIGINT)
        assert server.end() == 0
        assert time.monotonic() - began < 8
    with pytest.raises(OSError):  # noqa: PT011
        os.kill(server.worker, 0)


def test_a_worker_that_dies_is_started_again(start: Callable[..., Server]) -> None:
    server = start()
    os.kill(server.worker, signal.SIGKILL)
    assert server.process.stdout is not None
    said = json.loads(server.process.stdout.readline())
    assert said["pid"] != server.worker
    assert server.get("/health")[0] == 200
    assert server.stop() == 0


def test_an_engine_that_cannot_be_opened(start: Callable[..., Server]) -> None:
    server = start(broken=True)
    assert server.end() != 0
    said = server.log()
    assert said.count("the engine in /nowhere cannot be opened") == 1
    assert "Traceback" not in said


# What is not HTTP, or hardly.

POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
BROKEN = [
    b"hello\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET /" + b"a" * 10_000 + b" HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nBad Header: 1\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nBig: " + b"a" * 10_000 + b"\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: abc\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    POST + b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    POST + b"Content-Type: application/json\r\nContent-Length: 99999999999\r\n\r\n",
    b"GET /%ff%fe HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    b"GET /a\x00b HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
]


def test_broken_http_gets_json_too(server: Server) -> None:
    for data in BROKEN:
        with socket.create_connection(("127.0.0.1", server.port), 10) as sock:
            sock.sendall(data)
            sock.settimeout(10)
            reply = b""
            while piece := sock.recv(65536):
                reply += piece
                if b'"code": ' in reply:
                    break
        head, _, body = reply.partition(b"\r\n\r\n")
        status = int(head.split()[1])
        assert 400 <= status < 500, (data[:60], head)
        assert b"application/json" in head
        assert b"<html" not in reply
        assert json.loads(body)["error"]["message"]
    assert server.get("/health")[0] == 200
    assert len(BROKEN) == 11


def test_a_chunked_body_is_read_and_limited(server: Server) -> None:
    def chunks(size: int) -> Iterator[bytes]:
        yield b'{"max_tokens": 1, "prompt": "'
        for _ in range(size):
            yield b"a" * 65536
        yield b'the"}'

    for size, wanted in ((0, 200), (100, 413)):
        request = urllib.request.Request(server.url + "/v1/completions", data=chunks(size))
        request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=10) as response:
                status = response.status
        except urllib.error.HTTPError as error:
            with error:
                status = error.code
        except urllib.error.URLError:
            # The server answered and closed before all was sent.
            status = 413
        assert status == wanted
