"""What must not be said to the REST interface: bad bodies, unknown routes, missing keys. No socket is opened."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
from flask.testing import FlaskClient
from web import CHAT, DETOKENIZE, GOOD, GOOD_TEXT, HELLO, PADDLE, RESPONSES, TEXT, TOKENIZE, check_error

from llmc.serve.app import create_app
from llmc.serve.engine import Engine
from llmc.serve.service import Service

MakeEngine = Callable[..., Engine]

SCHEMA = "response_format.json_schema.schema"

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
