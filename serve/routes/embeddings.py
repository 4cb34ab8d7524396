"""POST /v1/embeddings: OpenAI's fields and answers, from the states of any decoder.

An embedding is what the head would read, of the last token or the mean of all (`llmc serve --pooling`), brought to
length one. What is shortened (`dimensions`) is brought to length one again.
"""

from __future__ import annotations

import base64
from typing import Annotated, Any, Literal

import numpy as np
from flask import Flask, Response, jsonify
from pydantic import BeforeValidator, Field

from llmc.config import Strict
from llmc.errors import UserError
from llmc.prompt import completion_ids
from llmc.runtime import Logits
from llmc.serve.request import Request
from llmc.serve.routes.bodies import IGNORED, Priority, Salt, list_of_prompts
from llmc.serve.routes.pooled import pooled, usage
from llmc.serve.routes.transport import ClientGone, abandoned, read_body
from llmc.serve.service import Service

MAX_INPUTS = 2048


class EmbeddingBody(Strict):
    """What the route takes.

    Attributes:
        dimensions: So many of the vector's first numbers, which is of use where the model was trained for it.
        encoding_format: base64 is of the numbers as little-endian float32.
    """

    model: str | None = None
    input: Annotated[
        list[str] | list[list[int]],
        BeforeValidator(list_of_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
        Field(min_length=1, max_length=MAX_INPUTS),
    ]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None
    priority: Priority = 0
    cache_salt: Salt | None = None


def register(app: Flask, service: Service) -> None:
    """Add the route."""

    @app.post("/v1/embeddings")
    def embeddings() -> Response:
        body = read_body(EmbeddingBody, strict=service.strict, refused={}, ignored=IGNORED)
        model = service.check_model(body.model)
        width = service.engine.limits.state_size
        if body.dimensions is not None and body.dimensions > width > 0:
            raise UserError(f"dimensions is {body.dimensions}, and this model has {width}", param="dimensions")
        requests = [_request(service, body, each) for each in body.input]
        try:
            vectors = pooled(service, model, requests)
        except ClientGone:
            return abandoned()
        data = [
            {"object": "embedding", "index": index, "embedding": _encode(body, vector)}
            for index, vector in enumerate(vectors)
        ]
        return jsonify({"object": "list", "data": data, "model": model, "usage": usage(requests)})


def _request(service: Service, body: EmbeddingBody, given: str | list[int]) -> Request:
    if isinstance(given, str):
        service.check_length(given, "input")
    ids = given if isinstance(given, list) else completion_ids(service.tokenizer, given)
    if not ids:
        raise UserError("the input has no tokens: it needs at least one", param="input")
    return Request(
        tuple(ids), max_tokens=0, priority=body.priority, cache_salt=body.cache_salt or "", pooling=service.pooling
    )


def _encode(body: EmbeddingBody, vector: Logits) -> Any:
    kept = vector[: body.dimensions]
    # Zeros have no direction, and stay.
    kept = kept / max(float(np.linalg.norm(kept)), float(np.finfo(np.float32).tiny))
    if body.encoding_format == "base64":
        return base64.b64encode(kept.astype("<f4").tobytes()).decode("ascii")
    return kept.tolist()
