"""What the routes answer, streamed or not, against OpenAI's own types and the toy model's tokens."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import fake
import pytest
from flask.testing import FlaskClient
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from web import CHAT, GOOD_CHAT, HELLO, PADDLE, TEXT, answer, check_error, events

from llmc.prompt import chat_ids
from llmc.serve.app import create_app
from llmc.serve.engine import Engine
from llmc.serve.service import Service
from llmc.tokenizer import Tokenizer

MakeEngine = Callable[..., Engine]


def test_models(client: FlaskClient) -> None:
    listed = client.get("/v1/models").get_json()
    assert [Model.model_validate(each, strict=True).id for each in listed["data"]] == ["toy"]
    assert client.get("/v1/models/toy").get_json() == listed["data"][0]
    missing = client.get("/v1/models/other")
    assert missing.status_code == 404
    assert missing.get_json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("logprobs", [False, True])
def test_chat_streaming_or_not_says_the_same(client: FlaskClient, tokenizer: Tokenizer, logprobs: bool) -> None:
    body: dict[str, Any] = {"model": "toy", "messages": HELLO, "max_tokens": 12, "temperature": 0, "n": 2}
    if logprobs:
        body |= {"logprobs": True, "top_logprobs": 3}
    whole = client.post(CHAT, json=body).get_json()
    ChatCompletion.model_validate(whole, strict=True)
    ids = chat_ids(tokenizer, HELLO)
    wanted = answer(tokenizer, ids, 12)
    assert [choice["message"]["content"] for choice in whole["choices"]] == [wanted] * 2
    assert [choice["finish_reason"] for choice in whole["choices"]] == ["length"] * 2
    assert whole["usage"]["completion_tokens"] == 24
    assert whole["usage"]["prompt_tokens"] == len(ids)
    assert whole["usage"]["total_tokens"] == 24 + len(ids)

    chunks = events(client.post(CHAT, json=body | {"stream": True, "stream_options": {"include_usage": True}}))
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk, strict=True)
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 24
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    for index in range(2):
        mine = [each["choices"][0] for each in chunks[:-1] if each["choices"][0]["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(each["delta"].get("content", "") for each in mine) == wanted
        assert [each["finish_reason"] for each in mine if each["finish_reason"]] == ["length"]
        if logprobs:
            streamed = [entry for each in mine if each["logprobs"] for entry in each["logprobs"]["content"]]
            assert streamed == whole["choices"][index]["logprobs"]["content"]
            assert len(streamed) == 12
            assert all(len(entry["top_logprobs"]) == 3 for entry in streamed)
            raw = bytes(byte for entry in streamed for byte in entry["bytes"])
            assert raw.decode("utf-8", "replace") == wanted


def test_completions_streaming_or_not_says_the_same(client: FlaskClient, tokenizer: Tokenizer) -> None:
    body = {"prompt": ["the quick", "fox"], "max_tokens": 9, "temperature": 0, "n": 2, "echo": True, "logprobs": 2}
    whole = client.post(TEXT, json=body).get_json()
    plain = {key: value for key, value in body.items() if key != "echo"}
    Completion.model_validate(client.post(TEXT, json=plain).get_json(), strict=True)
    wanted = [text + answer(tokenizer, tokenizer.encode(text), 9) for text in ("the quick", "fox") for _ in range(2)]
    assert [choice["text"] for choice in whole["choices"]] == wanted
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2, 3]
    for choice in whole["choices"]:
        lists = choice["logprobs"]
        assert len({len(values) for values in lists.values()}) == 1
        assert lists["token_logprobs"][0] is None
        assert lists["top_logprobs"][0] is None
        assert all(value < 0 for value in lists["token_logprobs"][1:])
        assert lists["text_offset"] == sorted(lists["text_offset"])
    chunks = events(client.post(TEXT, json=body | {"stream": True}))
    for index in range(4):
        mine = [each["choices"][0] for each in chunks if each["choices"][0]["index"] == index]
        assert "".join(each["text"] for each in mine) == wanted[index]
        for name, values in whole["choices"][index]["logprobs"].items():
            assert [value for each in mine for value in each["logprobs"][name]] == values


def test_prompts_may_be_texts_or_tokens(client: FlaskClient, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the quick")
    for prompt in ("the quick", ["the quick"], ids, [ids]):
        found = client.post(TEXT, json={"prompt": prompt, "max_tokens": 5, "temperature": 0}).get_json()
        assert [choice["text"] for choice in found["choices"]] == [answer(tokenizer, ids, 5)]
    found = client.post(
        TEXT, json={"prompt": [ids, ids[:1]], "max_tokens": 5, "temperature": 0, "echo": True}
    ).get_json()
    assert [choice["text"] for choice in found["choices"]] == [
        "the quick" + answer(tokenizer, ids, 5),
        "the" + answer(tokenizer, ids[:1], 5),
    ]


def test_the_likelihood_of_a_text_without_generating(client: FlaskClient, tokenizer: Tokenizer) -> None:
    body = {"prompt": "the quick brown fox", "max_tokens": 0, "echo": True, "logprobs": 1, "temperature": 0}
    choice = client.post(TEXT, json=body).get_json()["choices"][0]
    assert choice["text"] == "the quick brown fox"
    assert "".join(choice["logprobs"]["tokens"]) == "the quick brown fox"


def test_stop_and_finish_reason(client: FlaskClient, tokenizer: Tokenizer) -> None:
    wanted = answer(tokenizer, tokenizer.encode("the"), 40)
    stop = wanted[15:18]
    body = {"prompt": "the", "max_tokens": 40, "temperature": 0}
    for value in (stop, [stop, "never to be seen"]):
        choice = client.post(TEXT, json=body | {"stop": value}).get_json()["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == (wanted[: wanted.index(stop)], "stop")
    chunks = events(client.post(TEXT, json=body | {"stop": stop, "stream": True}))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == wanted[: wanted.index(stop)]


def test_defaults_and_harmless_fields(client: FlaskClient) -> None:
    found = client.post(TEXT, json={"prompt": "the", "seed": 1}).get_json()
    assert found["usage"]["completion_tokens"] == 16
    harmless = {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "n": None, "stop": None}
    nothing = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "temperature": 1, "top_p": 1}
    response = client.post(CHAT, json={"messages": HELLO, "max_completion_tokens": 3, **harmless, **nothing})
    assert response.status_code == 200
    assert response.get_json()["usage"]["completion_tokens"] == 3


def test_what_an_answer_holds_may_be_sent_back(client: FlaskClient) -> None:
    message = client.post(CHAT, json={"messages": HELLO, "max_tokens": 3}).get_json()["choices"][0]["message"]
    parts = [{"type": "text", "text": "and"}, {"type": "text", "text": " more"}]
    body = {"messages": [*HELLO, message, {"role": "user", "content": parts}], "max_tokens": 3}
    assert client.post(CHAT, json=body).status_code == 200


HISTORIES: list[Any] = [
    ["hi", "yes?"],
    [{"utterance": "hi"}, {"utterance": "yes?"}],
    [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}],
    '[{"utterance": "hi"}, {"utterance": "yes?"}]',
]


@pytest.mark.parametrize("history", HISTORIES, ids=range(len(HISTORIES)))
def test_paddle_chat(client: FlaskClient, tokenizer: Tokenizer, history: Any) -> None:
    """The body of PaddleNLP's own request_flask_server.py."""
    body = {"context": "hello", "history": history, "top_k": 0, "top_p": 0.0, "temperature": 0.95}
    body |= {"repetition_penalty": 1.0, "max_length": 10, "src_length": 100, "min_length": 1, "extra_info": {"a": 1}}
    response = client.post(PADDLE, json=body)
    assert response.mimetype == "application/x-ndjson"
    lines = [json.loads(line) for line in response.get_data(as_text=True).splitlines()]
    assert all(line["error_code"] == 0 and line["error_msg"] == "Success" for line in lines)
    assert all(line["result"]["response"]["role"] == "bot" for line in lines)
    turns = [("user", "hi"), ("assistant", "yes?"), ("user", "hello")]
    ids = chat_ids(tokenizer, [{"role": role, "content": text} for role, text in turns])
    text = "".join(line["result"]["response"]["utterance"] for line in lines)
    assert text == answer(tokenizer, ids, 10)
    # Without room for the history, it is as if there was none.
    short = client.post(PADDLE, json=body | {"src_length": len(ids) - 1}).get_data(as_text=True).splitlines()
    text = "".join(json.loads(line)["result"]["response"]["utterance"] for line in short)
    assert text == answer(tokenizer, chat_ids(tokenizer, HELLO), 10)
    error = client.post(PADDLE, json={"context": 5}).get_json()
    assert (error["error_code"], error["error_msg"]) == (1, error["error"]["message"])


def test_a_model_without_a_template(make_engine: MakeEngine, tokenizer: Tokenizer) -> None:
    bare = dataclasses.replace(tokenizer, chat_template=None)
    engine = Engine(fake.FakeRunner(), bare)
    engine.start()
    client = create_app(Service(engine, "toy", 1)).test_client()
    error = check_error(client.post(CHAT, json=GOOD_CHAT), 400)
    assert "/v1/completions" in error["message"]
    check_error(client.post(PADDLE, json={"context": "a", "history": ["b", "c"]}), 400)
    lines = client.post(PADDLE, json={"context": "the", "max_length": 5, "top_p": 0.0}).get_data(as_text=True)
    text = "".join(json.loads(line)["result"]["response"]["utterance"] for line in lines.splitlines())
    assert text == answer(tokenizer, tokenizer.encode("the"), 5)
    engine.close()
