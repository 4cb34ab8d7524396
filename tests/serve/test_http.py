"""The REST interface around the toy model, in this process: shapes, bad input, metrics. No socket is opened."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import Any

import fake
import pytest
from flask.testing import FlaskClient
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from prometheus_client.parser import text_string_to_metric_families
from werkzeug.test import TestResponse

from llmc.prompt import chat_ids
from llmc.serve.app import create_app
from llmc.serve.engine import Engine
from llmc.serve.service import Service
from llmc.tokenizer import Tokenizer

MakeEngine = Callable[..., Engine]
HELLO = [{"role": "user", "content": "hello"}]
CHAT, TEXT, PADDLE = "/v1/chat/completions", "/v1/completions", "/api/chat"
RESPONSES, TOKENIZE, DETOKENIZE = "/v1/responses", "/tokenize", "/detokenize"


@pytest.fixture
def runner() -> fake.FakeRunner:
    return fake.FakeRunner(max_sequences=4, max_length=256)


@pytest.fixture
def service(make_engine: MakeEngine, runner: fake.FakeRunner) -> Service:
    return Service(make_engine(runner, max_waiting=8), "toy", 1234, max_body=100_000, strict=True)


@pytest.fixture
def client(service: Service) -> FlaskClient:
    return create_app(service).test_client()


def events(response: TestResponse) -> list[Any]:
    """The JSON of a stream's events; the last must be [DONE]."""
    assert response.status_code == 200
    assert response.mimetype == "text/event-stream"
    blocks = response.get_data(as_text=True).split("\n\n")
    assert blocks.pop() == ""
    assert blocks.pop() == "data: [DONE]"
    return [json.loads(block.removeprefix("data: ")) for block in blocks if not block.startswith(":")]


def answer(tokenizer: Tokenizer, prompt: list[int], count: int) -> str:
    return tokenizer.decode(fake.greedy(prompt, count))


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


SCHEMA = "response_format.json_schema.schema"
GOOD_CHAT: dict[str, Any] = {"messages": HELLO, "max_tokens": 2}
GOOD_TEXT: dict[str, Any] = {"prompt": "the", "max_tokens": 2}

# (route, changes to a good body, status, param of the error)
BAD_FIELDS: list[tuple[str, dict[str, Any], int, str | None]] = [
    *((TEXT, {"temperature": bad}, 400, "temperature") for bad in (-1, 2.1, "hot", True, [], 10**400)),
    *((CHAT, {"temperature": bad}, 400, "temperature") for bad in (-1, 2.1, "hot", True, {})),
    *((TEXT, {"top_p": bad}, 400, "top_p") for bad in (-0.1, 1.1, "1", {})),
    *((TEXT, {"top_k": bad}, 400, "top_k") for bad in (-2, 1.5, "1", True)),
    *((TEXT, {"n": bad}, 400, "n") for bad in (0, -1, 129, 1.5, "2", True, 10**30)),
    *((TEXT, {"max_tokens": bad}, 400, "max_tokens") for bad in (-1, 10**18, 1.5, "5", True, 256)),
    *((TEXT, {"logprobs": bad}, 400, "logprobs") for bad in (-1, 21, True, "1")),
    *((TEXT, {"seed": bad}, 400, "seed") for bad in (2**63, 1.5, "1", True)),
    *((TEXT, {"presence_penalty": bad}, 400, "presence_penalty") for bad in (-2.1, 2.1, "0")),
    *((TEXT, {"frequency_penalty": bad}, 400, "frequency_penalty") for bad in (-2.1, 2.1)),
    *((TEXT, {"repetition_penalty": bad}, 400, "repetition_penalty") for bad in (0, -1, 1e9)),
    *((TEXT, {"min_p": bad}, 400, "min_p") for bad in (-0.1, 1.5)),
    (TEXT, {"stop": ""}, 400, "stop.0"),
    (TEXT, {"stop": ["a", ""]}, 400, "stop.1"),
    (TEXT, {"stop": ["a"] * 17}, 400, "stop"),
    (TEXT, {"stop": ["a" * 1001]}, 400, "stop.0"),
    (TEXT, {"stop": 5}, 400, "stop"),
    (TEXT, {"stop": [5]}, 400, "stop.0"),
    (TEXT, {"logit_bias": {"999999": 1}}, 400, "logit_bias"),
    (TEXT, {"logit_bias": {"5": 101}}, 400, "logit_bias.5"),
    (TEXT, {"logit_bias": {"x": 1}}, 400, "logit_bias.x.[key]"),
    (TEXT, {"logit_bias": {"-1": 1}}, 400, "logit_bias.-1.[key]"),
    (TEXT, {"logit_bias": [1]}, 400, "logit_bias"),
    (TEXT, {"logit_bias": {str(number): 1 for number in range(2000)}}, 400, "logit_bias"),
    (TEXT, {"allowed_token_ids": []}, 400, "allowed_token_ids"),
    (TEXT, {"allowed_token_ids": [320]}, 400, "allowed_token_ids"),
    (TEXT, {"stop_token_ids": [-1]}, 400, "stop_token_ids.0"),
    (TEXT, {"min_tokens": 3}, 400, "min_tokens"),
    (TEXT, {"stream": "yes"}, 400, "stream"),
    (TEXT, {"stream_options": {"include_usage": True}}, 400, None),
    (TEXT, {"stream": True, "stream_options": {"other": 1}}, 400, "stream_options.other"),
    (TEXT, {"temprature": 1}, 400, "temprature"),
    (TEXT, {"suffix": "x"}, 400, "suffix"),
    *((TEXT, {"best_of": bad}, 400, "best_of") for bad in (0, 129, "2")),
    (TEXT, {"best_of": 2, "n": 3}, 400, None),
    (TEXT, {"best_of": 2, "stream": True}, 400, None),
    *((CHAT, {"priority": bad}, 400, "priority") for bad in (1.5, "1", 2**31)),
    *((CHAT, {"cache_salt": bad}, 400, "cache_salt") for bad in ("", 5, "a" * 257)),
    (RESPONSES, {"input": None}, 400, "input"),
    (RESPONSES, {"input": []}, 400, "input"),
    (RESPONSES, {"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, 400, "input.0.content.str"),
    (RESPONSES, {"previous_response_id": "resp_1"}, 400, "previous_response_id"),
    (RESPONSES, {"tools": [{"type": "web_search"}]}, 400, "tools"),
    (RESPONSES, {"max_output_tokens": 0}, 400, "max_output_tokens"),
    (TOKENIZE, {"messages": HELLO}, 400, None),
    (TOKENIZE, {"prompt": None}, 400, None),
    (DETOKENIZE, {"tokens": [320]}, 400, "tokens"),
    (DETOKENIZE, {"tokens": [-1]}, 400, "tokens.0"),
    (DETOKENIZE, {"tokens": "abc"}, 400, "tokens"),
    (TEXT, {"model": "other"}, 404, "model"),
    (TEXT, {"model": 5}, 400, "model"),
    (TEXT, {"prompt": ""}, 400, "prompt"),
    (TEXT, {"prompt": []}, 400, "prompt"),
    (TEXT, {"prompt": [[]]}, 400, "prompt"),
    (TEXT, {"prompt": None}, 400, "prompt"),
    (TEXT, {"prompt": 5}, 400, "prompt"),
    (TEXT, {"prompt": {"a": 1}}, 400, "prompt"),
    (TEXT, {"prompt": [320]}, 400, "prompt"),
    (TEXT, {"prompt": [-1]}, 400, "prompt"),
    (TEXT, {"prompt": [10**30]}, 400, "prompt"),
    (TEXT, {"prompt": "fox " * 300}, 400, "prompt"),
    (TEXT, {"prompt": ["a"] * 13}, 400, "n"),
    (CHAT, {"messages": []}, 400, "messages"),
    (CHAT, {"messages": None}, 400, "messages"),
    (CHAT, {"messages": "hello"}, 400, "messages"),
    (CHAT, {"messages": ["hello"]}, 400, "messages.0"),
    (CHAT, {"messages": [{"role": "king", "content": "x"}]}, 400, "messages.0.role"),
    (CHAT, {"messages": [{"role": "user"}]}, 400, "messages.0"),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, 400, "messages.0.content.str"),
    (CHAT, {"messages": [{"content": "x"}]}, 400, "messages.0.role"),
    (CHAT, {"messages": [{"role": "user", "content": "x", "contnt": "y"}]}, 400, "messages.0.contnt"),
    (CHAT, {"messages": [{"role": "user", "content": "x " * 300}]}, 400, "prompt"),
    (CHAT, {"tools": [{"type": "function"}]}, 400, "tools.0.function"),
    (CHAT, {"tools": [{"type": "retrieval"}]}, 400, "tools.0.type"),
    (CHAT, {"tools": [{"type": "function", "function": {"name": "a b"}}]}, 400, "tools.0.function.name"),
    (CHAT, {"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tools"),
    (CHAT, {"tools": [{"type": "function", "function": {"name": "f"}}] * 129}, 400, "tools"),
    (CHAT, {"tool_choice": "required"}, 400, None),
    (TEXT, {"tools": [{"type": "function"}]}, 400, "tools"),
    (CHAT, {"functions": [{}]}, 400, "functions"),
    (CHAT, {"response_format": {"type": "xml"}}, 400, "response_format.type"),
    (CHAT, {"response_format": {"type": "json_schema"}}, 400, "response_format"),
    (CHAT, {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, 400, SCHEMA),
    *(
        (CHAT, {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}, 400, SCHEMA)
        for schema in ({"type": "int"}, {"if": {}}, {"$ref": "#"}, {"$ref": "http://x/y"}, {"enum": []})
    ),
    (CHAT, {"guided_json": "{"}, 400, "guided_json"),
    (TEXT, {"guided_regex": "(a"}, 400, "guided_regex"),
    (TEXT, {"guided_regex": "a" * 70_000}, 400, "guided_regex"),
    (TEXT, {"guided_choice": []}, 400, "guided_choice"),
    (TEXT, {"guided_choice": [5]}, 400, "guided_choice.0"),
    (TEXT, {"guided_grammar": "start: nothing"}, 400, "guided_grammar"),
    (TEXT, {"guided_grammar": "start: start"}, 400, "guided_grammar"),
    (TEXT, {"guided_regex": "a", "guided_choice": ["a"]}, 400, None),
    (RESPONSES, {"text": {"format": {"type": "json_schema"}}}, 400, "text.format"),
    (RESPONSES, {"text": {"format": {"type": "json_schema", "schema": {"type": 5}}}}, 400, "text.format.schema"),
    (CHAT, {"modalities": ["text", "audio"]}, 400, "modalities"),
    (CHAT, {"reasoning_effort": "high"}, 400, "reasoning_effort"),
    (CHAT, {"chat_template": "{{ 1 }}"}, 400, "chat_template"),
    (CHAT, {"chat_template_kwargs": {"messages": []}}, 400, None),
    (CHAT, {"top_logprobs": 3}, 400, None),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
    (CHAT, {"logprobs": 3}, 400, "logprobs"),
    (CHAT, {"max_completion_tokens": -1}, 400, "max_completion_tokens"),
    (PADDLE, {"context": ""}, 400, "context"),
    (PADDLE, {"history": "["}, 400, "history"),
    (PADDLE, {"history": ["one"]}, 400, "history"),
    (PADDLE, {"history": [{"a": 1}]}, 400, "history.0"),
    (PADDLE, {"top_p": 3}, 400, "top_p"),
    (PADDLE, {"src_length": 3}, 400, "src_length"),
    (PADDLE, {"max_length": 0}, 400, "max_length"),
]  # fmt: skip
GOOD = {
    CHAT: GOOD_CHAT,
    TEXT: GOOD_TEXT,
    PADDLE: {"context": "hello", "max_length": 2},
    RESPONSES: {"input": "hello", "max_output_tokens": 2},
    TOKENIZE: {"prompt": "hello"},
    DETOKENIZE: {"tokens": [5, 6]},
}
GENERATING = [CHAT, TEXT, PADDLE, RESPONSES]

# (body, content type, status)
RAW: list[tuple[bytes, str | None, int]] = [
    (b"", "application/json", 400),
    (b"{", "application/json", 400),
    (b'{"prompt": "the",}', "application/json", 400),
    (b'{"prompt": "\xff\xfe"}', "application/json", 400),
    (b'{"prompt": "\\ud800"}', "application/json", 400),
    (b'\xff\xfe{\x00"\x00', "application/json", 400),
    (b'{"prompt": "the", "temperature": NaN}', "application/json", 400),
    (b'{"prompt": "the", "temperature": Infinity}', "application/json", 400),
    (b'{"prompt": "the", "temperature": -Infinity}', "application/json", 400),
    (b'{"prompt": "the", "temperature": 1e999}', "application/json", 400),
    (b'{"prompt": "the", "top_k": 1' + b"0" * 5000 + b"}", "application/json", 400),
    (b"[" * 50_000, "application/json", 400),
    (b'{"prompt": ' + b"[" * 20_000 + b"]" * 20_000 + b"}", "application/json", 400),
    (b'{"a":' * 15_000, "application/json", 400),
    (b'[{"prompt": "the"}]', "application/json", 400),
    (b'"the"', "application/json", 400),
    (b"5", "application/json", 400),
    (b"null", "application/json", 400),
    (b'{"prompt": "the"} {}', "application/json", 400),
    (b'{"prompt": "the"}', "text/plain", 415),
    (b'{"prompt": "the"}', "application/x-www-form-urlencoded", 415),
    (b'{"prompt": "the"}', None, 415),
    (b'{"prompt": "' + b"a" * 100_001 + b'"}', "application/json", 413),
]


def check_error(response: TestResponse, status: int) -> dict[str, Any]:
    """Every error has the one shape, and says nothing of this machine."""
    assert response.status_code == status, response.get_data(as_text=True)[:300]
    assert response.mimetype == "application/json"
    error: dict[str, Any] = response.get_json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert len(error["message"]) < 1000
    assert "Traceback" not in error["message"]
    assert "/work" not in error["message"]
    assert "site-packages" not in error["message"]
    return error


def test_bad_fields_are_named(client: FlaskClient) -> None:
    seen = 0
    for route, changes, status, param in BAD_FIELDS:
        response = client.post(route, data=json.dumps(GOOD[route] | changes), content_type="application/json")
        error = check_error(response, status)
        assert error["type"] == "invalid_request_error"
        assert error["param"] == param, (route, changes, error)
        seen += 1
    assert seen == len(BAD_FIELDS) >= 100
    for route, body in GOOD.items():
        assert client.post(route, json=body).status_code == 200


@pytest.mark.parametrize("route", list(GOOD))
def test_bad_bodies(client: FlaskClient, route: str) -> None:
    for body, kind, status in RAW:
        check_error(client.post(route, data=body, content_type=kind), status)
    response = client.post(route, data=b"{}", content_type="application/json", headers={"Content-Encoding": "gzip"})
    check_error(response, 415)
    assert len(RAW) == 23


def test_unknown_routes_and_methods(client: FlaskClient) -> None:
    for path in (
        "/web",
        "/v1",
        "/v1/",
        "//v1/models",
        "/v1/models/",
        "/v1/audio/speech",
        "/x%00y",
        "/v1/../etc/passwd",
        "/static/x",
    ):
        check_error(client.get(path), 404)
    for method, path in (
        ("GET", CHAT),
        ("PUT", TEXT),
        ("DELETE", "/v1/models"),
        ("POST", "/health"),
        ("PATCH", PADDLE),
    ):
        response = client.open(path, method=method)
        check_error(response, 405)
        assert response.headers["Allow"]


def test_a_spelling_mistake_gets_a_hint(client: FlaskClient) -> None:
    error = client.post(TEXT, json=GOOD_TEXT | {"max_token": 3}).get_json()["error"]
    assert "did you mean 'max_tokens'" in error["message"]


def test_too_long_a_prompt_has_openai_s_code(client: FlaskClient) -> None:
    error = check_error(client.post(TEXT, json={"prompt": "fox " * 300}), 400)
    assert error["code"] == "context_length_exceeded"
    assert "maximum context length is 256 tokens" in error["message"]


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


def test_overload_and_drain(client: FlaskClient, service: Service, runner: fake.FakeRunner) -> None:
    runner.gate.clear()
    engine = service.engine
    from llmc.serve.request import Request

    handles = [engine.submit(Request((5, 6), max_tokens=2)) for _ in range(4 + 8)]
    response = client.post(TEXT, json=GOOD_TEXT)
    assert check_error(response, 429)["type"] == "rate_limit_error"
    assert int(response.headers["Retry-After"]) >= 1
    assert client.get("/ready").status_code == 200
    engine.begin_drain()
    for route in GENERATING:
        response = client.post(route, json=GOOD[route])
        assert check_error(response, 503)["code"] == "shutting_down"
        assert int(response.headers["Retry-After"]) >= 1
    assert client.get("/ready").status_code == 503
    assert client.get("/health").status_code == 200
    runner.gate.set()
    for handle in handles:
        assert [event.finish_reason for event in handle.events(10) if event.finish_reason] == ["length"]


def test_an_engine_that_fails(client: FlaskClient, runner: fake.FakeRunner) -> None:
    runner.fail_steps = {0, 3, 5}
    error = check_error(client.post(CHAT, json=GOOD_CHAT), 500)
    assert error["type"] == "server_error"
    streamed = client.post(CHAT, json=GOOD_CHAT | {"max_tokens": 9, "stream": True}).get_data(as_text=True)
    last = streamed.strip().split("\n\n")[-1]
    assert "told to fail" in json.loads(last.removeprefix("data: "))["error"]["message"]
    lines = client.post(PADDLE, json={"context": "a", "max_length": 9}).get_data(as_text=True).splitlines()
    assert json.loads(lines[-1])["error_code"] == 1
    assert client.post(CHAT, json=GOOD_CHAT).status_code == 200


def test_a_bug_is_no_page_of_html(client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmc.serve.routes.chat.chat_ids", lambda *_, **__: 1 / 0)
    error = check_error(client.post(CHAT, json=GOOD_CHAT), 500)
    assert "division" not in error["message"]


def test_an_unhealthy_engine(client: FlaskClient, runner: fake.FakeRunner) -> None:
    runner.fail_steps = {0, 1, 2}
    assert client.get("/health").status_code == 200
    for _ in range(3):
        client.post(TEXT, json=GOOD_TEXT)
    assert client.get("/health").status_code == client.get("/ready").status_code == 503
    assert "steps failed" in client.get("/health").get_json()["reason"]


def test_silence_is_filled_with_comments(make_engine: MakeEngine) -> None:
    runner = fake.FakeRunner(delay=0.3)
    client = create_app(Service(make_engine(runner), "toy", 1, keep_alive=0.05)).test_client()
    response = client.post(TEXT, json=GOOD_TEXT | {"stream": True})
    text = response.get_data(as_text=True)
    assert text.count(": keep-alive\n\n") >= 2
    assert events(response)


ROUTES = [
    "/v1/models",
    "/v1/models/toy",
    *GOOD,
    "/v1/embeddings",
    "/v1/score",
    "/v1/rerank",
    "/metrics",
    "/openapi.json",
    "/nothing",
]


def test_the_key_protects_every_route_but_two(service: Service) -> None:
    client = create_app(dataclasses.replace(service, api_keys=("other", "secret\u00e9"))).test_client()
    for path in ROUTES:
        for header in (None, "Bearer wrong", "Basic secret", "secret", "Bearer", "Bearer \u00fc"):
            response = client.open(path, method="GET", headers={"Authorization": header} if header else {})
            error = check_error(response, 401)
            assert error["code"] == "invalid_api_key"
    app = create_app(service)
    named = {rule.rule for rule in app.url_map.iter_rules()}
    open_routes = {"/health", "/ready", "/", "/web/chat.css", "/web/chat.js"}
    assert named == {*ROUTES, "/v1/models/<path:name>", *open_routes} - {"/nothing", "/v1/models/toy"}
    for key in ("other", "secret\u00e9"):
        assert (
            client.get("/v1/models", headers={"Authorization": f"Bearer {key}".encode().decode("latin-1")}).status_code
            == 200
        )
    assert client.get("/health").status_code == client.get("/ready").status_code == 200


def test_other_origins_are_not_let_in_unless_named(client: FlaskClient, service: Service) -> None:
    origin = {"Origin": "https://page.example"}
    assert "Access-Control-Allow-Origin" not in client.get("/v1/models", headers=origin).headers
    open_client = create_app(
        dataclasses.replace(service, allow_origins=("https://page.example",), api_keys=("k",))
    ).test_client()
    preflight = open_client.options(CHAT, headers={**origin, "Access-Control-Request-Method": "POST"})
    assert preflight.status_code == 200
    assert preflight.headers["Access-Control-Allow-Origin"] == "https://page.example"
    assert "Access-Control-Allow-Origin" not in open_client.options(CHAT, headers={"Origin": "https://evil"}).headers


def samples(text: str) -> Iterator[tuple[str, dict[str, str], float]]:
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            yield sample.name, sample.labels, sample.value


def test_metrics_count_what_happened(client: FlaskClient) -> None:
    for _ in range(3):
        client.post(TEXT, json=GOOD_TEXT)
    client.post(TEXT, json={"prompt": "fox " * 300})
    client.post(TEXT, json={})
    text = client.get("/metrics").get_data(as_text=True)
    found = {(name, labels.get("le", labels.get("finished_reason"))): value for name, labels, value in samples(text)}
    assert found["llmc:generation_tokens_total", None] == 6
    assert found["llmc:prompt_tokens_total", None] == 3
    assert found["llmc:request_success_total", "length"] == 3
    assert found["llmc:time_to_first_token_seconds_count", None] == 3
    assert found["llmc:time_to_first_token_seconds_bucket", "+Inf"] == 3
    assert found["llmc:inter_token_latency_seconds_count", None] == 3
    assert found["llmc:num_requests_running", None] == found["llmc:num_requests_waiting", None] == 0
    assert found["llmc:kv_cache_usage_perc", None] == 0
    answers = [(labels, value) for name, labels, value in samples(text) if name == "llmc:http_responses_total"]
    assert ({"model_name": "toy", "route": TEXT, "status": "400"}, 2.0) in answers
    names = {name for name, _, _ in samples(text)}
    wanted = "prefix_cache_queries_total prefix_cache_hits_total num_preemptions_total e2e_request_latency_seconds_sum"
    assert {f"llmc:{name}" for name in wanted.split()} <= names
    assert all(labels.get("model_name") == "toy" for name, labels, _ in samples(text) if name.startswith("llmc:"))
