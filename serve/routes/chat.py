"""POST /v1/chat/completions."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from flask import Flask, Response, jsonify

from llmc.prompt import chat_ids
from llmc.serve.grammar import Grammar
from llmc.serve.handle import Event, Handle
from llmc.serve.routes.bodies import IGNORED, REFUSED_BY_CHAT, ChatBody
from llmc.serve.routes.chunks import Envelope, chat_logprobs, quote, reason, sse
from llmc.serve.routes.transport import ClientGone, abandoned, client_gone, read_body, wait
from llmc.serve.service import Service
from llmc.serve.tools import MAX_CALLS, CallParser, Format, enforced, format_of, whole_calls

NewParser = Callable[[], CallParser | None]


def register(app: Flask, service: Service) -> None:
    """Add the route."""

    @app.post("/v1/chat/completions")
    def chat() -> Response:
        body = read_body(ChatBody, strict=service.strict, refused=REFUSED_BY_CHAT, ignored=IGNORED)
        model = service.check_model(body.model)
        form = format_of(service.tokenizer) if body.offered else None
        service.check_length("".join(message.text for message in body.messages), "messages")
        ids = chat_ids(
            service.tokenizer,
            [message.plain() for message in body.messages],
            tools=body.offered or None,
            add_generation_prompt=body.add_generation_prompt,
            **body.chat_template_kwargs,
        )
        handle = service.submit(model, body.request(ids, _grammar(service, body, form)))
        names = {each["function"]["name"] for each in body.offered}

        def parser() -> CallParser | None:
            return None if form is None else CallParser(form, names)

        if body.stream:
            envelope = Envelope("chat.completion.chunk", model, "chatcmpl")
            encode = _encoder(service, envelope, body.include_usage, parser)
            return sse(service, handle, envelope, encode, body.include_usage)
        try:
            return jsonify(_answer(service, model, handle, body.logprobs, parser))
        except ClientGone:
            return abandoned()


def _grammar(service: Service, body: ChatBody, form: Format | None) -> Grammar | None:
    if form is None or not body.forced:
        return service.grammar(body.constraints)
    most = MAX_CALLS if body.tool_choice == "required" and body.parallel_tool_calls else 1
    return service.grammar([enforced(form, service.tokenizer, body.forced, most)])


def _answer(service: Service, model: str, handle: Handle, logprobs: bool, parser: NewParser) -> dict[str, Any]:
    texts: list[list[str]] = [[] for _ in range(handle.choices)]
    reasons: list[str | None] = [None] * handle.choices
    details: list[list[dict[str, Any]]] = [[] for _ in range(handle.choices)]
    for event in wait(service, handle, client_gone()):
        texts[event.choice].append(event.text)
        reasons[event.choice] = event.finish_reason
        if event.logprobs is not None:
            details[event.choice].append(chat_logprobs(service.engine.vocabulary, event.logprobs))
    choices = []
    for index, text in enumerate(texts):
        message, called = _message("".join(text), parser())
        entry = {"content": details[index], "refusal": None} if logprobs else None
        ended = "tool_calls" if called and reasons[index] == "stop" else reasons[index]
        choices.append({"index": index, "message": message, "logprobs": entry, "finish_reason": ended})
    return Envelope("chat.completion", model, "chatcmpl").whole(choices, handle)


def _message(text: str, parser: CallParser | None) -> tuple[dict[str, Any], bool]:
    """The assistant's message, and whether it calls functions."""
    message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
    if parser is None:
        return message, False
    content, calls = whole_calls([*parser.push(text), *parser.flush()])
    # An empty list of calls confuses clients.
    message |= {"content": content or None, "tool_calls": calls} if calls else {"content": content}
    return message, bool(calls)


def _encoder(
    service: Service, envelope: Envelope, include_usage: bool, parser: NewParser
) -> Callable[[list[Event]], bytes]:
    opening = envelope.opening()
    ending = '}],"usage":null}\n\n' if include_usage else "}]}\n\n"
    begun: dict[int, _Deltas] = {}

    def chunk(choice: int, delta: str, details: str = "null", ended: str = "null") -> str:
        return f'{opening}{choice},"delta":{delta},"logprobs":{details},"finish_reason":{ended}{ending}'

    def encode(events: list[Event]) -> bytes:
        pieces = []
        for event in events:
            if event.choice not in begun:
                begun[event.choice] = _Deltas(parser())
                pieces.append(chunk(event.choice, '{"role":"assistant","content":""}'))
            if not (event.text or event.finish_reason or event.logprobs):
                continue
            details = "null"
            if event.logprobs is not None:
                found = chat_logprobs(service.engine.vocabulary, event.logprobs)
                details = json.dumps({"content": [found], "refusal": None})
            deltas = begun[event.choice].of(event)
            if not (deltas or event.finish_reason or event.logprobs):
                continue
            *others, last = deltas or ["{}"]
            pieces += [chunk(event.choice, delta) for delta in others]
            pieces.append(chunk(event.choice, last, details, begun[event.choice].reason(event)))
        return "".join(pieces).encode()

    return encode


class _Deltas:
    """What is new of one choice, as JSON."""

    def __init__(self, parser: CallParser | None) -> None:
        self._parser = parser

    def of(self, event: Event) -> list[str]:
        """In order; none while a call may have begun, or only its end is told."""
        if self._parser is None:
            return [f'{{"content":{quote(event.text)}}}'] if event.text or event.logprobs else []
        found = self._parser.push(event.text)
        if event.finish_reason is not None:
            found += self._parser.flush()
        return [json.dumps(delta.openai(), ensure_ascii=False) for delta in found]

    def reason(self, event: Event) -> str:
        """The finish reason as JSON."""
        called = self._parser is not None and self._parser.calls and event.finish_reason == "stop"
        return '"tool_calls"' if called else reason(event)
