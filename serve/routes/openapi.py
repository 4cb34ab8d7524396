"""GET /openapi.json: the routes, with bodies described by the models that check them."""

from __future__ import annotations

from typing import Any

from flask import Flask, Response, jsonify
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

import llmc
from llmc.serve.routes.bodies import ChatBody, CompletionBody
from llmc.serve.routes.embeddings import EmbeddingBody
from llmc.serve.routes.paddle import PaddleBody
from llmc.serve.routes.responses import ResponsesBody
from llmc.serve.routes.score import RerankBody, ScoreBody
from llmc.serve.routes.tokens import DetokenizeBody, TokenizeBody
from llmc.serve.service import Service

# path -> (what it does, the model of its body); the rest take GET alone.
POSTS: dict[str, tuple[str, type[BaseModel]]] = {
    "/v1/chat/completions": ("Answer a conversation.", ChatBody),
    "/v1/completions": ("Continue a text.", CompletionBody),
    "/v1/responses": ("Answer a conversation, in the newer form.", ResponsesBody),
    "/v1/embeddings": ("Texts as vectors.", EmbeddingBody),
    "/v1/score": ("What a scoring head says of texts.", ScoreBody),
    "/v1/rerank": ("Documents by their scores.", RerankBody),
    "/tokenize": ("Text to tokens.", TokenizeBody),
    "/detokenize": ("Tokens to text.", DetokenizeBody),
    "/api/chat": ("The chat of PaddleNLP's Flask server.", PaddleBody),
}
GETS: dict[str, str] = {
    "/": "A page to chat with.",
    "/v1/models": "What is served.",
    "/v1/models/{name}": "One of them.",
    "/health": "503 when a restart would help.",
    "/ready": "503 when no new requests should come.",
    "/metrics": "Prometheus.",
    "/openapi.json": "This document.",
}
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
ERRORS = {
    "4XX": "The request is wrong, or the queue is full (429).",
    "5XX": "The server failed, or is shutting down (503).",
}


def register(app: Flask, service: Service) -> None:
    """Add the route."""
    found = document(bool(service.api_keys))

    @app.get("/openapi.json")
    def openapi() -> Response:
        return jsonify(found)


def document(key: bool) -> dict[str, Any]:
    """The description of the whole server.

    Args:
        key: Whether an API key is wanted.
    """
    bodies = [model for _, model in POSTS.values()]
    _, schemas = models_json_schema(
        [(model, "validation") for model in bodies], ref_template="#/components/schemas/{model}"
    )
    paths = {path: {"get": _get(path, text)} for path, text in GETS.items()}
    paths |= {path: {"post": _post(text, model)} for path, (text, model) in POSTS.items()}
    components: dict[str, Any] = {"schemas": {**schemas.get("$defs", {}), "Error": ERROR}}
    if key:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "llmc", "version": llmc.__version__},
        "paths": paths,
        "components": components,
        **({"security": [{"key": []}]} if key else {}),
    }


def _answers(good: str) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    bad = {status: {"description": text, "content": content} for status, text in ERRORS.items()}
    return {"200": {"description": good}, **bad}


def _get(path: str, text: str) -> dict[str, Any]:
    found: dict[str, Any] = {"summary": text, "responses": _answers(text)}
    if path in ("/health", "/ready"):
        found |= {"security": [], "responses": {"200": {"description": "Yes."}, "503": {"description": "No."}}}
    if "{name}" in path:
        found["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}]
    return found


def _post(text: str, model: type[BaseModel]) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    body = {"required": True, "content": {"application/json": {"schema": schema}}}
    return {"summary": text, "requestBody": body, "responses": _answers("The answer.")}
