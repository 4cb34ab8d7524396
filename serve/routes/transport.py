"""Between HTTP and the engine: bodies in, events out, and clients that go away.

A server notices a vanished client only when it writes, which it does not while a request is queued or a long prompt is
read. So the client's socket is looked at: after each step's events, and every PROBE_SECONDS without.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, TypeVar

import pydantic_core
from flask import Response, g, request
from pydantic import BaseModel, ValidationError
from werkzeug.exceptions import HTTPException

from llmc.config import parse
from llmc.errors import LateError, LlmcError, TooLargeError, UserError
from llmc.log import logger
from llmc.serve.handle import Event, Handle
from llmc.serve.routes.errors import MediaTypeError
from llmc.serve.service import Service

PROBE_SECONDS = 0.1
# A client that takes nothing for so long is given up.
WRITE_SECONDS = 30
# What the system may hold for a client that reads slowly; what is beyond waits in the engine's queue of events.
SEND_BUFFER = 128 << 10

Body = TypeVar("Body", bound=BaseModel)


class ClientGone(Exception):  # noqa: N818
    """Nobody waits for the answer any more."""


def read_body(
    model: type[Body], *, strict: bool, refused: Mapping[str, Collection[Any]], ignored: Collection[str]
) -> Body:
    """The request's JSON body. A null means the same as an absent field.

    Args:
        strict: Refuse unknown fields; else they are noted in `flask.g.ignored` for a header of the answer.
        refused: Fields of OpenAI's API that would change the answer and are not supported, each with the values that
            ask for nothing.
        ignored: Fields that change nothing in an answer.

    Raises:
        UserError: Saying what is wrong with it, and where.
    """
    values = {name: value for name, value in _read_object().items() if value is not None and name not in ignored}
    for name, nothing in refused.items():
        if name in values and values.pop(name) not in nothing:
            raise UserError(f"'{name}' is not supported by this server", param=name)
    if not strict:
        g.ignored = _drop_unknown(model, values)
    return parse(model, values, where="request body")


def _drop_unknown(model: type[BaseModel], values: dict[str, Any]) -> list[str]:
    """Take the fields that `model` does not know out of `values`, at any depth; returns their paths."""
    dropped: list[str] = []
    while True:
        try:
            model.model_validate(values)
        except ValidationError as error:
            complaints = error.errors(include_url=False, include_context=False, include_input=False)
            unknown = [item["loc"] for item in complaints if item["type"] == "extra_forbidden"]
            found = [".".join(map(str, path)) for path in unknown if _drop(values, path)]
            if found:
                dropped += found
                continue
        return dropped


def _drop(values: Any, path: tuple[int | str, ...]) -> bool:
    """Delete what pydantic's path leads to; its steps that name one of several possible types lead nowhere."""
    for part in path[:-1]:
        if part in (values if isinstance(values, dict) else range(len(values)) if isinstance(values, list) else ()):
            values = values[part]
    if not isinstance(values, dict) or path[-1] not in values:
        return False
    del values[path[-1]]
    return True


def _read_object() -> dict[str, Any]:
    """The request's JSON object, as it came."""
    if request.mimetype != "application/json" or request.content_encoding:
        met = request.content_encoding or request.mimetype or "nothing"
        raise MediaTypeError(f"the body must be sent as 'Content-Type: application/json', met {met}")
    try:
        text = request.get_data(cache=False)
    except HTTPException:
        raise
    except Exception as error:
        # Whatever the server raises for a connection that breaks, or for chunks that are none.
        raise UserError(f"the body did not arrive whole: {type(error).__name__}") from None
    limit = request.max_content_length
    if request.content_length is None and limit is not None and len(text) >= limit:
        # Of a body without a length werkzeug reads as much as it may, and says nothing of the rest.
        raise TooLargeError(f"the body is larger than this server takes ({limit} bytes)")
    try:
        values = pydantic_core.from_json(text, allow_inf_nan=False)
    except ValueError as error:
        raise UserError(f"the body is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"the body must be a JSON object, not {_json_type(values)}")
    return values


def _json_type(value: object) -> str:
    return {list: "an array", str: "a string", bool: "a boolean"}.get(type(value), "a number")


def client_gone() -> Callable[[], bool]:
    """A function that says whether this request's client has closed its connection.

    A client that shuts down only its sending half looks the same. Servers that give no way to tell never say so.
    """
    sock = request.environ.get("gunicorn.socket")
    if isinstance(sock, socket.socket):
        return lambda: _closed(sock)
    probe: Callable[[], bool] | None = request.environ.get("waitress.client_disconnected")
    return probe or (lambda: False)


def _closed(sock: socket.socket) -> bool:
    try:
        return sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def follow(
    service: Service,
    handle: Handle,
    gone: Callable[[], bool],
    *,
    keep_alive: float = float("inf"),
    began: float | None = None,
) -> Iterator[list[Event]]:
    """The events of a handle, as many at a time as there are; gives it up when the client goes away.

    Args:
        keep_alive: Seconds.
        began: When the request came, by time.monotonic(); now, if not given.

    Yields:
        Events, or nothing when a keep-alive is due. The last is an error when its time is over, which is looked at
        here and not in the engine, so that it ends even while a step does not come back.

    Raises:
        ClientGone: The client closed its connection.
    """
    quiet_since = time.monotonic()
    deadline = (began or quiet_since) + service.request_timeout
    try:
        while not handle.done:
            events = handle.take(PROBE_SECONDS)
            if gone():
                raise ClientGone
            now = time.monotonic()
            if events or now - quiet_since >= keep_alive:
                quiet_since = now
                yield events
            if now >= deadline and not handle.done:
                late = LateError(f"not finished within the {service.request_timeout:g} seconds that a request may take")
                yield [Event(0, "", 0, "error", error=late)]
                return
    finally:
        if not handle.done:
            handle.cancel()


def wait(service: Service, handle: Handle, gone: Callable[[], bool], *, began: float | None = None) -> Iterator[Event]:
    """Every event of a request that is answered in one piece; see `follow`.

    Raises:
        LlmcError: The request failed.
        ClientGone: See `follow`.
    """
    for events in follow(service, handle, gone, began=began):
        for event in events:
            if event.error is not None:
                raise event.error
            yield event


def stream(
    service: Service,
    handle: Handle,
    encode: Callable[[list[Event]], bytes],
    *,
    mimetype: str,
    keep_alive: bytes,
    failed: Callable[[LlmcError], bytes],
    end: Callable[[], bytes],
) -> Response:
    """A response that is written while the engine works.

    Args:
        encode: Some events as bytes.
        keep_alive: Sent when there was nothing for long.
        failed: What a client is told when the engine fails; the stream ends with it.
        end: The last bytes.
    """
    gone = client_gone()
    _limit_writes()

    def pieces() -> Iterator[bytes]:
        with contextlib.suppress(ClientGone):
            for events in follow(service, handle, gone, keep_alive=service.keep_alive):
                error = next((event.error for event in events if event.error is not None), None)
                if error is not None:
                    handle.cancel()
                    yield encode([event for event in events if event.error is None]) + failed(error)
                    return
                if piece := encode(events) if events else keep_alive:
                    yield piece
            yield end()

    response = Response(pieces(), mimetype=mimetype)
    response.headers["Cache-Control"] = "no-cache"
    response.headers["X-Accel-Buffering"] = "no"
    # A generator that was never started is not closed.
    response.call_on_close(handle.cancel)
    return response


def _limit_writes() -> None:
    sock = request.environ.get("gunicorn.socket")
    if isinstance(sock, socket.socket):
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", WRITE_SECONDS, 0))


def abandoned() -> Response:
    """The answer to nobody: the status is nginx's, for its log."""
    logger.info("%s: the client went away", request.path)
    return Response(status=499)
