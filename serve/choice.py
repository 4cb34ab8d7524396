"""A sequence with what it takes to turn its logits into events, on the engine's thread."""

from __future__ import annotations

import time

from llmc.runtime import Logits
from llmc.serve.handle import Handle
from llmc.serve.pooling import Pooler
from llmc.serve.request import Request
from llmc.serve.sampler import Sampler, TokenLogprobs, logprobs
from llmc.serve.scheduler import Work
from llmc.serve.sequence import Sequence
from llmc.serve.stream import TextStream


class Choice(Sequence):
    """Choice `index` of a request, and its reader."""

    __slots__ = (
        "arrived", "begun", "draft", "ends", "handle", "last_token", "pooler", "position", "reported", "sampler",
        "text",
    )  # fmt: skip

    def __init__(
        self,
        sequence_id: int,
        request: Request,
        limit: int,
        index: int,
        *,
        handle: Handle,
        position: int,
        text: TextStream,
        ends: frozenset[int],
    ) -> None:
        """Begin choice `index` of a request, which is choice `position` of all that were submitted with it."""
        super().__init__(sequence_id, request, limit, index=index)
        self.handle = handle
        self.position = position
        self.ends = ends
        matcher = None if request.grammar is None else request.grammar.begin()
        self.sampler = Sampler(request.sampling, request.prompt, ends, index=index, matcher=matcher)
        self.text = text
        self.arrived = time.monotonic()
        self.last_token: float | None = None
        self.begun = False
        # Prompt tokens whose log-probabilities were reported; a preempted sequence computes them again.
        self.reported = 0
        # Tokens that are foretold to come next, and computed in this step to see whether they do.
        self.draft: tuple[int, ...] = ()
        self.pooler = None if request.pooling is None else Pooler(request.pooling)


def prompt_logprobs(item: Work[Choice], logits: Logits) -> tuple[TokenLogprobs, ...]:
    """Of the prompt tokens that the rows of this chunk foretell and that were not reported yet."""
    choice = item.sequence
    first = item.start + item.length - len(logits) + 1
    found = []
    for position in range(max(first, choice.reported + 1), min(first + len(logits), choice.num_prompt)):
        found.append(logprobs(logits[position - first], choice.tokens[position], choice.request.logprobs or 0))
        choice.reported = position
    return tuple(found)
