"""POST /v1/score and /v1/rerank around the toy model with a scoring head: forms, order, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import fake
import numpy as np
import pytest
from flask.testing import FlaskClient

from llmc.prompt import chat_ids
from llmc.serve.app import create_app
from llmc.serve.engine import Engine
from llmc.serve.service import Service
from llmc.tokenizer import Tokenizer

MakeEngine = Callable[..., Engine]
SCORE, RERANK = "/v1/score", "/v1/rerank"
TEXTS = ["the quick brown fox", "the lazy dog", "it was over"]


@pytest.fixture
def client(make_engine: MakeEngine) -> FlaskClient:
    engine = make_engine(fake.FakeRunner(max_length=200, num_scores=1), max_step_tokens=7)
    return create_app(Service(engine, "judge", 1, pad=0, strict=True)).test_client()


def toy(ids: list[int], count: int = 1) -> Any:
    found = fake.row(ids, count)
    return float(found[0]) if count == 1 else found


def pair(tokenizer: Tokenizer, first: str, second: str) -> list[int]:
    turns = [{"role": "user", "content": first}, {"role": "assistant", "content": second}]
    return chat_ids(tokenizer, turns, add_generation_prompt=False)


@pytest.fixture(autouse=True)
def scores_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy model gives its first three tokens, the special ones, the same low logit; scores are to be others."""
    plain = fake.row

    def row(tokens: Any, vocab_size: int = fake.VOCAB, *, eos: int | None = None) -> Any:
        return plain(tokens, vocab_size + 3, eos=eos)[3:] if vocab_size < 9 else plain(tokens, vocab_size, eos=eos)

    monkeypatch.setattr(fake, "row", row)


def test_every_form(client: FlaskClient, tokenizer: Tokenizer) -> None:
    ids = [tokenizer.encode(text) for text in TEXTS]
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "there"}]
    talk = chat_ids(tokenizer, turns, add_generation_prompt=False)
    forms: list[tuple[dict[str, Any], list[list[int]]]] = [
        ({"input": TEXTS}, ids),
        ({"input": TEXTS[0]}, ids[:1]),
        ({"input": ids}, ids),
        ({"input": [*ids[0], 0, 0]}, ids[:1]),
        ({"messages": turns}, [talk]),
        ({"messages": [turns, turns[:1]]}, [talk, chat_ids(tokenizer, turns[:1], add_generation_prompt=False)]),
        ({"text_1": "who", "text_2": TEXTS}, [pair(tokenizer, "who", text) for text in TEXTS]),
        (
            {"text_1": TEXTS, "text_2": TEXTS[::-1]},
            [pair(tokenizer, *each) for each in zip(TEXTS, TEXTS[::-1], strict=True)],
        ),
    ]
    for body, prompts in forms:
        answer = client.post(SCORE, json=body | {"model": "judge"}).get_json()
        assert [each["score"] for each in answer["data"]] == pytest.approx([toy(each) for each in prompts], abs=1e-6)
        assert [(each["index"], each["object"]) for each in answer["data"]] == [
            (i, "score") for i in range(len(prompts))
        ]
        assert answer["usage"]["prompt_tokens"] == sum(map(len, prompts))
        assert (answer["object"], answer["model"]) == ("list", "judge")
    answer = client.post(SCORE, json={"input": TEXTS[0], "use_activation": True}).get_json()
    assert answer["data"][0]["score"] == pytest.approx(1 / (1 + math.exp(-toy(ids[0]))), abs=1e-6)


def test_several_labels(make_engine: MakeEngine, tokenizer: Tokenizer) -> None:
    engine = make_engine(fake.FakeRunner(num_scores=3))
    client = create_app(Service(engine, "judge", 1)).test_client()
    wanted = toy(tokenizer.encode(TEXTS[0]), 3)
    found = client.post(SCORE, json={"input": TEXTS[0]}).get_json()["data"][0]["score"]
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    found = client.post(SCORE, json={"input": TEXTS[0], "use_activation": True}).get_json()["data"][0]["score"]
    np.testing.assert_allclose(found, np.exp(wanted) / np.exp(wanted).sum(), atol=1e-6)
    refused = client.post(RERANK, json={"query": "a", "documents": ["b"]})
    assert refused.status_code == 400
    assert "several scores" in refused.get_json()["error"]["message"]


def test_rerank(client: FlaskClient, tokenizer: Tokenizer) -> None:
    scores = [toy(pair(tokenizer, "who", text)) for text in TEXTS]
    order = sorted(range(3), key=lambda index: -scores[index])
    body = {"query": "who", "documents": [TEXTS[0], {"text": TEXTS[1]}, TEXTS[2]]}
    results = client.post(RERANK, json=body).get_json()["results"]
    assert [each["index"] for each in results] == order
    assert [each["document"]["text"] for each in results] == [TEXTS[index] for index in order]
    for each in results:
        assert each["relevance_score"] == pytest.approx(1 / (1 + math.exp(-scores[each["index"]])), abs=1e-6)
    few = client.post(RERANK, json=body | {"top_n": 2, "return_documents": False, "use_activation": False}).get_json()[
        "results"
    ]
    assert [each["index"] for each in few] == order[:2]
    assert all(each.keys() == {"index", "relevance_score"} for each in few)
    assert few[0]["relevance_score"] == pytest.approx(max(scores), abs=1e-6)


@pytest.mark.parametrize(
    ("path", "body", "word"),
    [
        (SCORE, {}, "give one of"),
        (SCORE, {"input": "a", "messages": [{"role": "user", "content": "a"}]}, "give one of"),
        (SCORE, {"text_1": "a"}, "give one of"),
        (SCORE, {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, "text_2 has 3"),
        (SCORE, {"input": []}, "input"),
        (SCORE, {"input": ""}, "no tokens"),
        (SCORE, {"input": [[]]}, "no tokens"),
        (SCORE, {"input": [4, 9999]}, "9999"),
        (SCORE, {"input": "the fox " * 200}, "context length"),
        (SCORE, {"messages": [[]]}, "messages"),
        (RERANK, {"query": "a"}, "documents"),
        (RERANK, {"query": "a", "documents": []}, "documents"),
        (RERANK, {"query": "a", "documents": ["b"], "top_n": -1}, "top_n"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}, "/v1/score"),
        ("/v1/completions", {"prompt": "a"}, "/v1/score"),
    ],
)
def test_what_is_wrong_is_named(client: FlaskClient, path: str, body: dict[str, Any], word: str) -> None:
    answer = client.post(path, json=body)
    assert answer.status_code == 400
    assert word in answer.get_json()["error"]["message"]


def test_a_model_without_such_a_head(make_engine: MakeEngine) -> None:
    client = create_app(Service(make_engine(), "toy", 1)).test_client()
    for path, body in ((SCORE, {"input": "a"}), (RERANK, {"query": "a", "documents": ["b"]})):
        answer = client.post(path, json=body)
        assert answer.status_code == 400
        assert "score.weight" in answer.get_json()["error"]["message"]


def test_a_scorer_gives_embeddings_as_well(client: FlaskClient) -> None:
    found = client.post("/v1/embeddings", json={"input": "a"}).get_json()["data"][0]["embedding"]
    assert len(found) == fake.STATE_SIZE
