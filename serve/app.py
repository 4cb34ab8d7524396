"""The Flask application: routes, the key, a number for every request, and errors that are always JSON.

Does not know: which server runs it, and how engines are opened.
"""

from __future__ import annotations

import hmac
import re
import secrets

from flask import Flask, Response, g, request

from llmc.serve.routes import (
    chat,
    completions,
    embeddings,
    errors,
    models,
    openapi,
    operations,
    paddle,
    page,
    responses,
    score,
    tokens,
)
from llmc.serve.routes.errors import AuthenticationError
from llmc.serve.service import Service

OPEN_ROUTES = frozenset({"/health", "/ready", *page.FILES})
# Of the unknown fields that were ignored, so many are named in the header.
NAMED = 10


def create_app(service: Service) -> Flask:
    """An application that serves `service` to any WSGI server."""
    app = Flask("llmc.serve", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = service.max_body
    app.json.sort_keys = False  # type: ignore[attr-defined]
    # A redirect would be an HTML page.
    app.url_map.merge_slashes = False
    errors.register(app)
    for module in (models, completions, chat, responses, embeddings, score, tokens, paddle, operations, openapi, page):
        module.register(app, service)

    @app.before_request
    def number() -> None:
        given = request.headers.get("X-Request-Id", "")
        g.request_id = given if re.fullmatch(r"[!-~]{1,200}", given) else f"req-{secrets.token_hex(12)}"

    @app.before_request
    def authenticate() -> None:
        preflight = request.method == "OPTIONS" and bool(service.allow_origins)
        if not service.api_keys or request.path in OPEN_ROUTES or preflight:
            return
        # Headers come as Latin-1 (PEP 3333), whatever was sent.
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        sent = given.strip().encode("latin-1", "replace")
        # A list, not a generator: that the first key fits must not show in the time it takes.
        fits = [hmac.compare_digest(sent, key.encode()) for key in service.api_keys]
        if scheme.lower() != "bearer" or not any(fits):
            raise AuthenticationError("this server wants an API key: send 'Authorization: Bearer KEY'")

    @app.after_request
    def finish(response: Response) -> Response:
        route = request.url_rule.rule if request.url_rule is not None else "other"
        service.answers[route, response.status_code] += 1
        response.headers["X-Request-Id"] = g.request_id
        if ignored := g.get("ignored"):
            names = [re.sub(r"[^\w.-]", "?", name[:60], flags=re.ASCII) for name in ignored[:NAMED]]
            response.headers["Warning"] = f'299 llmc "ignored unknown fields: {", ".join(names)}"'
        origin = request.headers.get("Origin")
        if origin is not None and (origin in service.allow_origins or "*" in service.allow_origins):
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Access-Control-Allow-Headers"] = "Authorization, Content-Type"
            response.headers["Access-Control-Allow-Methods"] = "GET, POST, OPTIONS"
            response.headers["Access-Control-Expose-Headers"] = "X-Request-Id, Warning, Retry-After"
            response.vary.add("Origin")
        return response

    return app
