"""Engines on the toy model of tests/serve/fake.py, and servers around them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import fake

from llmc.serve.engine import Engine
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
