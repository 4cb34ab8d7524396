"""POST /v1/score (vLLM's form) and /v1/rerank (Jina's and Cohere's): what a scoring head says of texts."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
from flask import Flask, Response, jsonify
from pydantic import BeforeValidator, Field, model_validator

from llmc.config import Strict
from llmc.errors import UserError
from llmc.prompt import score_ids, without_padding
from llmc.runtime import Logits
from llmc.serve.request import Request
from llmc.serve.routes.bodies import IGNORED, Message, Priority, Salt, list_of_prompts
from llmc.serve.routes.pooled import pooled, usage
from llmc.serve.routes.transport import ClientGone, abandoned, read_body
from llmc.serve.service import Service

MAX_INPUTS = 2048


def _list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _conversations(value: Any) -> Any:
    """One conversation -> a list of one."""
    return [value] if isinstance(value, list) and value and isinstance(value[0], dict) else value


Texts = Annotated[
    list[str],
    BeforeValidator(_list, json_schema_input_type=str | list[str]),
    Field(min_length=1, max_length=MAX_INPUTS),
]


class ScoreBody(Strict):
    """What is scored: texts, conversations, or pairs of texts.

    Attributes:
        input: Texts or token ids.
        messages: A conversation, or several: its last turn is what is judged.
        text_1, text_2: As many of each, or one `text_1` for all: a question and its answer.
        use_activation: Answer probabilities (sigmoid, or softmax of several labels) and not what the head gives.
    """

    model: str | None = None
    input: (
        Annotated[
            list[str] | list[list[int]],
            BeforeValidator(list_of_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
            Field(min_length=1, max_length=MAX_INPUTS),
        ]
        | None
    ) = None
    messages: (
        Annotated[
            list[Annotated[list[Message], Field(min_length=1)]],
            BeforeValidator(_conversations, json_schema_input_type=list[Message] | list[list[Message]]),
            Field(min_length=1, max_length=MAX_INPUTS),
        ]
        | None
    ) = None
    text_1: Texts | None = None
    text_2: Texts | None = None
    use_activation: bool = False
    priority: Priority = 0
    cache_salt: Salt | None = None

    @model_validator(mode="after")
    def _one_form(self) -> ScoreBody:
        pair = self.text_1 is not None, self.text_2 is not None
        if (self.input is not None) + (self.messages is not None) + any(pair) != 1 or any(pair) != all(pair):
            raise ValueError("give one of: input, messages, or text_1 and text_2")
        if self.text_1 and self.text_2 and len(self.text_1) not in (1, len(self.text_2)):
            raise ValueError(f"text_1 has {len(self.text_1)} texts, and text_2 has {len(self.text_2)}")
        return self

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """text_1 and text_2, one by one."""
        first, second = self.text_1 or [], self.text_2 or []
        return list(zip(first * len(second) if len(first) == 1 else first, second, strict=True))


class Document(Strict):
    """What may be found."""

    text: str


class RerankBody(Strict):
    """Documents to be put in the order of their scores for a query.

    Attributes:
        top_n: So many of the best; 0 for all.
        use_activation: Answer probabilities (sigmoid) and not what the head gives; the order is the same.
    """

    model: str | None = None
    query: str
    documents: Annotated[list[str | Document], Field(min_length=1, max_length=MAX_INPUTS)]
    top_n: Annotated[int, Field(ge=0)] = 0
    return_documents: bool = True
    use_activation: bool = True
    priority: Priority = 0
    cache_salt: Salt | None = None

    @property
    def texts(self) -> list[str]:
        """Of the documents."""
        return [each if isinstance(each, str) else each.text for each in self.documents]


def register(app: Flask, service: Service) -> None:
    """Add the routes."""

    @app.post("/v1/score")
    def score() -> Response:
        body = read_body(ScoreBody, strict=service.strict, refused={}, ignored=IGNORED)
        model = service.check_model(body.model)
        requests = [_request(body, ids) for ids in _prompts(service, body)]
        try:
            found = pooled(service, model, requests)
        except ClientGone:
            return abandoned()
        data = [
            {"index": index, "object": "score", "score": _plain(activated(each) if body.use_activation else each)}
            for index, each in enumerate(found)
        ]
        return jsonify(_envelope(model, "score") | {"object": "list", "data": data, "usage": usage(requests)})

    @app.post("/v1/rerank")
    def rerank() -> Response:
        body = read_body(RerankBody, strict=service.strict, refused={}, ignored=IGNORED)
        model = service.check_model(body.model)
        if service.engine.limits.num_scores > 1:
            raise UserError("this model gives several scores, and documents have one order: ask POST /v1/score")
        prompts = [_ids(service, (body.query, text), "documents") for text in body.texts]
        requests = [_request(body, ids) for ids in prompts]
        try:
            found = pooled(service, model, requests)
        except ClientGone:
            return abandoned()
        order = sorted(range(len(found)), key=lambda index: -float(found[index][0]))
        results = [
            {
                "index": index,
                "relevance_score": _plain(activated(found[index]) if body.use_activation else found[index]),
            }
            | ({"document": {"text": body.texts[index]}} if body.return_documents else {})
            for index in order[: body.top_n or None]
        ]
        return jsonify(_envelope(model, "rerank") | {"results": results, "usage": usage(requests)})


def activated(row: Logits) -> Logits:
    """Probabilities: sigmoid of one score, softmax of several, as transformers' text-classification has it."""
    wide = row.astype(np.float64)
    scores = np.exp(wide - wide.max()) if len(wide) > 1 else np.ones(1)
    found = scores / scores.sum() if len(wide) > 1 else 0.5 + 0.5 * np.tanh(wide / 2)
    return found.astype(np.float32)


def _prompts(service: Service, body: ScoreBody) -> list[list[int]]:
    if body.messages is not None:
        return [_ids(service, [turn.plain() for turn in each], "messages") for each in body.messages]
    if body.input is None:
        return [_ids(service, pair, "text_2") for pair in body.pairs]
    return [
        _ids(service, each, "input") if isinstance(each, str) else without_padding(each, service.pad)
        for each in body.input
    ]


def _ids(service: Service, given: str | tuple[str, str] | Sequence[dict[str, Any]], param: str) -> list[int]:
    texts = [given] if isinstance(given, str) else given
    whole = "".join(each if isinstance(each, str) else str(each.get("content")) for each in texts)
    service.check_length(whole, param)
    ids = score_ids(service.tokenizer, given, service.pad)
    if not ids:
        raise UserError(f"{param}: there are no tokens to score", param=param)
    return ids


def _request(body: ScoreBody | RerankBody, ids: Sequence[int]) -> Request:
    return Request(tuple(ids), max_tokens=0, priority=body.priority, cache_salt=body.cache_salt or "", pooling="score")


def _envelope(model: str, kind: str) -> dict[str, Any]:
    return {"id": f"{kind}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}


def _plain(row: Logits) -> float | list[float]:
    """One score as a number, several as a list."""
    values: list[float] = row.tolist()
    return values[0] if len(values) == 1 else values
