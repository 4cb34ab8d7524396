"""GET /: a page to chat with the model, and the two files that it needs.

They hold nothing secret and are given to anybody; what the page asks of the server wants the key, as always.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources

from flask import Flask, Response

from llmc.serve.service import Service

# path -> (file under serve/web, its type)
FILES = {
    "/": ("index.html", "text/html"),
    "/web/chat.css": ("chat.css", "text/css"),
    "/web/chat.js": ("chat.js", "text/javascript"),
}
# Nothing from elsewhere, and nobody may put the page into a frame of his own.
POLICY = "default-src 'self'; frame-ancestors 'none'; form-action 'none'; base-uri 'none'"


def register(app: Flask, _: Service) -> None:
    """Add the routes."""
    for path, (name, kind) in FILES.items():
        app.add_url_rule(path, f"page {name}", _page(_read(name), kind), methods=["GET"])


def _read(name: str) -> bytes:
    return (resources.files("llmc.serve") / "web" / name).read_bytes()


def _page(content: bytes, kind: str) -> Callable[[], Response]:
    def page() -> Response:
        response = Response(content, content_type=f"{kind}; charset=utf-8")
        response.headers["Content-Security-Policy"] = POLICY
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Cache-Control"] = "no-cache"
        return response

    return page
