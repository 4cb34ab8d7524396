"""What came after the spine's two routes: responses, tokens, best_of, unknown fields, request ids, priority, salt."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import fake
import pytest
from flask.testing import FlaskClient
from openai.types.responses import Response
from pydantic import TypeAdapter

from llmc.prompt import chat_ids
from llmc.serve.app import create_app
from llmc.serve.engine import Engine
from llmc.serve.request import Request, Sampling
from llmc.serve.routes import openapi
from llmc.serve.service import Service
from llmc.tokenizer import Tokenizer

MakeEngine = Callable[..., Engine]
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture
def runner() -> fake.FakeRunner:
    return fake.FakeRunner(max_sequences=4, max_length=256)


@pytest.fixture
def service(make_engine: MakeEngine, runner: fake.FakeRunner) -> Service:
    return Service(make_engine(runner, max_queue=8), "toy", 1234, max_body=100_000)


@pytest.fixture
def client(service: Service) -> FlaskClient:
    return create_app(service).test_client()


# /v1/responses


def test_responses_streaming_or_not_says_the_same(client: FlaskClient, tokenizer: Tokenizer) -> None:
    body: dict[str, Any] = {"model": "toy", "input": "hello", "temperature": 0, "max_output_tokens": 12}
    whole = client.post("/v1/responses", json=body).get_json()
    found = Response.model_validate(whole)
    wanted = tokenizer.decode(fake.greedy(chat_ids(tokenizer, HELLO), 12))
    assert found.output_text == wanted
    assert (found.status, found.usage and found.usage.output_tokens) == ("incomplete", 12)

    blocks = client.post("/v1/responses", json=body | {"stream": True}).get_data(as_text=True).strip().split("\n\n")
    events = []
    from openai.types.responses import ResponseStreamEvent

    for number, block in enumerate(blocks):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        assert event["sequence_number"] == number
        TypeAdapter(ResponseStreamEvent).validate_python(event)
        events.append(event)
    assert "".join(each["delta"] for each in events if each["type"] == "response.output_text.delta") == wanted
    kinds = list(dict.fromkeys(each["type"].removeprefix("response.") for each in events))
    assert kinds == [
        *("created", "in_progress", "output_item.added", "content_part.added", "output_text.delta"),
        *("output_text.done", "content_part.done", "output_item.done", "incomplete"),
    ]
    assert events[-1]["response"]["output"][0]["content"] == whole["output"][0]["content"]


def test_responses_take_a_conversation_and_their_own_output(client: FlaskClient, tokenizer: Tokenizer) -> None:
    body = {"temperature": 0, "max_output_tokens": 5, "instructions": "be brief"}
    first = client.post("/v1/responses", json=body | {"input": HELLO}).get_json()
    text = first["output"][0]["content"][0]["text"]
    system = {"role": "system", "content": "be brief"}
    assert text == tokenizer.decode(fake.greedy(chat_ids(tokenizer, [system, *HELLO]), 5))
    more = {"role": "user", "content": [{"type": "input_text", "text": "and"}, {"type": "input_text", "text": " you"}]}
    second = client.post("/v1/responses", json=body | {"input": [*HELLO, *first["output"], more]}).get_json()
    turns = [system, *HELLO, {"role": "assistant", "content": text}, {"role": "user", "content": "and you"}]
    wanted = tokenizer.decode(fake.greedy(chat_ids(tokenizer, turns), 5))
    assert second["output"][0]["content"][0]["text"] == wanted


def test_a_failing_engine_in_responses(client: FlaskClient, runner: fake.FakeRunner) -> None:
    runner.fail_steps = {2}
    body = {"input": "hello", "max_output_tokens": 9, "stream": True}
    last = client.post("/v1/responses", json=body).get_data(as_text=True).strip().split("\n\n")[-1]
    assert last.startswith("event: error\n")
    assert "told to fail" in last


# Tokens


def test_tokens_there_and_back(client: FlaskClient, tokenizer: Tokenizer) -> None:
    text = "the quick <|im_end|> \u00fcmlaut \u4e2d"
    found = client.post("/tokenize", json={"prompt": text, "return_token_strs": True}).get_json()
    assert found["tokens"] == tokenizer.encode(text)
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert found["max_model_len"] == 256
    assert client.post("/detokenize", json={"tokens": found["tokens"]}).get_json() == {"prompt": text}
    ids = client.post("/tokenize", json={"messages": HELLO}).get_json()["tokens"]
    assert ids == chat_ids(tokenizer, HELLO)
    ids = client.post("/tokenize", json={"messages": HELLO, "add_generation_prompt": False}).get_json()["tokens"]
    assert ids == chat_ids(tokenizer, HELLO, add_generation_prompt=False)


# best_of


def test_best_of_gives_the_likeliest(client: FlaskClient) -> None:
    body = {"prompt": ["the", "fox"], "max_tokens": 6, "temperature": 1.5, "seed": 3, "logprobs": 0}
    every = client.post("/v1/completions", json=body | {"n": 4}).get_json()["choices"]

    def score(choice: dict[str, Any]) -> float:
        values = choice["logprobs"]["token_logprobs"]
        return float(sum(values) / len(values))

    groups = [sorted(every[begin : begin + 4], key=score, reverse=True)[:2] for begin in (0, 4)]
    wanted = [choice["text"] for group in groups for choice in group]
    assert len(set(wanted)) == 4
    del body["logprobs"]
    found = client.post("/v1/completions", json=body | {"n": 2, "best_of": 4}).get_json()
    assert [choice["text"] for choice in found["choices"]] == wanted
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2, 3]
    assert all(choice["logprobs"] is None for choice in found["choices"])
    assert found["usage"]["completion_tokens"] == 2 * 4 * 6


# Unknown fields


def test_unknown_fields_are_ignored_and_named(client: FlaskClient, service: Service) -> None:
    body = {"prompt": "the", "max_tokens": 2, "temperature": 0}
    odd = {"temprature": 3, "\u00fc\r\nX-Evil: 1": 1, "stop": ["never"], "a" * 500: 1}
    response = client.post("/v1/completions", json=body | odd)
    assert response.status_code == 200
    assert response.headers["Warning"].startswith('299 llmc "ignored unknown fields: temprature, ???X-Evil??1, aaaa')
    assert len(response.headers["Warning"]) < 200
    assert "X-Evil" not in response.headers
    assert response.get_json()["choices"] == client.post("/v1/completions", json=body).get_json()["choices"]
    assert "Warning" not in client.post("/v1/completions", json=body).headers
    nested = {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi", "x": 1}], "y": 2}]}
    response = client.post("/v1/chat/completions", json=nested | {"max_tokens": 2})
    assert response.status_code == 200
    for name in ("messages.0.y", ".x"):
        assert name in response.headers["Warning"]
    # What would change the answer is refused all the same, and so is what is wrong.
    for changes in ({"suffix": "x"}, {"temperature": 9, "temprature": 1}):
        assert client.post("/v1/completions", json=body | changes).status_code == 400
    strict = create_app(dataclasses.replace(service, strict=True)).test_client()
    response = strict.post("/v1/completions", json=body | {"temprature": 3})
    assert response.get_json()["error"]["param"] == "temprature"


def test_a_hundred_thousand_unknown_fields(service: Service) -> None:
    client = create_app(dataclasses.replace(service, max_body=4 << 20)).test_client()
    body = {"prompt": "the", "max_tokens": 2} | {f"field{number}": number for number in range(100_000)}
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200
    assert len(response.headers["Warning"]) < 400


# Numbers of requests


def test_every_answer_has_the_request_s_id(client: FlaskClient) -> None:
    assert client.get("/v1/models", headers={"X-Request-Id": "abc-1"}).headers["X-Request-Id"] == "abc-1"
    made = {client.get("/health").headers["X-Request-Id"] for _ in range(3)}
    assert len(made) == 3
    for bad in ("a" * 201, "a b", "\u00fc"):
        given = client.get("/nothing", headers={"X-Request-Id": bad.encode().decode("latin-1")})
        assert given.headers["X-Request-Id"].startswith("req-")
    streamed = client.post("/v1/completions", json={"prompt": "a", "stream": True}, headers={"X-Request-Id": "s"})
    assert streamed.headers["X-Request-Id"] == "s"
    streamed.get_data()


# Priority and salt


def test_the_urgent_are_served_first(make_engine: MakeEngine) -> None:
    runner = fake.FakeRunner(max_sequences=1)
    engine = make_engine(runner)
    runner.gate.clear()
    order: list[int] = []
    handles = {}
    for number, priority in enumerate([0, 5, 0, -3, 5]):
        request = Request((5, 6, number + 7), Sampling(temperature=0), max_tokens=2, priority=priority)
        handles[number] = engine.submit(request)
        if number == 0:
            while engine.num_running == 0:
                pass
    runner.gate.set()
    open_handles = dict(handles)
    while open_handles:
        for number, handle in list(open_handles.items()):
            handle.take(0.001)
            if handle.done:
                order.append(number)
                del open_handles[number]
    assert engine.stats.finished["length"] == 5
    claimed = [cache[2] - 7 for cache in runner._remembered]
    assert claimed == [3, 2, 1, 4]


def test_the_cache_is_shared_within_a_salt_alone(client: FlaskClient) -> None:
    body = {"prompt": "the quick brown fox jumps over", "max_tokens": 1}

    def cached(**salt: str) -> int:
        found = client.post("/v1/completions", json=body | salt).get_json()
        return int(found["usage"]["prompt_tokens_details"]["cached_tokens"])

    assert cached() == 0
    assert cached() > 0
    assert cached(cache_salt="a") == 0
    assert cached(cache_salt="b") == 0
    assert cached(cache_salt="a") > 0


def test_tokens_in_the_queue_are_limited(make_engine: MakeEngine) -> None:
    runner = fake.FakeRunner(max_sequences=1, max_length=256)
    engine = make_engine(runner, max_queued_tokens=20)
    client = create_app(Service(engine, "toy", 1)).test_client()
    runner.gate.clear()
    first = engine.submit(Request((5, 6), max_tokens=2))
    while engine.num_running == 0:
        pass
    long = engine.submit(Request(tuple(range(5, 35)), max_tokens=2))
    response = client.post("/v1/completions", json={"prompt": "the"})
    assert response.status_code == 429
    assert "of 20 tokens" in response.get_json()["error"]["message"]
    assert int(response.headers["Retry-After"]) >= 1
    runner.gate.set()
    for handle in (first, long):
        list(handle.events(10))
    assert client.post("/v1/completions", json={"prompt": "the"}).status_code == 200


# The document


def test_the_document_has_every_route_and_field(client: FlaskClient, service: Service) -> None:
    document = client.get("/openapi.json").get_json()
    rules = {rule.rule.replace("<path:name>", "{name}") for rule in create_app(service).url_map.iter_rules()}
    assert set(document["paths"]) == rules - {"/web/chat.css", "/web/chat.js"}
    schemas = document["components"]["schemas"]
    for _, model in openapi.POSTS.values():
        assert set(schemas[model.__name__]["properties"]) == set(model.model_fields)
        assert schemas[model.__name__]["additionalProperties"] is False
    from jsonschema import Draft202012Validator

    for schema in schemas.values():
        Draft202012Validator.check_schema(schema)
    check = Draft202012Validator({**document, "$ref": "#/components/schemas/CompletionBody"}).is_valid
    assert check({"prompt": "the"})
    assert check({"prompt": [[5]], "stop": "x", "logit_bias": {"5": 1}})
    assert not check({"prompt": 5})


@pytest.mark.slow
def test_schemathesis_finds_no_server_error(service: Service) -> None:
    import schemathesis
    from hypothesis import HealthCheck, given, settings
    from schemathesis.checks import not_a_server_error

    schema = schemathesis.openapi.from_wsgi("/openapi.json", create_app(service))
    asked: set[str] = set()

    def run(operation: Any) -> None:
        @given(case=operation.as_strategy())
        @settings(max_examples=60, suppress_health_check=list(HealthCheck))
        def check(case: Any) -> None:
            asked.add(case.path)
            case.call_and_validate(checks=[not_a_server_error])

        check()

    for found in schema.get_all_operations():
        run(found.ok())
    assert asked | {"/openapi.json"} == set(openapi.POSTS) | set(openapi.GETS)
    assert sum(service.answers.values()) > 200
