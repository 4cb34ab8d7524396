"""Engines on the toy model of tests/serve/fake.py, and servers around them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import fake
from flask.testing import FlaskClient

from llmc.serve.app import create_app
from llmc.serve.engine import Engine
from llmc.serve.service import Service
from llmc.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return fake.tokenizer(tmp_path_factory.mktemp("fake-tokenizer"))


@pytest.fixture
def make_engine(tokenizer: Tokenizer) -> Iterator[Callable[..., Engine]]:
    """Starts engines that are closed, and whose runners must be empty, at the end of the test."""
    engines: list[tuple[Engine, fake.FakeRunner]] = []

    def make(runner: fake.FakeRunner | None = None, **options: object) -> Engine:
        runner = runner or fake.FakeRunner()
        engine = Engine(runner, tokenizer, **options)  # type: ignore[arg-type]
        engines.append((engine, runner))
        engine.start()
        return engine

    yield make
    for engine, runner in engines:
        runner.gate.set()
        engine.close()
        assert runner.closed
        assert not runner.caches, "a slot was leaked"


@pytest.fixture
def runner() -> fake.FakeRunner:
    return fake.FakeRunner(max_sequences=4, max_length=256)


@pytest.fixture
def service(make_engine: Callable[..., Engine], runner: fake.FakeRunner) -> Service:
    return Service(make_engine(runner, max_queue=8), "toy", 1234, max_body=100_000, strict=True)


@pytest.fixture
def client(service: Service) -> FlaskClient:
    return create_app(service).test_client()
