"""A running server as a side of a comparison: it says log-probabilities of a prompt's tokens, and continues prompts.

Speaks OpenAI's older endpoint, `POST /v1/completions`: for log-probabilities with `echo` and no token to generate.
"""

from __future__ import annotations

import contextlib
import json
import os
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

from llmc.errors import ServingError, UserError
from llmc.evaluate.parity import TOP, Piece, Scores, Side

SECONDS = 300.0  # for one answer


def open_server(url: str) -> Side:
    """The first model of the server at `url`; the variable LLMC_API_KEY is its key, if it wants one.

    Raises:
        UserError: Nothing answers there, or it is no such server.
        ServingError: It answers with an error.
    """
    base, card = _first_model(url)
    model = card["id"]

    def score(piece: Piece) -> Scores:
        prompt = piece if isinstance(piece, str) else piece.tolist()
        body = {"model": model, "prompt": prompt, "max_tokens": 0, "echo": True, "logprobs": TOP, "temperature": 0}
        try:
            found = _ask(f"{base}/v1/completions", body)["choices"][0]["logprobs"]
            scores = Scores(found["tokens"], found["token_logprobs"][1:], found["top_logprobs"][1:])
        except (KeyError, IndexError, TypeError):
            raise ServingError(f"{base} does not give log-probabilities of a prompt (echo with logprobs)") from None
        if not isinstance(piece, str) and len(scores.words) != len(piece):
            raise ServingError(f"{base} was given {len(piece)} tokens and answered for {len(scores.words)}")
        return scores

    return Side(url, "server", close=lambda: None, max_length=card.get("max_model_len"), score=score)


def complete(url: str, prompt: str, max_tokens: int, stops: Sequence[str]) -> str:
    """What the first model of the server at `url` writes after a prompt, with temperature 0.

    Only the first four of `stops` are sent, which is OpenAI's limit: cut the rest yourself.

    Raises:
        UserError, ServingError: As of `open_server`.
    """
    base, card = _first_model(url)
    body = {"model": card["id"], "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stop": list(stops[:4])}
    try:
        return str(_ask(f"{base}/v1/completions", body)["choices"][0]["text"])
    except (KeyError, IndexError, TypeError):
        raise ServingError(f"{base} does not continue a prompt (POST /v1/completions)") from None


def _first_model(url: str) -> tuple[str, dict[str, Any]]:
    """The address that `/v1` stands behind, and what the server says of its first model."""
    base = url.rstrip("/").removesuffix("/v1")
    try:
        card = _ask(f"{base}/v1/models")["data"][0]
        return base, {**card, "id": card["id"]}
    except (KeyError, IndexError, TypeError):
        raise UserError(f"{base}/v1/models does not list a model: is it a server of llmc, or like OpenAI's?") from None


def _ask(url: str, body: dict[str, Any] | None = None) -> Any:
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("LLMC_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    asked = urllib.request.Request(url, data, headers)  # noqa: S310 - what begins with http is opened as a server
    try:
        with urllib.request.urlopen(asked, timeout=SECONDS) as response:  # noqa: S310
            return json.load(response)
    except urllib.error.HTTPError as error:
        text = error.read(2000).decode("utf-8", "replace")
        with contextlib.suppress(ValueError, KeyError, TypeError):
            text = json.loads(text)["error"]["message"]
        raise ServingError(f"{url} answers {error.code}: {text.strip()}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{url} does not answer ({error}): start a server with `llmc serve ENGINE`") from None
