"""POST /v1/chat/completions."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from flask import Flask, Response, jsonify

from llmc.prompt import chat_ids
from llmc.serve.handle import Event, Handle
from llmc.serve.routes.bodies import IGNORED, REFUSED_BY_CHAT, ChatBody
from llmc.serve.routes.chunks import Envelope, chat_logprobs, quote, reason, sse
from llmc.serve.routes.transport import ClientGone, abandoned, client_gone, read_body, wait
from llmc.serve.service import Service


def register(app: Flask, service: Service) -> None:
    """Add the route."""

    @app.post("/v1/chat/completions")
    def chat() -> Response:
        body = read_body(ChatBody, strict=service.strict, refused=REFUSED_BY_CHAT, ignored=IGNORED)
        service.check_model(body.model)
        ids = chat_ids(
            service.tokenizer,
            [message.plain() for message in body.messages],
            add_generation_prompt=body.add_generation_prompt,
            **body.chat_template_kwargs,
        )
        handle = service.engine.submit(body.request(ids, service.grammar(body.constraints)))
        if body.stream:
            envelope = Envelope("chat.completion.chunk", service.model, "chatcmpl")
            encode = _encoder(service, envelope, body.include_usage)
            return sse(service, handle, envelope, encode, body.include_usage)
        try:
            return jsonify(_answer(service, handle, body.logprobs))
        except ClientGone:
            return abandoned()


def _answer(service: Service, handle: Handle, logprobs: bool) -> dict[str, Any]:
    texts: list[list[str]] = [[] for _ in range(handle.choices)]
    reasons: list[str | None] = [None] * handle.choices
    details: list[list[dict[str, Any]]] = [[] for _ in range(handle.choices)]
    for event in wait(handle, client_gone()):
        texts[event.choice].append(event.text)
        reasons[event.choice] = event.finish_reason
        if event.logprobs is not None:
            details[event.choice].append(chat_logprobs(service.engine.vocabulary, event.logprobs))
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": "".join(text), "refusal": None},
            "logprobs": {"content": details[index], "refusal": None} if logprobs else None,
            "finish_reason": reasons[index],
        }
        for index, text in enumerate(texts)
    ]
    return Envelope("chat.completion", service.model, "chatcmpl").whole(choices, handle)


def _encoder(service: Service, envelope: Envelope, include_usage: bool) -> Callable[[list[Event]], bytes]:
    opening = envelope.opening()
    ending = '}],"usage":null}\n\n' if include_usage else "}]}\n\n"
    begun: set[int] = set()

    def encode(events: list[Event]) -> bytes:
        pieces = []
        for event in events:
            if event.choice not in begun:
                begun.add(event.choice)
                delta = '{"role":"assistant","content":""}'
                pieces.append(f'{opening}{event.choice},"delta":{delta},"logprobs":null,"finish_reason":null{ending}')
            if not (event.text or event.finish_reason or event.logprobs):
                continue
            delta = f'{{"content":{quote(event.text)}}}' if event.text or event.logprobs else "{}"
            details = "null"
            if event.logprobs is not None:
                found = chat_logprobs(service.engine.vocabulary, event.logprobs)
                details = json.dumps({"content": [found], "refusal": None})
            pieces.append(
                f'{opening}{event.choice},"delta":{delta},"logprobs":{details},"finish_reason":{reason(event)}{ending}'
            )
        return "".join(pieces).encode()

    return encode
