"""POST /tokenize and /detokenize, with the fields and answers of vLLM's."""

from __future__ import annotations

from typing import Annotated, Any

from flask import Flask, Response, jsonify
from pydantic import Field, model_validator

from llmc.config import Strict
from llmc.prompt import chat_ids
from llmc.serve.request import TokenId
from llmc.serve.routes.bodies import Message
from llmc.serve.routes.transport import read_body
from llmc.serve.service import Service

MAX_TOKENS = 1 << 20


class TokenizeBody(Strict):
    """A text or a conversation.

    Attributes:
        add_special_tokens: What the tokenizer puts around a whole text; a conversation's template has its own.
        return_token_strs: Answer each token's text as well.
    """

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    tools: list[dict[str, Any]] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_of_two(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeBody(Strict):
    """Tokens to be put together."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(max_length=MAX_TOKENS)]


def register(app: Flask, service: Service) -> None:
    """Add the routes."""

    @app.post("/tokenize")
    def tokenize() -> Response:
        body = read_body(TokenizeBody, strict=service.strict, refused={}, ignored=())
        service.check_model(body.model)
        if body.messages is None:
            ids = service.tokenizer.encode(body.prompt or "", add_special_tokens=body.add_special_tokens)
        else:
            ids = chat_ids(
                service.tokenizer,
                [message.plain() for message in body.messages],
                tools=body.tools,
                add_generation_prompt=body.add_generation_prompt,
            )
        texts = [service.engine.vocabulary.text(each) for each in ids] if body.return_token_strs else None
        longest = service.engine.budget.longest
        return jsonify({"count": len(ids), "max_model_len": longest, "tokens": ids, "token_strs": texts})

    @app.post("/detokenize")
    def detokenize() -> Response:
        body = read_body(DetokenizeBody, strict=service.strict, refused={}, ignored=())
        service.check_model(body.model)
        service.check_tokens(body.tokens, "tokens")
        return jsonify({"prompt": service.tokenizer.decode(body.tokens, skip_special_tokens=False)})
