"""One text that is being generated: its tokens, and how many of them the runner has computed.

waiting ──► running ──► finished
   ▲           │
   └─preempted─┘        computed falls back to 0, the tokens stay
"""

from __future__ import annotations

from enum import Enum

from llmc.serve.request import FinishReason, Request


class State(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """Choice `index` of a request.

    Attributes:
        id: Grows with arrival.
        tokens: The prompt and what was generated.
        computed: How many of them are in the runner's cache; it chases `len(tokens)`.
        limit: `len(tokens)` may not grow beyond this.
        uncut: So many of its first tokens are computed in one step, or were already.
        finish_reason: None until it is finished.
    """

    __slots__ = (
        "computed", "finish_reason", "id", "index", "limit", "num_prompt", "request", "state", "tokens", "uncut"
    )  # fmt: skip

    def __init__(self, sequence_id: int, request: Request, limit: int, *, index: int = 0) -> None:
        self.id = sequence_id
        self.request = request
        self.index = index
        self.tokens = list(request.prompt)
        self.num_prompt = len(self.tokens)
        self.limit = limit
        self.uncut = 0
        self.computed = 0
        self.state = State.WAITING
        self.finish_reason: FinishReason | None = None

    @property
    def rank(self) -> tuple[int, int]:
        """The order of service: by priority, then by arrival."""
        return self.request.priority, self.id

    @property
    def num_output(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.num_prompt

    @property
    def prefilling(self) -> bool:
        """Some of the prompt is not computed yet."""
        return self.computed < self.num_prompt

    def append(self, token: int, ends: frozenset[int]) -> FinishReason | None:
        """Add a generated token.

        Args:
            ends: Tokens that end this sequence.

        Returns:
            Why it should finish now, None if it should not.
        """
        self.tokens.append(token)
        if token in ends and self.num_output > self.request.sampling.min_tokens:
            return "stop"
        return "length" if len(self.tokens) >= self.limit else None
