"""`--request-timeout`: what takes longer ends with an error, wherever it is, and gives its place back."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import fake
import pytest
from click import BadParameter
from click.testing import CliRunner
from flask.testing import FlaskClient
from web import CHAT, PADDLE, RESPONSES, TEXT, check_error

from llmc.errors import ConfigError
from llmc.serve.app import create_app
from llmc.serve.engine import Engine
from llmc.serve.service import Service

LIMIT = 0.4
LONG: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 5000},
    TEXT: {"prompt": "the", "max_tokens": 5000, "ignore_eos": True},
    PADDLE: {"context": "hello", "max_length": 5000},
    RESPONSES: {"input": "hello", "max_output_tokens": 5000},
}
Make = Callable[..., Engine]


@pytest.fixture
def runner() -> fake.FakeRunner:
    return fake.FakeRunner(max_sequences=1, max_length=10_000, delay=0.01)


@pytest.fixture
def service(make_engine: Make, runner: fake.FakeRunner) -> Service:
    return Service(make_engine(runner), "toy", 1, request_timeout=LIMIT)


@pytest.fixture
def client(service: Service) -> FlaskClient:
    return create_app(service).test_client()


def all_ended(engine: Engine) -> bool:
    end = time.monotonic() + 5
    while (engine.num_running or engine.num_waiting) and time.monotonic() < end:
        time.sleep(0.01)
    return not engine.num_running and not engine.num_waiting


@pytest.mark.parametrize("route", [CHAT, TEXT, RESPONSES])
def test_an_answer_in_one_piece_is_504(client: FlaskClient, service: Service, route: str) -> None:
    began = time.monotonic()
    error = check_error(client.post(route, json=LONG[route]), 504)
    assert LIMIT <= time.monotonic() - began < LIMIT + 2
    assert error["code"] == "timeout"
    assert "0.4 seconds" in error["message"]
    assert all_ended(service.engine)
    assert client.post(TEXT, json={"prompt": "the", "max_tokens": 3}).status_code == 200


@pytest.mark.parametrize("route", LONG)
def test_a_stream_ends_with_an_error(client: FlaskClient, service: Service, route: str) -> None:
    text = client.post(route, json={**LONG[route], "stream": True}).get_data(as_text=True)
    blocks = [block for block in text.split("\n" if route == PADDLE else "\n\n") if block]
    assert len(blocks) > 5, "what was there came first"
    assert "0.4 seconds" in blocks[-1]
    assert json.loads(blocks[-1][blocks[-1].index("{") :])
    assert all_ended(service.engine)


def test_waiting_counts(client: FlaskClient, service: Service) -> None:
    """One sequence at a time: the second request never begins."""
    first = threading.Thread(target=client.post, args=(TEXT,), kwargs={"json": LONG[TEXT]})
    first.start()
    deadline = time.monotonic() + 5
    while not service.engine.num_running and time.monotonic() < deadline:
        time.sleep(0.005)
    other = create_app(service).test_client()
    check_error(other.post(TEXT, json=LONG[TEXT] | {"priority": 1}), 504)
    first.join(10)
    assert all_ended(service.engine)


def test_a_step_that_does_not_come_back(client: FlaskClient, runner: fake.FakeRunner) -> None:
    """The client is told, though the engine is not heard of."""
    runner.gate.clear()
    try:
        check_error(client.post(TEXT, json=LONG[TEXT]), 504)
    finally:
        runner.gate.set()


def test_all_parts_of_a_long_list_have_one_limit(make_engine: Make) -> None:
    engine = make_engine(fake.FakeRunner(max_sequences=1, max_length=64, delay=0.15))
    client = create_app(Service(engine, "toy", 1, request_timeout=LIMIT)).test_client()
    assert client.post("/v1/embeddings", json={"input": "fox"}).status_code == 200
    check_error(client.post("/v1/embeddings", json={"input": ["the", "quick", "brown", "fox", "jumps"]}), 504)
    assert all_ended(engine)


def test_no_limit_unless_given(make_engine: Make, runner: fake.FakeRunner) -> None:
    client = create_app(Service(make_engine(runner), "toy", 1)).test_client()
    assert client.post(TEXT, json={"prompt": "the", "max_tokens": 80, "ignore_eos": True}).status_code == 200


@pytest.mark.parametrize("given", ["0", "-1", "nan", "x"])
def test_what_is_no_limit(given: str) -> None:
    from llmc.commands.serve import command

    arguments = ["engine", "--request-timeout", given]
    with pytest.raises((BadParameter, ConfigError)) as caught:
        CliRunner().invoke(command, arguments, standalone_mode=False, catch_exceptions=False)
    assert "request" in str(getattr(caught.value.param, "name", caught.value.param))
