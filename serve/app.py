"""The Flask application: routes, the key, and errors that are always JSON.

Does not know: which server runs it, and how engines are opened.
"""

from __future__ import annotations

import hmac

from flask import Flask, Response, request

from llmc.serve.routes import chat, completions, errors, models, operations, paddle
from llmc.serve.routes.errors import AuthenticationError
from llmc.serve.service import Service

OPEN_ROUTES = frozenset({"/health", "/ready"})


def create_app(service: Service) -> Flask:
    """An application that serves `service` to any WSGI server."""
    app = Flask("llmc.serve", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = service.max_body
    app.json.sort_keys = False  # type: ignore[attr-defined]
    # A redirect would be an HTML page.
    app.url_map.merge_slashes = False
    errors.register(app)
    for module in (models, completions, chat, paddle, operations):
        module.register(app, service)

    @app.before_request
    def authenticate() -> None:
        preflight = request.method == "OPTIONS" and bool(service.allow_origins)
        if service.api_key is None or request.path in OPEN_ROUTES or preflight:
            return
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        wanted = service.api_key.encode()
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), wanted):
            raise AuthenticationError("this server wants an API key: send 'Authorization: Bearer KEY'")

    @app.after_request
    def finish(response: Response) -> Response:
        route = request.url_rule.rule if request.url_rule is not None else "other"
        service.answers[route, response.status_code] += 1
        origin = request.headers.get("Origin")
        if origin is not None and (origin in service.allow_origins or "*" in service.allow_origins):
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Access-Control-Allow-Headers"] = "Authorization, Content-Type"
            response.headers["Access-Control-Allow-Methods"] = "GET, POST, OPTIONS"
            response.vary.add("Origin")
        return response

    return app
