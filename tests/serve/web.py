"""What the tests of the REST interface share: routes, bodies that are right, and looks at answers."""

from __future__ import annotations

import json
from typing import Any

import fake
from werkzeug.test import TestResponse

from llmc.tokenizer import Tokenizer

HELLO = [{"role": "user", "content": "hello"}]
CHAT, TEXT, PADDLE = "/v1/chat/completions", "/v1/completions", "/api/chat"
RESPONSES, TOKENIZE, DETOKENIZE = "/v1/responses", "/tokenize", "/detokenize"
GOOD_CHAT: dict[str, Any] = {"messages": HELLO, "max_tokens": 2}
GOOD_TEXT: dict[str, Any] = {"prompt": "the", "max_tokens": 2}
GOOD = {
    CHAT: GOOD_CHAT,
    TEXT: GOOD_TEXT,
    PADDLE: {"context": "hello", "max_length": 2},
    RESPONSES: {"input": "hello", "max_output_tokens": 2},
    TOKENIZE: {"prompt": "hello"},
    DETOKENIZE: {"tokens": [5, 6]},
}
GENERATING = [CHAT, TEXT, PADDLE, RESPONSES]


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
