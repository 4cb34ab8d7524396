"""The fifteen faults that a server must survive, where they are tested, and those that are tested nowhere else.

 1  a client that leaves while it is answered, queued, or read
    test_server.py: a_client_that_goes_away, clients_that_leave
 2  a reader that stops reading     test_server.py: a_reader_that_stops_reading
 3  huge bodies, prompts, nesting   test_http.py: bad_bodies; here: sizes
 4  invalid UTF-8 and JSON, NUL     test_http.py: bad_bodies; here: strange_text
 5  parameters out of every range   test_http.py: bad_fields_are_named
 6  one request's sampling fails    test_engine.py: what_is_wrong_with_one_request
 7  a step fails or hangs           test_engine.py: a_failing_step, a_stuck_step; here: hung
 8  a full cache                    test_engine.py: many_with_random_arrivals; here: tiny_cache
 9  SIGTERM, two, a worker killed   test_server.py: sigterm, a_worker_that_dies; here: second_sigterm
10  a damaged engine                test_ort.py: a_changed_byte_is_refused
11  an engine of another version    test_ort.py: another_schema_is_refused
12  a malicious folder              test_hf.py: a_malicious_pickle; here: external_data
13  names that lead out             here: names
14  endless forms, stop strings     test_forms.py: hostile_forms; here: stop_strings
15  slow texts and templates        test_prompt.py: a_bad_template, a_template_without_end; here: bombs, long_texts
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake
import pytest
from flask.testing import FlaskClient
from test_server import Server, start  # noqa: F401

from llmc import manifest as manifests
from llmc.builders import ort as builder
from llmc.errors import EngineError, LlmcError
from llmc.serve.app import create_app
from llmc.serve.engine import Engine
from llmc.serve.request import Request, Sampling
from llmc.serve.runners import open_runner
from llmc.serve.service import Service
from llmc.tokenizer import Tokenizer

MakeEngine = Callable[..., Engine]
CHAT, TEXT, RESPONSES, PADDLE = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/api/chat"


@pytest.fixture
def client(make_engine: MakeEngine) -> FlaskClient:
    engine = make_engine(fake.FakeRunner(max_sequences=4, max_length=256))
    return create_app(Service(engine, "toy", 1)).test_client()


def error_of(client: FlaskClient, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    response = client.post(path, json=body)
    return response.status_code, response.get_json()["error"]


def test_the_table_names_tests_that_exist() -> None:
    assert __doc__
    assert [int(number) for number in re.findall(r"^ ?(\d+)  ", __doc__, re.MULTILINE)] == list(range(1, 16))
    looked = 0
    for where, names in re.findall(r"(test_\w+\.py|here): ([\w, ]+)", __doc__):
        files = [Path(__file__)] if where == "here" else list(Path(__file__).parents[1].rglob(where))
        text = "".join(path.read_text(encoding="utf-8") for path in files)
        for name in names.split(","):
            assert f"def test_{name.strip()}" in text, (where, name)
            looked += 1
    assert looked >= 25


# 3


def test_sizes(client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot fit is refused before it is tokenized."""
    encoded: list[int] = []
    encode = Tokenizer.encode

    def counting(self: Tokenizer, text: str, **options: Any) -> list[int]:
        encoded.append(len(text))
        return encode(self, text, **options)

    monkeypatch.setattr(Tokenizer, "encode", counting)
    big = "fox " * 500_000
    for path, body in (
        (TEXT, {"prompt": big}),
        (TEXT, {"prompt": ["fox", big]}),
        (CHAT, {"messages": [{"role": "user", "content": big}]}),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": big}]}]}),
        (CHAT, {"messages": [{"role": "user", "content": "hello you"}] * 30_000}),
        (RESPONSES, {"input": big}),
        (PADDLE, {"context": big}),
    ):
        status, error = error_of(client, path, body)
        assert (status, error["code"]) == (400, "context_length_exceeded")
        assert "256 tokens" in error["message"]
    assert not encoded
    assert client.post(TEXT, json={"prompt": "fox", "max_tokens": 1}).status_code == 200
    assert client.post(TEXT, data=b"x" * (5 << 20), content_type="application/json").status_code == 413


# 4


@pytest.mark.parametrize("text", ["\x00", "a\x00b", "\ufeff", "\U0010ffff", "\u202e\u200b", "\r\n\t", "\ufffd"])
def test_strange_text(client: FlaskClient, text: str) -> None:
    for path, body in (
        (TEXT, {"prompt": text, "echo": True, "stop": [text]}),
        (CHAT, {"messages": [{"role": "user", "content": text, "name": text}]}),
        (RESPONSES, {"input": text, "instructions": text, "max_output_tokens": 2}),
    ):
        assert client.post(path, json=body | {"user": text}).status_code == 200
    found = client.post("/tokenize", json={"prompt": text}).get_json()["tokens"]
    assert client.post("/detokenize", json={"tokens": found}).get_json()["prompt"] == text


def test_of_a_key_that_comes_twice_one_counts(client: FlaskClient) -> None:
    data = b'{"prompt": "a", "max_tokens": 1, "max_tokens": 3, "temperature": 0}'
    response = client.post(TEXT, data=data, content_type="application/json")
    assert response.get_json()["usage"]["completion_tokens"] == 3


# 7


def test_hung(make_engine: MakeEngine) -> None:
    """A step that does not come back: /health says so, /metrics answers, nothing waits for it but its request."""
    runner = fake.FakeRunner()
    engine = make_engine(runner, stuck_after=0.1)
    client = create_app(Service(engine, "toy", 1)).test_client()
    runner.gate.clear()
    statuses: list[int] = []
    waiting = threading.Thread(
        target=lambda: statuses.append(client.post(TEXT, json={"prompt": "a", "max_tokens": 2}).status_code)
    )
    waiting.start()
    end = time.monotonic() + 5
    while client.get("/health").status_code == 200:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert "has not come back" in client.get("/health").get_json()["reason"]
    assert client.get("/ready").status_code == 503
    assert "llmc:healthy" in client.get("/metrics").get_data(as_text=True)
    runner.gate.set()
    waiting.join(10)
    assert statuses == [200]
    assert client.get("/health").status_code == 200


# 8


def test_tiny_cache(make_engine: MakeEngine, tokenizer: Tokenizer) -> None:
    """Thirty-two long requests on a cache for hardly more than one."""
    engine = make_engine(fake.FakeRunner(max_sequences=8, max_length=64, cache_tokens=70), max_queue=64)
    requests = [Request((5 + seed, 6, 7), Sampling(temperature=0), 50) for seed in range(32)]
    handles = [engine.submit(request) for request in requests]
    for request, handle in zip(requests, handles, strict=True):
        text = "".join(event.text for event in handle.events(60))
        assert text == tokenizer.decode(fake.greedy(request.prompt, 50))
    assert engine.cache_usage == engine.num_running == engine.num_waiting == 0


# 9


def test_second_sigterm(start: Callable[..., Server]) -> None:  # noqa: F811
    server = start(runner={"max_length": 50_000, "delay": 0.02}, drain_timeout=60)
    sock = server.open({"prompt": "the", "max_tokens": 40_000, "stream": True, "ignore_eos": True})
    server.wait_for(lambda: server.metric("generation_tokens_total") >= 2)
    server.process.send_signal(signal.SIGTERM)
    server.wait_for(lambda: server.get("/ready")[0] == 503)
    time.sleep(0.5)
    assert server.process.poll() is None
    began = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    server.end()
    assert time.monotonic() - began < 10
    with sock, sock.makefile("rb") as file:
        assert b"[DONE]" not in file.read()
    with pytest.raises(ProcessLookupError):
        os.kill(server.worker, 0)


# 12


def test_external_data(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """An engine from a stranger, whose graph reads a file elsewhere: its manifest agrees with it."""
    import onnx

    folder = tmp_path / "engine"
    builder.build(tiny_checkpoint("llama"), folder, max_length=32)
    elsewhere = tmp_path / "secret"
    (weights,) = {path for path in folder.iterdir() if path.suffix not in {".json", ".onnx", ".jinja"}}
    shutil.copy(weights, elsewhere)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    changed = 0
    for location in ("../secret", str(elsewhere)):
        for initializer in model.graph.initializer:
            for entry in initializer.external_data:
                if entry.key == "location":
                    entry.value = location
                    changed += 1
        onnx.save(model, folder / "model.onnx")
        manifests.seal(folder, manifests.read(folder, "engine"))
        with pytest.raises(LlmcError) as caught:
            open_runner(folder)
        assert isinstance(caught.value, EngineError)
    assert changed > 10


# 13


NAMES = ["../../etc/passwd", "..%2f..%2fetc", "/etc/passwd", "toy/../toy", "file:///etc/passwd", "toy\x00", "TOY", ""]


@pytest.mark.parametrize("name", NAMES)
def test_names(client: FlaskClient, name: str) -> None:
    for path, body in ((TEXT, {"prompt": "a"}), (CHAT, {"messages": [{"role": "user", "content": "a"}]})):
        status, error = error_of(client, path, body | {"model": name})
        assert (status, error["code"], error["param"]) == (404, "model_not_found", "model")
    response = client.get(f"/v1/models/{name}")
    assert response.status_code == 404
    assert "root:" not in response.get_data(as_text=True)


# 14


def test_stop_strings(client: FlaskClient) -> None:
    """Strings that almost match, again and again, cost no more than others."""
    stops = ["a" * 999 + chr(0x100 + number) for number in range(16)]
    began = time.monotonic()
    body = {"prompt": "the", "max_tokens": 200, "stop": stops, "logit_bias": {"67": 100}, "temperature": 0}
    assert client.post(TEXT, json=body).status_code == 200
    assert time.monotonic() - began < 5


# 15


@pytest.mark.parametrize("text", ["a" * 300_000, "e" + "\u0301" * 150_000, " " * 300_000, "\u4e2d" * 100_000])
def test_bombs(make_engine: MakeEngine, text: str) -> None:
    """A long text of one kind is tokenized in time, while others are served."""
    engine = make_engine(fake.FakeRunner(max_sequences=2, max_length=400_000, cache_tokens=400_000))
    client = create_app(Service(engine, "toy", 1)).test_client()
    began = time.monotonic()
    found = client.post("/tokenize", json={"prompt": text})
    assert found.status_code == 200
    assert time.monotonic() - began < 10
    assert client.post("/detokenize", json={"tokens": found.get_json()["tokens"]}).get_json()["prompt"] == text
    assert json.loads(client.get("/health").get_data())["status"] == "ok"


def test_long_texts_let_others_work(tokenizer: Tokenizer) -> None:
    """The tokenizer does not hold Python's lock while it reads a long text."""
    turns, done = 0, threading.Event()

    def encode() -> None:
        tokenizer.encode("the quick brown fox " * 50_000)
        done.set()

    thread = threading.Thread(target=encode)
    thread.start()
    while not done.is_set():
        time.sleep(0.001)
        turns += 1
    thread.join()
    assert turns > 20
