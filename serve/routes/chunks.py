"""What the two OpenAI endpoints share: ids, usage, log-probabilities, and streamed chunks.

A chunk is written once a token and client, so it is not made by a JSON encoder: all but the text is prepared.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from flask import Response

from llmc.errors import LlmcError
from llmc.serve.handle import Event, Handle
from llmc.serve.routes import errors
from llmc.serve.routes.transport import stream
from llmc.serve.sampler import TokenLogprobs
from llmc.serve.service import Service
from llmc.serve.stream import Vocabulary

# JSON has no minus infinity; vLLM's stand-in.
LOWEST = -9999.0
quote = json.encoder.encode_basestring


@dataclass(frozen=True, slots=True)
class Envelope:
    """The fields around every answer to one request."""

    kind: str
    model: str
    prefix: str
    created: int = field(default_factory=lambda: int(time.time()))
    number: str = field(default_factory=lambda: secrets.token_hex(12))

    def whole(self, choices: list[dict[str, Any]], handle: Handle, kind: str | None = None) -> dict[str, Any]:
        """The answer in one piece."""
        return {
            "id": f"{self.prefix}-{self.number}",
            "object": kind or self.kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            "usage": usage(handle),
        }

    def opening(self) -> str:
        """A chunk up to its first choice's index."""
        return (
            f'data: {{"id":"{self.prefix}-{self.number}","object":"{self.kind}","created":{self.created},'
            f'"model":{quote(self.model)},"choices":[{{"index":'
        )


def usage(handle: Handle) -> dict[str, Any]:
    """Counts of tokens, as OpenAI names them."""
    return {
        "prompt_tokens": handle.prompt_tokens,
        "completion_tokens": handle.completion_tokens,
        "total_tokens": handle.prompt_tokens + handle.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": handle.cached_tokens},
    }


def sse(
    service: Service, handle: Handle, envelope: Envelope, encode: Callable[[list[Event]], bytes], include_usage: bool
) -> Response:
    """Answer with server-sent events: encoded chunks, the usage if wanted, and [DONE]."""

    def end() -> bytes:
        if not include_usage:
            return b"data: [DONE]\n\n"
        last = json.dumps(envelope.whole([], handle))
        return f"data: {last}\n\ndata: [DONE]\n\n".encode()

    def failed(error: LlmcError) -> bytes:
        return f"data: {json.dumps(errors.body(error))}\n\n".encode()

    return stream(
        service,
        handle,
        encode,
        mimetype="text/event-stream",
        keep_alive=b": keep-alive\n\n",
        failed=failed,
        end=end,
    )


def reason(event: Event) -> str:
    """The finish reason as JSON."""
    return "null" if event.finish_reason is None else f'"{event.finish_reason}"'


def chat_logprobs(vocabulary: Vocabulary, found: TokenLogprobs) -> dict[str, Any]:
    """One entry of a chat choice's `logprobs.content`."""
    top = [_chat_token(vocabulary, token, logprob) for token, logprob in found.top]
    return {**_chat_token(vocabulary, found.token, found.logprob), "top_logprobs": top}


def _chat_token(vocabulary: Vocabulary, token: int, logprob: float) -> dict[str, Any]:
    raw = vocabulary.raw(token)
    return {"token": vocabulary.text(token), "logprob": max(logprob, LOWEST), "bytes": list(raw)}


class TextLogprobs:
    """The older endpoint's four parallel lists, which count characters of the text so far."""

    def __init__(self, vocabulary: Vocabulary, offset: int = 0) -> None:
        self._vocabulary = vocabulary
        self._offset = offset

    def lists(self, found: list[TokenLogprobs | int]) -> dict[str, Any]:
        """The lists for some tokens; a bare number is a token that nothing foretold."""
        lists: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for each in found:
            known = each if isinstance(each, TokenLogprobs) else None
            text = self._vocabulary.text(each.token if isinstance(each, TokenLogprobs) else each)
            lists["tokens"].append(text)
            lists["token_logprobs"].append(None if known is None else max(known.logprob, LOWEST))
            lists["top_logprobs"].append(None if known is None else self._top(known))
            lists["text_offset"].append(self._offset)
            self._offset += len(text)
        return lists

    def _top(self, found: TokenLogprobs) -> dict[str, float]:
        pairs = [*found.top, (found.token, found.logprob)]
        return {self._vocabulary.text(token): max(logprob, LOWEST) for token, logprob in reversed(pairs)}
