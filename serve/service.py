"""What the routes share: the engine, the model's name, and the settings of this server."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from llmc.errors import NotFoundError, UserError
from llmc.serve.engine import Engine
from llmc.serve.grammar import Constraint, Grammar
from llmc.serve.handle import Handle
from llmc.serve.request import Request
from llmc.serve.scheduler import ContextLengthError
from llmc.tokenizer import Tokenizer

RETRY_SECONDS = 1
DRAIN_RETRY_SECONDS = 10


@dataclass(frozen=True)
class Service:
    """One served model.

    Attributes:
        model: The name by which clients ask for it.
        adapters: Names of the low-rank adapters that are served beside it, as models of their own.
        created: When it was loaded, seconds since 1970.
        api_keys: If given, all routes but /health, /ready and the chat page want one of them.
        allow_origins: Origins of web pages whose scripts may ask this server; none by default.
        max_body: Bytes of a request's body.
        request_timeout: Seconds from a request's arrival to its end; what takes longer is given up.
        keep_alive: Seconds of silence in a stream after which a comment is sent.
        metrics_prefix: Of the names of /metrics, in front of a colon.
        pad: Tokens like this at the end of a text are not scored (llmc/spec.py, Score).
        pooling: What of the states of a text's tokens is its embedding.
        strict: Refuse a body with unknown fields; else they are ignored, and named in a header of the answer.
        answers: HTTP answers so far by (route, status), for /metrics.
    """

    engine: Engine
    model: str
    created: int
    api_keys: tuple[str, ...] = ()
    allow_origins: tuple[str, ...] = ()
    max_body: int = 4 << 20
    request_timeout: float = float("inf")
    keep_alive: float = 15.0
    metrics_prefix: str = "llmc"
    strict: bool = False
    adapters: tuple[str, ...] = ()
    pad: int | None = None
    pooling: Literal["mean", "last"] = "last"
    answers: Counter[tuple[str, int]] = field(default_factory=Counter)

    @property
    def tokenizer(self) -> Tokenizer:
        return self.engine.tokenizer

    def grammar(self, constraints: Sequence[Constraint]) -> Grammar | None:
        """The form that an output must have, ready to be followed; see Grammars.compile for what is raised."""
        return self.engine.grammars.compile(constraints[0]) if constraints else None

    def check_length(self, text: str, param: str) -> None:
        """Refuse what could not fit whatever its tokens are, before time is spent on tokenizing it.

        Raises:
            ContextLengthError: With the limit.
        """
        longest = self.engine.budget.longest
        most = longest * self.engine.vocabulary.longest_piece
        if len(text) > most:
            raise ContextLengthError(
                f"This model's maximum context length is {longest} tokens, and {len(text)} characters cannot be fewer: "
                "shorten the prompt",
                param=param,
            )

    def check_tokens(self, ids: Sequence[int], param: str) -> None:
        """Raise UserError unless the model has all these tokens."""
        vocab = self.engine.limits.vocab_size
        if (wrong := next((each for each in ids if not 0 <= each < vocab), None)) is not None:
            raise UserError(f"{param}: there is no token {wrong} in a vocabulary of {vocab}", param=param)

    def submit(self, model: str | None, *requests: Request) -> Handle:
        """Queue requests for a model that was checked; see Engine.submit."""
        adapter = model if model in self.adapters else ""
        return self.engine.submit(*(replace(request, adapter=adapter) for request in requests))

    def check_model(self, name: str | None) -> str:
        """The name of the served model that is meant: the first where none is given; raises NotFoundError."""
        if name is None or name in (self.model, *self.adapters):
            return name or self.model
        met = name if len(name) <= 80 else name[:77] + "..."
        known = ", ".join(f"'{each}'" for each in (self.model, *self.adapters))
        raise NotFoundError(f"the model '{met}' is not served here: this server has {known}", param="model")
