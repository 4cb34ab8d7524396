"""POST /api/chat: the chat of PaddleNLP's Flask server, whose clients run unchanged.

Read from PaddleNLP's llm/flask_server.py and request_flask_server.py (commits 01657cee and dbec0124). The answer is one
JSON object a line, each with the text that is new:

    {"error_code": 0, "error_msg": "Success", "result": {"response": {"role": "bot", "utterance": " world"}}}

What differs from there: several clients are served at once and keep their own settings; wrong input is a 400 with a
reason instead of a broken stream; what is not given has a default; and a prompt over `src_length` loses its oldest
turns as a whole, where PaddleNLP cuts tokens off its beginning.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

import pydantic_core
from flask import Flask, Response
from pydantic import BeforeValidator, Field

from llmc.config import Strict
from llmc.errors import LlmcError, UserError
from llmc.prompt import chat_ids, completion_ids
from llmc.serve.handle import Event
from llmc.serve.request import Request, Sampling
from llmc.serve.routes.bodies import Count
from llmc.serve.routes.transport import read_body, stream
from llmc.serve.service import Service
from llmc.tokenizer import Tokenizer

IGNORED = frozenset({"extra_info"})
ROLES = ("user", "assistant")


def _turns(value: Any) -> Any:
    """The history as a list of texts: it comes as JSON text or as a list, of strings or {"utterance": ...}."""
    if isinstance(value, str):
        try:
            value = pydantic_core.from_json(value) if value.strip() else []
        except ValueError:
            raise ValueError("must be a list, or a list as JSON text") from None
    if not isinstance(value, list):
        raise ValueError("must be a list of turns")
    return [each.get("utterance", each.get("content")) if isinstance(each, dict) else each for each in value]


class PaddleBody(Strict):
    """What the route takes.

    Attributes:
        context: What the user says now.
        history: What was said before: user, bot, user, bot ...; as texts, as {"utterance": text}, or as JSON text.
        max_length: Tokens to generate at most; fewer when the context ends before.
        min_length: Tokens to generate at least.
        src_length: Tokens of the prompt at most; the oldest turns are left out until it fits.
        top_p: 0 takes the likeliest token.
    """

    context: Annotated[str, Field(min_length=1)]
    history: Annotated[list[str], BeforeValidator(_turns, json_schema_input_type=str | list[Any])] = []
    max_length: Annotated[int, Field(ge=1, le=2**31)] = 1024
    min_length: Count = 0
    src_length: Annotated[int, Field(ge=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] = 0
    top_p: Annotated[float, Field(ge=0, le=1)] = 0.7
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.95
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] = 1.0

    @property
    def sampling(self) -> Sampling:
        return Sampling(
            top_k=self.top_k,
            top_p=self.top_p,
            temperature=self.temperature,
            repetition_penalty=self.repetition_penalty,
            min_tokens=self.min_length,
        )


def register(app: Flask, service: Service) -> None:
    """Add the route."""

    @app.post("/api/chat")
    def paddle_chat() -> Response:
        body = read_body(PaddleBody, strict=service.strict, refused={}, ignored=IGNORED)
        service.check_length(body.context, "context")
        ids = prompt_ids(service.tokenizer, body)
        most = min(body.max_length, service.engine.budget.longest - len(ids))
        handle = service.engine.submit(Request(tuple(ids), body.sampling, most if most > 0 else body.max_length))
        return stream(
            service,
            handle,
            _encode,
            mimetype="application/x-ndjson",
            keep_alive=_line(""),
            failed=_failure,
            end=lambda: b"",
        )


def prompt_ids(tokenizer: Tokenizer, body: PaddleBody) -> list[int]:
    """Tokens of the conversation, without its oldest turns if it is too long.

    Raises:
        UserError: The last turn alone is longer than `src_length`, or there is a history and no chat template.
    """
    if len(body.history) % 2:
        raise UserError("the history must have pairs of turns, user and bot", param="history")
    if tokenizer.chat_template is None and body.history:
        raise UserError(
            "this model has no chat template, so it knows no history: send 'context' alone", param="history"
        )
    for begin in range(0, len(body.history) + 1, 2):
        ids = _ids(tokenizer, [*body.history[begin:], body.context])
        if body.src_length is None or len(ids) <= body.src_length:
            return ids
    raise UserError(f"the prompt has {len(ids)} tokens, more than src_length ({body.src_length})", param="src_length")


def _ids(tokenizer: Tokenizer, turns: list[str]) -> list[int]:
    if tokenizer.chat_template is None:
        return completion_ids(tokenizer, turns[-1])
    return chat_ids(tokenizer, [{"role": ROLES[place % 2], "content": text} for place, text in enumerate(turns)])


def _encode(events: list[Event]) -> bytes:
    return b"".join(_line(event.text) for event in events if event.text)


def _line(text: str) -> bytes:
    return _json({"error_code": 0, "error_msg": "Success", "result": {"response": {"role": "bot", "utterance": text}}})


def _failure(error: LlmcError) -> bytes:
    return _json({"error_code": 1, "error_msg": str(error), "result": {"response": {"role": "bot", "utterance": ""}}})


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, ensure_ascii=False) + "\n").encode()
