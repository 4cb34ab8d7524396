"""POST /v1/responses, the part of it that is text in and text out.

Nothing is stored between requests: a conversation is sent whole, as `input`.

    input ──► messages ──► chat template ──► engine ──► one output item with one part of text
"""

from __future__ import annotations

import json
import secrets
import time
from typing import Annotated, Any, Literal

from flask import Flask, Response, jsonify
from pydantic import BeforeValidator, Field, model_validator

from llmc.config import Strict
from llmc.errors import LlmcError
from llmc.prompt import chat_ids
from llmc.serve.grammar import Constraint, Grammar
from llmc.serve.handle import Event, Handle
from llmc.serve.request import Request, Sampling
from llmc.serve.routes import errors
from llmc.serve.routes.bodies import IGNORED, REFUSED_BY_RESPONSES
from llmc.serve.routes.transport import ClientGone, abandoned, client_gone, read_body, stream, wait
from llmc.serve.service import Service

Json = dict[str, Any]


class InputPart(Strict):
    """A piece of a message: what the user wrote, or what was answered before."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: list[Any] = []
    logprobs: list[Any] | None = None


class InputMessage(Strict):
    """One turn. An output item of this API may be sent back as it is."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[InputPart]
    id: str | None = None
    status: str | None = None
    phase: str | None = None

    def plain(self) -> Json:
        """As templates expect it."""
        parts = self.content
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        return {"role": {"developer": "system"}.get(self.role, self.role), "content": text}


class TextFormat(Strict):
    """What the answer is; the same as `response_format` elsewhere, with the schema's fields beside the type."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _schema_with_its_type(self) -> TextFormat:
        if (self.schema_ is not None) != (self.type == "json_schema"):
            raise ValueError("schema comes with type: json_schema, and not without")
        return self

    @property
    def constraints(self) -> list[Constraint]:
        """The form that was asked for."""
        if self.type == "text":
            return []
        text = '{"type": "object"}' if self.schema_ is None else json.dumps(self.schema_)
        return [Constraint("json_schema", text, "text.format.schema", self.strict is False)]


class TextOptions(Strict):
    """How the answer is written."""

    format: TextFormat = TextFormat()
    verbosity: Literal["medium"] = "medium"


def _turns(value: Any) -> Any:
    """A bare text is what the user says."""
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


class ResponsesBody(Strict):
    """What the route takes."""

    input: Annotated[
        list[InputMessage],
        BeforeValidator(_turns, json_schema_input_type=str | list[InputMessage]),
        Field(min_length=1),
    ]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    top_logprobs: Literal[0] = 0
    text: TextOptions = TextOptions()
    stream: bool = False
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] = 0
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    user: str | None = None
    metadata: dict[str, str] = {}
    store: bool = False

    def messages(self) -> list[Json]:
        """The conversation."""
        begin = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        return begin + [message.plain() for message in self.input]

    def request(self, ids: list[int], grammar: Grammar | None) -> Request:
        """What the engine is asked."""
        sampling = Sampling(temperature=self.temperature, top_p=self.top_p)
        most, salt = self.max_output_tokens, self.cache_salt or ""
        return Request(tuple(ids), sampling, most, priority=self.priority, cache_salt=salt, grammar=grammar)


def register(app: Flask, service: Service) -> None:
    """Add the route."""
    ignored = (IGNORED | {"parallel_tool_calls"}) - {"user", "metadata", "store"}

    @app.post("/v1/responses")
    def responses() -> Response:
        body = read_body(ResponsesBody, strict=service.strict, refused=REFUSED_BY_RESPONSES, ignored=ignored)
        model = service.check_model(body.model)
        messages = body.messages()
        service.check_length("".join(message["content"] for message in messages), "input")
        ids = chat_ids(service.tokenizer, messages)
        handle = service.submit(model, body.request(ids, service.grammar(body.text.format.constraints)))
        answer = _Answer(model, body, handle)
        if body.stream:
            return stream(
                service,
                handle,
                answer.encode,
                mimetype="text/event-stream",
                keep_alive=b": keep-alive\n\n",
                failed=answer.failed,
                end=answer.end,
            )
        try:
            for event in wait(service, handle, client_gone()):
                answer.add(event)
        except ClientGone:
            return abandoned()
        return jsonify(answer.whole())


class _Answer:
    """One response, as it grows: all at once, or as the events by which it is streamed."""

    def __init__(self, model: str, body: ResponsesBody, handle: Handle) -> None:
        self._body = body
        self._handle = handle
        self._text = ""
        self._reason: str | None = None
        self._sent = 0
        number = secrets.token_hex(12)
        self._item = f"msg_{number}"
        self._place = {"item_id": self._item, "output_index": 0, "content_index": 0}
        self._head: Json = {
            "id": f"resp_{number}",
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
        }

    def add(self, event: Event) -> None:
        """Take in what is new."""
        self._text += event.text
        self._reason = event.finish_reason

    def whole(self) -> Json:
        """The response as it is now."""
        done, cut = self._reason is not None, self._reason == "length"
        body, handle = self._body, self._handle
        usage = {
            "input_tokens": handle.prompt_tokens,
            "input_tokens_details": {"cached_tokens": handle.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": handle.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": handle.prompt_tokens + handle.completion_tokens,
        }
        return {
            **self._head,
            "status": "incomplete" if cut else "completed" if done else "in_progress",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "error": None,
            "output": [self._message()] if done else [],
            "usage": usage if done else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "temperature": body.temperature,
            "top_p": body.top_p,
            "text": body.text.model_dump(by_alias=True, exclude_none=True),
            "metadata": body.metadata,
            "parallel_tool_calls": False,
            "tool_choice": "none",
            "tools": [],
            "truncation": "disabled",
            "store": False,
        }

    def encode(self, events: list[Event]) -> bytes:
        """Some events as server-sent ones."""
        pieces = [] if self._sent else self._opening()
        for event in events:
            self.add(event)
            if event.text:
                delta = {**self._place, "delta": event.text, "logprobs": []}
                pieces.append(self._event("response.output_text.delta", delta))
        return b"".join(pieces)

    def end(self) -> bytes:
        """The last ones."""
        part, message, whole = self._part(), self._message(), self.whole()
        pieces = [
            self._event("response.output_text.done", {**self._place, "text": self._text, "logprobs": []}),
            self._event("response.content_part.done", {**self._place, "part": part}),
            self._event("response.output_item.done", {"output_index": 0, "item": message}),
            self._event(f"response.{whole['status']}", {"response": whole}),
        ]
        return b"".join(pieces)

    def failed(self, error: LlmcError) -> bytes:
        """The last one, when the engine fails."""
        said = errors.body(error)["error"]
        return self._event("error", {"code": said["code"], "message": said["message"], "param": said["param"]})

    def _opening(self) -> list[bytes]:
        empty = {**self._message(), "status": "in_progress", "content": []}
        return [
            self._event("response.created", {"response": self.whole()}),
            self._event("response.in_progress", {"response": self.whole()}),
            self._event("response.output_item.added", {"output_index": 0, "item": empty}),
            self._event("response.content_part.added", {**self._place, "part": self._part()}),
        ]

    def _part(self) -> Json:
        return {"type": "output_text", "text": self._text, "annotations": [], "logprobs": []}

    def _message(self) -> Json:
        status = "incomplete" if self._reason == "length" else "completed"
        return {
            "type": "message",
            "id": self._item,
            "status": status,
            "role": "assistant",
            "content": [self._part()],
        }

    def _event(self, kind: str, values: Json) -> bytes:
        data = json.dumps({"type": kind, "sequence_number": self._sent, **values}, ensure_ascii=False)
        self._sent += 1
        return f"event: {kind}\ndata: {data}\n\n".encode()
