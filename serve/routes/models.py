"""GET /v1/models and /v1/models/NAME."""

from __future__ import annotations

from typing import Any

from flask import Flask, Response, jsonify

from llmc.serve.service import Service


def register(app: Flask, service: Service) -> None:
    """Add the routes."""
    card: dict[str, Any] = {
        "id": service.model,
        "object": "model",
        "created": service.created,
        "owned_by": "llmc",
        # vLLM's name for the longest context.
        "max_model_len": service.engine.budget.longest,
    }
    cards = [card, *(card | {"id": name, "parent": service.model} for name in service.adapters)]

    @app.get("/v1/models")
    def models() -> Response:
        return jsonify({"object": "list", "data": cards})

    @app.get("/v1/models/<path:name>")
    def model(name: str) -> Response:
        found = service.check_model(name)
        return jsonify(next(each for each in cards if each["id"] == found))
