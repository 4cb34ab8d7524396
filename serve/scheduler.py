"""Which tokens of which sequences are computed in the next step.

Every step has one budget of tokens. A sequence's computed tokens chase its tokens: a prompt's chunk is many tokens, a
decoding sequence's is one, and nothing else tells the two apart. In this order the budget is spent on

    1. running sequences that lack one token: they are decoding, and their readers are waiting for the next one,
    2. running sequences that lack more: prompts cut into chunks,
    3. waiting sequences, by priority and then first come first served: nobody overtakes the first in the queue.

Of some models a prompt cannot be cut. Such a one waits for a step with room for it, or with no other prompt in it: then
it may exceed the budget.

The cache is never asked to hold more than it can. When the running sequences outgrow it, the last in that order gives
up its place and goes back into the queue with its tokens, to be computed again: the first always goes on, so every
sequence ends, unless more urgent ones never cease to come.

Knows: counts of tokens. Does not know: tokens' values, models, text, threads or time.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, TypeVar

from llmc.errors import OverloadedError, UserError
from llmc.serve.request import FinishReason
from llmc.serve.sequence import Sequence, State

# A newcomer must leave each sequence room for this many more tokens, or it would be preempted at once.
HEADROOM = 16

S = TypeVar("S", bound=Sequence)
Claimed = TypeVar("Claimed", bound=Sequence, contravariant=True)


class ContextLengthError(UserError):
    """A request that is longer than any sequence may be."""


class Work(NamedTuple, Generic[S]):
    """Tokens `start` to `start + length` of a sequence are to be computed; of the last `logits`, the logits too."""

    sequence: S
    start: int
    length: int
    logits: int


class Cache(Protocol[Claimed]):
    """What the scheduler asks of the runner's cache."""

    def claim(self, sequence: Claimed) -> int:
        """Make room for a sequence; returns how many of its first tokens are there already, less than all."""
        ...

    def free(self, sequence: Claimed) -> None:
        """Give its room back."""
        ...


@dataclass(frozen=True, slots=True)
class Budget:
    """What may not be exceeded.

    Attributes:
        max_sequences: Sequences that run at a time.
        max_length: Tokens of one sequence.
        cache_tokens: Tokens of all running sequences together.
        max_step_tokens: Tokens computed in one step; at least `max_sequences`, so that all can decode at once. Only a
            single prompt that cannot be cut may exceed it.
        max_queue: Sequences in the queue, when the batch is full.
        max_queued_tokens: Tokens of all sequences in the queue, None for any number. An empty queue takes whatever
            fits the model.
        block: If given, how a sequence is computed does not depend on the others: its prompt in chunks that end at
            multiples of `block`, and what follows one by one, also when it is computed again. A runtime may round
            differently for chunks of other lengths (llmc/serve/invariance.py).
    """

    max_sequences: int
    max_length: int
    cache_tokens: int
    max_step_tokens: int
    max_queue: int
    max_queued_tokens: int | None = None
    block: int | None = None

    def __post_init__(self) -> None:
        if self.max_step_tokens < self.max_sequences:
            raise UserError(
                f"max_step_tokens ({self.max_step_tokens}) must be at least max_sequences ({self.max_sequences}): "
                "every running sequence gets a token in every step",
                param="max_step_tokens",
            )
        if self.max_step_tokens < self.max_sequences - 1 + self.least:
            raise UserError(
                f"max_step_tokens ({self.max_step_tokens}) must be at least {self.max_sequences - 1 + self.least}, so "
                f"that a prompt's chunk fits beside {self.max_sequences - 1} other sequences",
                param="max_step_tokens",
            )

    @property
    def least(self) -> int:
        """Tokens of a step that let any prompt go on."""
        return self.block or 1

    @property
    def longest(self) -> int:
        """Tokens that one sequence alone may have."""
        return min(self.max_length, self.cache_tokens)


class Scheduler(Generic[S]):
    """The queue and the running sequences.

    Attributes:
        waiting: In the order of service.
        running: In the order of service.
        preemptions: How often a sequence gave up its place, so far.
    """

    def __init__(self, budget: Budget, cache: Cache[S]) -> None:
        self.budget = budget
        self.waiting: deque[S] = deque()
        self.running: list[S] = []
        self.preemptions = 0
        self._cache = cache

    @property
    def held_tokens(self) -> int:
        """Tokens that running sequences have in the cache, or will have after the next step."""
        return sum(len(sequence.tokens) for sequence in self.running)

    @property
    def waiting_tokens(self) -> int:
        """Tokens of all sequences in the queue."""
        return sum(len(sequence.tokens) for sequence in self.waiting)

    def room(self, work: Iterable[Work[S]]) -> int:
        """Tokens that could be computed in the step beside `work`, and be kept in the cache for that time."""
        planned = sum(item.length for item in work)
        return min(self.budget.max_step_tokens - planned, self.budget.cache_tokens - self.held_tokens)

    @property
    def adapters(self) -> tuple[set[str], set[str]]:
        """Low-rank adapters of the running sequences, and of the waiting."""
        running, waiting = ({each.request.adapter for each in some} - {""} for some in (self.running, self.waiting))
        return running, waiting

    def limit(self, prompt_tokens: int, max_tokens: int | None) -> int:
        """The length at which a sequence ends.

        Raises:
            UserError: It could never fit; the message names the limit.
        """
        longest = self.budget.longest
        if prompt_tokens == 0:
            raise UserError("the prompt has no tokens: it needs at least one", param="prompt")
        if prompt_tokens + (max_tokens if max_tokens is not None else 1) > longest:
            asked = f" and max_tokens is {max_tokens}" if max_tokens is not None else ""
            raise ContextLengthError(
                f"This model's maximum context length is {longest} tokens, prompt and output together, but the prompt "
                f"has {prompt_tokens}{asked}: shorten the prompt or ask for fewer tokens",
                param="prompt" if prompt_tokens >= longest or max_tokens is None else "max_tokens",
            )
        return longest if max_tokens is None else prompt_tokens + max_tokens

    def add(self, sequences: Iterable[S]) -> None:
        """Queue new sequences, all or none of them. Their ids are larger than any before.

        Raises:
            UserError: There are more than the queue could ever hold.
            OverloadedError: The queue is full.
        """
        new = list(sequences)
        room = self.budget.max_queue + self.budget.max_sequences
        if len(new) > room:
            raise UserError(f"one request may ask for {room} sequences on this server, not {len(new)}", param="n")
        # A burst on an idle server waits only for the next step, so places in the batch count as well.
        if (taken := len(self.waiting) + len(self.running)) + len(new) > room:
            raise OverloadedError(f"the queue is full ({taken} of {room} sequences): try again later")
        most, queued = self.budget.max_queued_tokens, self.waiting_tokens
        if most is not None and queued and queued + sum(len(each.tokens) for each in new) > most:
            raise OverloadedError(f"the queue is full ({queued} of {most} tokens): try again later")
        for sequence in new:
            insort(self.waiting, sequence, key=_rank)

    def finish(self, sequence: S, reason: FinishReason) -> None:
        """End a sequence, wherever it is; nothing happens to one that has ended."""
        if sequence.state is State.RUNNING:
            self.running.remove(sequence)
            self._cache.free(sequence)
        elif sequence.state is State.WAITING:
            self.waiting.remove(sequence)
        else:
            return
        sequence.state = State.FINISHED
        sequence.finish_reason = reason

    def schedule(self) -> list[Work[S]]:
        """The work of the next step; empty when nothing waits or runs.

        The caller computes it and raises `computed` by each `length`, or finishes the sequences if that failed.
        """
        while self.held_tokens > self.budget.cache_tokens:
            self._preempt(self.running[-1])
        work: list[Work[S]] = []
        prompts: list[S] = []
        for sequence in self.running:
            if self._one_by_one(sequence):
                work.append(self._next_work(sequence, 1))
            else:
                prompts.append(sequence)
        decoding, left = len(work), self.budget.max_step_tokens - len(work)
        for sequence in prompts:
            if left >= self.budget.least:
                work.append(self._next_work(sequence, left))
                left -= work[-1].length
        while left >= self.budget.least and self.waiting and self._fits(self.waiting[0]):
            if self.waiting[0].uncut > left and len(work) > decoding:
                break
            work.append(self._next_work(self._admit(), left))
            left -= work[-1].length
        return work

    def _one_by_one(self, sequence: S) -> bool:
        """It is decoding; a deterministic one does so again after it gave up its place."""
        missing = len(sequence.tokens) - sequence.computed
        return missing == 1 or (self.budget.block is not None and not sequence.prefilling)

    def _next_work(self, sequence: S, most: int) -> Work[S]:
        missing = len(sequence.tokens) - sequence.computed
        uncut = sequence.uncut - sequence.computed
        count = min(missing, max(most, uncut))
        if (block := self.budget.block) is not None and sequence.prefilling:
            count = min(sequence.num_prompt - sequence.computed, max(uncut, block - sequence.computed % block))
        if sequence.request.every_row and sequence.prefilling:
            return Work(sequence, sequence.computed, count, count)
        return Work(sequence, sequence.computed, count, int(count == missing))

    def _fits(self, sequence: S) -> bool:
        """Whether the first in the queue may run now."""
        if not self.running:
            return True
        if len(self.running) >= self.budget.max_sequences:
            return False
        # A sibling's prompt is the same: once it is computed, it is copied instead.
        if any(other.request is sequence.request and other.prefilling for other in self.running):
            return False
        after = [*self.running, sequence]
        growth = sum(min(HEADROOM, each.limit - len(each.tokens)) for each in after)
        return self.held_tokens + len(sequence.tokens) + growth <= self.budget.cache_tokens

    def _admit(self) -> S:
        # Should the claim fail, the sequence still waits.
        sequence = self.waiting[0]
        sequence.computed = self._cache.claim(sequence)
        self.waiting.popleft()
        sequence.state = State.RUNNING
        insort(self.running, sequence, key=_rank)
        return sequence

    def _preempt(self, sequence: S) -> None:
        self.running.remove(sequence)
        self._cache.free(sequence)
        sequence.computed = 0
        sequence.state = State.WAITING
        insort(self.waiting, sequence, key=_rank)
        self.preemptions += 1


def _rank(sequence: Sequence) -> tuple[int, int]:
    return sequence.rank
