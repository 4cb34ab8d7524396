"""POST /v1/completions."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from flask import Flask, Response, jsonify

from llmc.prompt import completion_ids
from llmc.serve.handle import Event, Handle
from llmc.serve.routes.bodies import IGNORED, REFUSED_BY_COMPLETIONS, CompletionBody
from llmc.serve.routes.chunks import Envelope, TextLogprobs, quote, reason, sse
from llmc.serve.routes.transport import ClientGone, abandoned, client_gone, read_body, wait
from llmc.serve.sampler import TokenLogprobs
from llmc.serve.service import Service


class _Choice:
    """What is collected of one choice, or since its last chunk."""

    def __init__(self, prompt: list[int], echo: str, logprobs: TextLogprobs | None) -> None:
        self.text = echo
        self.reason: str | None = None
        self._logprobs = logprobs
        self._sum, self._count = 0.0, 0
        self._tokens: list[TokenLogprobs | int] = [*prompt[:1]] if echo and logprobs else []

    def add(self, event: Event) -> None:
        self.text += event.text
        self.reason = event.finish_reason
        self._tokens += event.prompt_logprobs
        if event.logprobs is not None:
            self._tokens.append(event.logprobs)
            self._sum += event.logprobs.logprob
            self._count += 1

    @property
    def score(self) -> float:
        """By which the best choices are found: the mean log-probability of a token."""
        return self._sum / max(self._count, 1)

    def logprobs(self) -> dict[str, Any] | None:
        """The lists of what came since the last call."""
        tokens, self._tokens = self._tokens, []
        return None if self._logprobs is None else self._logprobs.lists(tokens)


def register(app: Flask, service: Service) -> None:
    """Add the route."""

    @app.post("/v1/completions")
    def completions() -> Response:
        body = read_body(
            CompletionBody,
            strict=service.strict,
            refused=REFUSED_BY_COMPLETIONS,
            ignored=IGNORED | {"parallel_tool_calls"},
        )
        model = service.check_model(body.model)
        for each in body.prompt:
            if isinstance(each, str):
                service.check_length(each, "prompt")
        prompts = [each if isinstance(each, list) else completion_ids(service.tokenizer, each) for each in body.prompt]
        grammar = service.grammar(body.constraints)
        handle = service.submit(model, *(body.request(ids, grammar) for ids in prompts))
        choices = _choices(service, body, prompts)
        if body.stream:
            envelope = Envelope("text_completion", model, "cmpl")
            return sse(service, handle, envelope, _encoder(choices, envelope, body.include_usage), body.include_usage)
        try:
            return jsonify(_answer(service, handle, choices, body))
        except ClientGone:
            return abandoned()


def _choices(service: Service, body: CompletionBody, prompts: list[list[int]]) -> list[_Choice]:
    vocabulary = service.engine.vocabulary
    choices = []
    for given, ids in zip(body.prompt, prompts, strict=True):
        text = given if isinstance(given, str) else service.tokenizer.decode(ids, skip_special_tokens=False)
        for _ in range(body.drawn):
            offset = 0 if body.echo else len(text)
            lists = None if body.logprobs is None else TextLogprobs(vocabulary, offset)
            choices.append(_Choice(ids, text if body.echo else "", lists))
    return choices


def _answer(service: Service, handle: Handle, choices: list[_Choice], body: CompletionBody) -> dict[str, Any]:
    for event in wait(service, handle, client_gone()):
        choices[event.choice].add(event)
    groups = [choices[begin : begin + body.drawn] for begin in range(0, len(choices), body.drawn)]
    if body.drawn > body.n:
        groups = [sorted(group, key=lambda each: -each.score)[: body.n] for group in groups]
    found = [
        {"index": index, "text": each.text, "logprobs": each.logprobs(), "finish_reason": each.reason}
        for index, each in enumerate(each for group in groups for each in group)
    ]
    return Envelope("text_completion", body.model or service.model, "cmpl").whole(found, handle)


def _encoder(choices: list[_Choice], envelope: Envelope, include_usage: bool) -> Callable[[list[Event]], bytes]:
    opening = envelope.opening()
    ending = '}],"usage":null}\n\n' if include_usage else "}]}\n\n"

    def encode(events: list[Event]) -> bytes:
        pieces = []
        for event in events:
            choice = choices[event.choice]
            choice.add(event)
            if not (choice.text or event.finish_reason or event.logprobs or event.prompt_logprobs):
                continue
            lists = choice.logprobs()
            details = "null" if lists is None else json.dumps(lists)
            pieces.append(
                f'{opening}{event.choice},"text":{quote(choice.text)},"logprobs":{details},'
                f'"finish_reason":{reason(event)}{ending}'
            )
            choice.text = ""
        return "".join(pieces).encode()

    return encode
