"""The error tree. Every failure a user can meet is one of these; anything else is a bug in llmc.

    LlmcError                    exit  HTTP
    ├── UserError                  2    400   an argument, a configuration file or a request body is wrong
    │   ├── ConfigError            2    400   a field of a configuration or body (carries its path)
    │   ├── NotFoundError          2    404   a name that this process does not serve
    │   └── TooLargeError          2    413   a body over the limit
    ├── ArtifactError              4    500   a folder on disk is not what it should be
    │   ├── ManifestError          4    500   no manifest, another schema, a changed byte
    │   ├── CheckpointError        4    500   a missing, unknown, misshapen or unreadable tensor
    │   └── UnsupportedModelError  4    500   a family, or a value in a model's config, that llmc does not support
    ├── GateError                  3    500   the work is done and the result is not good enough
    ├── MissingDependencyError     5    500   an optional package is not installed
    └── ServingError               1    500   the running server
        ├── OverloadedError        1    429   the queue is full: come back later
        ├── DrainingError          1    503   the server is shutting down
        ├── LateError              1    504   a request took longer than this server allows
        └── EngineError            1    500   a step of the engine failed

Messages say what was met, where, and the command or setting that helps. Exit status 1 is any other failure,
130 an interrupt, as the shell has it.
"""

from __future__ import annotations

from typing import ClassVar


class LlmcError(Exception):
    """Base of every error that llmc raises on purpose. Its text is written for the user, whole."""

    exit_code: ClassVar[int] = 1
    http_status: ClassVar[int] = 500


class UserError(LlmcError):
    """Something the user gave is wrong.

    `param` names the field, as OpenAI's error object does.
    """

    exit_code = 2
    http_status = 400

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ConfigError(UserError):
    """A field of a configuration or of a request body is unknown, missing or out of range."""


class NotFoundError(UserError):
    """A route or a model name that this server does not have."""

    http_status = 404


class TooLargeError(UserError):
    """A request body over the server's limit."""

    http_status = 413


class ArtifactError(LlmcError):
    """A folder on disk is not what it should be."""

    exit_code = 4


class ManifestError(ArtifactError):
    """A manifest is missing, has another schema, or does not agree with the files beside it."""


class CheckpointError(ArtifactError):
    """A tensor is missing, unknown, misshapen or unreadable."""


class UnsupportedModelError(ArtifactError):
    """A model that llmc does not know, or a value in its config that llmc would otherwise ignore in silence."""


class GateError(LlmcError):
    """A check that the user asked for was run and is not met."""

    exit_code = 3


class MissingDependencyError(LlmcError):
    """An optional package is not installed."""

    exit_code = 5


class ServingError(LlmcError):
    """The running server cannot do what was asked, through no fault of the request."""


class OverloadedError(ServingError):
    """The queue is full."""

    http_status = 429


class DrainingError(ServingError):
    """The server is shutting down and takes no new requests."""

    http_status = 503


class LateError(ServingError):
    """A request was not finished within the time that the server gives to each."""

    http_status = 504


class EngineError(ServingError):
    """A step of the engine failed; the requests in it are lost, the server goes on."""
