"""Every error as OpenAI's JSON object, with the status that its clients understand."""

from __future__ import annotations

import json
from typing import Any, ClassVar

from flask import Flask, Response, g, request
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

from llmc.errors import DrainingError, LateError, LlmcError, NotFoundError, OverloadedError, UserError
from llmc.log import logger
from llmc.serve.scheduler import ContextLengthError
from llmc.serve.service import DRAIN_RETRY_SECONDS, RETRY_SECONDS


class AuthenticationError(UserError):
    """No API key, or a wrong one."""

    http_status: ClassVar[int] = 401


class MediaTypeError(UserError):
    """A body that is not JSON by its own words."""

    http_status: ClassVar[int] = 415


CODES: dict[type[LlmcError], str] = {
    AuthenticationError: "invalid_api_key",
    NotFoundError: "model_not_found",
    ContextLengthError: "context_length_exceeded",
    LateError: "timeout",
    OverloadedError: "rate_limit_exceeded",
    DrainingError: "shutting_down",
}
HEADERS: dict[type[LlmcError], dict[str, str]] = {
    AuthenticationError: {"WWW-Authenticate": "Bearer"},
    OverloadedError: {"Retry-After": str(RETRY_SECONDS)},
    DrainingError: {"Retry-After": str(DRAIN_RETRY_SECONDS)},
}


def body(error: LlmcError) -> dict[str, Any]:
    """`{"error": {...}}` for one of llmc's errors."""
    code = CODES.get(type(error))
    return _body(str(error), error.http_status, getattr(error, "param", None), code)


def _body(message: str, status: int, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def plain(message: str, status: int) -> bytes:
    """The same for what never reached the application."""
    return json.dumps(_body(message, status)).encode() + b"\n"


def _response(content: dict[str, Any], status: int, headers: dict[str, str] | None = None) -> Response:
    # In the seed suite's own route its clients find their two fields beside.
    if request.path == "/api/chat":
        content = {**content, "error_code": 1, "error_msg": content["error"]["message"]}
    return Response(json.dumps(content) + "\n", status, headers, mimetype="application/json")


def register(app: Flask) -> None:
    """Answer all errors of the application."""

    @app.errorhandler(LlmcError)
    def known(error: LlmcError) -> Response:
        return _response(body(error), error.http_status, HEADERS.get(type(error)))

    @app.errorhandler(HTTPException)
    def http(error: HTTPException) -> Response:
        status = error.code or 500
        message = {
            404: f"there is no {request.method} {request.path[:200]} here: see /v1/models and the manual",
            405: f"{request.path[:200]} does not take {request.method}",
        }.get(status, error.description or error.name)
        if isinstance(error, RequestEntityTooLarge):
            message = f"the body is larger than this server takes ({app.config['MAX_CONTENT_LENGTH']} bytes)"
        allow = error.get_response().headers.get("Allow")
        return _response(_body(message, status), status, {"Allow": allow} if allow else None)

    @app.errorhandler(Exception)
    def unknown(error: Exception) -> Response:
        logger.error("%s %s failed (%s)", request.method, request.path, g.get("request_id"), exc_info=error)
        return _response(_body("the server failed on this request; its log says more", 500), 500)
