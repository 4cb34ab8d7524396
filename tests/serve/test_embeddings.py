"""POST /v1/embeddings: on the toy model by the formula, and on a tiny model against transformers."""

from __future__ import annotations

import base64
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake
import numpy as np
import pytest
import tiny
from flask.testing import FlaskClient
from openai import OpenAI
from openai.types import CreateEmbeddingResponse
from werkzeug.serving import make_server

from llmc.builders import ort as builder
from llmc.serve.app import create_app
from llmc.serve.engine import Engine
from llmc.serve.opening import Settings, open_service
from llmc.serve.request import Request
from llmc.serve.service import Service
from llmc.tokenizer import Tokenizer

MakeEngine = Callable[..., Engine]
ROUTE = "/v1/embeddings"


@pytest.fixture
def client(make_engine: MakeEngine) -> FlaskClient:
    engine = make_engine(fake.FakeRunner(max_length=200), max_step_tokens=7)
    return create_app(Service(engine, "toy", 1, pooling="mean", strict=True)).test_client()


def expected(ids: list[int], pooling: str) -> np.ndarray:
    """By the formula, of the toy model."""
    rows = np.array([fake.row(ids[:end], fake.STATE_SIZE) for end in range(1, len(ids) + 1)], np.float64)
    found = rows.mean(axis=0) if pooling == "mean" else rows[-1]
    return np.asarray(found / np.linalg.norm(found))


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_prompts_of_every_form(make_engine: MakeEngine, tokenizer: Tokenizer, pooling: Any) -> None:
    runner = fake.FakeRunner(max_length=200)
    client = create_app(Service(make_engine(runner, max_step_tokens=7), "toy", 1, pooling=pooling)).test_client()
    texts = ["the quick brown fox jumps over the lazy dog", "a", "there and the other"]
    ids = [tokenizer.encode(text) for text in texts]
    forms: list[tuple[Any, list[list[int]]]] = [(texts, ids), (texts[0], ids[:1]), (ids, ids), (ids[0], ids[:1])]
    for given, prompts in forms:
        for _ in range(2):  # the second time from the cache, where that is possible
            answer = client.post(ROUTE, json={"model": "toy", "input": given}).get_json()
            found = CreateEmbeddingResponse.model_validate(answer, strict=True)
            assert [each.index for each in found.data] == list(range(len(prompts)))
            for each, prompt in zip(found.data, prompts, strict=True):
                np.testing.assert_allclose(each.embedding, expected(prompt, pooling), atol=1e-6)
            assert found.usage.prompt_tokens == found.usage.total_tokens == sum(map(len, prompts))
    assert max(runner.batches) == 7, "the prompts were read in pieces"


def test_base64_and_dimensions(client: FlaskClient, tokenizer: Tokenizer) -> None:
    body = {"input": "the quick brown fox", "dimensions": 5}
    plain = client.post(ROUTE, json=body).get_json()["data"][0]["embedding"]
    wanted = expected(tokenizer.encode("the quick brown fox"), "mean")[:5]
    np.testing.assert_allclose(plain, wanted / np.linalg.norm(wanted), atol=1e-6)
    coded = client.post(ROUTE, json=body | {"encoding_format": "base64"}).get_json()["data"][0]["embedding"]
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(coded), "<f4"), np.array(plain, "<f4"))


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", [1]]}, "input"),
        ({"input": [5, 9999]}, "9999"),
        ({"input": ["a"] * 2049}, "2048"),
        ({"input": "the fox " * 300}, "context length"),
        ({"input": "a", "dimensions": 25}, "24"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "a", "messages": []}, "messages"),
    ],
)
def test_what_is_wrong_is_named(client: FlaskClient, body: dict[str, Any], word: str) -> None:
    answer = client.post(ROUTE, json=body)
    assert answer.status_code == 400
    assert word in str(answer.get_json()["error"])


def test_a_long_list_leaves_the_queue_to_others(make_engine: MakeEngine) -> None:
    engine = make_engine(fake.FakeRunner(max_sequences=2), max_queue=1)
    client = create_app(Service(engine, "toy", 1)).test_client()
    assert len(client.post(ROUTE, json={"input": ["a"] * 50}).get_json()["data"]) == 50


def test_beside_chats_and_through_preemption(make_engine: MakeEngine, tokenizer: Tokenizer) -> None:
    """Nobody's tokens or numbers change for a neighbour; a mean that was begun twice counts nothing twice."""
    runner = fake.FakeRunner(max_sequences=4, max_length=100, cache_tokens=120)
    engine = make_engine(runner, max_step_tokens=8)
    service = Service(engine, "toy", 1, pooling="mean")
    writers = [engine.submit(Request(tuple(tiny.tokens(20, seed)), max_tokens=70, priority=-1)) for seed in (1, 2)]
    ids = [tiny.tokens(60, seed) for seed in (3, 4, 5)]
    found: dict[int, Any] = {}

    def ask(number: int) -> None:
        found[number] = create_app(service).test_client().post(ROUTE, json={"input": [ids[number]]}).get_json()

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for seed, handle in zip((1, 2), writers, strict=True):
        text = "".join(event.text for event in handle.events(30))
        assert text == tokenizer.decode(fake.greedy(tiny.tokens(20, seed), 70))
    for thread in threads:
        thread.join(30)
    for number, prompt in enumerate(ids):
        np.testing.assert_allclose(found[number]["data"][0]["embedding"], expected(prompt, "mean"), atol=1e-6)
    assert engine.preemptions > 0


def test_a_failing_step_is_an_error(make_engine: MakeEngine) -> None:
    runner = fake.FakeRunner()
    runner.fail_steps = {0}
    engine = make_engine(runner)
    answer = create_app(Service(engine, "toy", 1)).test_client().post(ROUTE, json={"input": "a"})
    assert answer.status_code == 500
    assert engine.num_running == 0


@pytest.mark.parametrize("name", ["llama", "qwen2-window", "gpt2", "opt-350m"])
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_the_openai_client_gets_what_transformers_computes(
    name: str, pooling: Any, tmp_path: Path, tiny_checkpoint: Callable[[str], Path]
) -> None:
    import torch

    builder.build(tiny_checkpoint(name), tmp_path / "engine", max_length=128)
    settings = Settings(name="tiny", threads=1, max_sequences=3, max_step_tokens=5, pooling=pooling)
    service = open_service(tmp_path / "engine", settings)
    service.engine.start()
    server = make_server("127.0.0.1", 0, create_app(service), threaded=True)
    threading.Thread(target=server.serve_forever).start()
    prompts = [tiny.tokens(count, seed=count) for count in (1, 2, 17, 60)]
    try:
        with OpenAI(base_url=f"http://127.0.0.1:{server.server_port}/v1", api_key="none", max_retries=0) as openai:
            chat = service.engine.submit(Request(tuple(tiny.tokens(9)), max_tokens=60))
            found = openai.embeddings.create(model="tiny", input=prompts)
            chat.cancel()
    finally:
        server.shutdown()
        server.server_close()
        service.engine.close()
    model = tiny.TINY[name].build()
    for each, prompt in zip(found.data, prompts, strict=True):
        with torch.no_grad():
            states = model.base_model(torch.tensor([prompt])).last_hidden_state[0].numpy().astype(np.float64)
        wanted = states.mean(axis=0) if pooling == "mean" else states[-1]
        np.testing.assert_allclose(each.embedding, wanted / np.linalg.norm(wanted), atol=1e-5)


def test_a_model_that_was_saved_without_its_head(tmp_path: Path) -> None:
    """As Qwen3-Embedding is: the body's names alone, and a head that is tied."""
    import torch
    from safetensors.numpy import load_file

    from llmc.converters import hf
    from llmc.runtime import Chunk
    from llmc.serve.runners import open_runner

    tiny.save(tiny.TINY["qwen3-tied"], tmp_path / "whole")
    model = tiny.TINY["qwen3-tied"].build()
    model.model.save_pretrained(tmp_path / "body")
    tiny.save_tokenizer(tmp_path / "body")
    config = (tmp_path / "whole" / "config.json").read_text(encoding="utf-8")
    (tmp_path / "body" / "config.json").write_text(config, encoding="utf-8")
    assert not any(name.startswith("model.") for name in load_file(tmp_path / "body" / "model.safetensors"))
    hf.convert(tmp_path / "body", tmp_path / "checkpoint")
    builder.build(tmp_path / "checkpoint", tmp_path / "engine", max_length=64)
    runner = open_runner(tmp_path / "engine", threads=1, max_sequences=1)
    ids = tiny.tokens(20)
    runner.claim(1, np.array(ids))
    (rows,) = runner.step([Chunk(1, 0, np.array(ids), 1, states=True)])
    runner.close()
    with torch.no_grad():
        states = model.model(torch.tensor([ids])).last_hidden_state[0, -1].numpy()
    np.testing.assert_allclose(rows[-1], states, atol=1e-4)
