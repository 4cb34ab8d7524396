"""What the engine says of itself and of what it could not do."""

from __future__ import annotations

from dataclasses import dataclass

from llmc.errors import DrainingError, EngineError, LlmcError, OverloadedError


@dataclass(frozen=True, slots=True)
class Health:
    """How the engine is.

    Attributes:
        ok: It can be expected to finish what it is given.
        reason: Why not.
        draining: It takes nothing new.
    """

    ok: bool
    reason: str
    draining: bool


def engine_error(error: Exception, what: str) -> LlmcError:
    """What the client is told: llmc's own words, or no more than the kind of anything else."""
    return EngineError(f"{what}: {error if isinstance(error, LlmcError) else type(error).__name__}")


def refusal(error: LlmcError) -> str:
    """The reason by which a request that was not taken in is counted."""
    kinds: dict[type[LlmcError], str] = {
        OverloadedError: "queue_full",
        DrainingError: "draining",
        EngineError: "engine",
    }
    return kinds.get(type(error), "invalid")
