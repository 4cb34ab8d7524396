"""Which sequence's keys and values lie in which slot of a KV cache, and what of them can be used again.

A cache is a row of slots, each as long as the longest sequence. A freed slot keeps what was computed in it, so that a
later prompt that begins alike computes only the rest: in place when nothing else in that slot is worth keeping, else
by copying the common part. A batch that decodes lies in the first slots side by side, because a runtime takes one
contiguous block of the cache.

Where a prefix sees itself whole (llmc/prefix.py), what was computed in it can be used again only as a whole, and for
the same prefix.

Knows tokens and slots. Does not know where the bytes are: it tells a `Storage` what to copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from llmc import prefix as prefixes
from llmc.errors import EngineError
from llmc.prefix import NO_PREFIX, Span
from llmc.runtime import Tokens
from llmc.spec import Prefix


class Storage(Protocol):
    """The bytes of the cache."""

    def copy(self, source: int, target: int, count: int) -> None:
        """Copy the first `count` tokens of a slot to another."""
        ...

    def exchange(self, a: int, b: int, count_a: int, count_b: int) -> None:
        """Let two slots change places, of which the first `count_a` and `count_b` tokens matter."""
        ...

    def drop(self, slot: int, keep: int) -> None:
        """Give a slot's memory back to the system, but for its first `keep` tokens."""
        ...


@dataclass(slots=True, eq=False)
class Slot:
    """One slot.

    Attributes:
        tokens: int64 [max_length]; the first `length` are those whose keys and values it holds.
        resident: The most tokens it held since its memory was given back.
        sequence_id: Who uses it, None when it only remembers.
        used: When it was last claimed or freed, in calls.
        salt: Of the sequence that it was last claimed for.
        span: The prefix that its first chunk had.
        steady: How many of its first tokens were computed in whole blocks.
    """

    index: int
    tokens: Tokens
    length: int = 0
    resident: int = 0
    sequence_id: int | None = None
    used: int = 0
    salt: str = ""
    span: Span = NO_PREFIX
    steady: int = 0

    def shared(self, tokens: Tokens, salt: str, span: Span = NO_PREFIX) -> int:
        """How many of the first tokens were computed alike; none for another salt or prefix.

        Args:
            span: The prefix of `tokens`.
        """
        if (salt, span) != (self.salt, self.span):
            return 0
        count = min(self.length, len(tokens))
        differ = np.flatnonzero(self.tokens[:count] != tokens[:count])
        same = int(differ[0]) if len(differ) else count
        return same if same >= span.length else 0


@dataclass
class SlotTable:
    """The slots of one cache.

    Attributes:
        capacity: Tokens that may be resident in all slots together; those of claimed slots are never dropped for it,
            because the scheduler keeps them within the limit.
        prefix: The model's, None where it has none.
        block: If given, only what was computed in chunks of so many tokens is reused, since others may be rounded
            differently.
    """

    storage: Storage
    count: int
    max_length: int
    capacity: int
    prefix: Prefix | None = None
    block: int | None = None
    slots: list[Slot] = field(init=False)
    _of_sequence: dict[int, Slot] = field(init=False, default_factory=dict)
    _clock: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.slots = [Slot(index, np.zeros(self.max_length, np.int64)) for index in range(self.count)]

    def __getitem__(self, sequence_id: int) -> Slot:
        try:
            return self._of_sequence[sequence_id]
        except KeyError:
            raise EngineError(f"sequence {sequence_id} was never claimed") from None

    def claim(self, sequence_id: int, tokens: Tokens, salt: str = "") -> int:
        """Give the sequence a slot; returns how many of its tokens are in it already, less than all of them."""
        if sequence_id in self._of_sequence:
            raise EngineError(f"sequence {sequence_id} is claimed already")
        free = [slot for slot in self.slots if slot.sequence_id is None]
        if not free:
            raise EngineError(f"all {self.count} slots of the KV cache are in use")
        span = prefixes.find(self.prefix, tokens)
        best = max(self.slots, key=lambda slot: self._reusable(slot, tokens, salt, span))
        reused = min(self._reusable(best, tokens, salt, span), len(tokens) - 1)
        reused -= reused % (self.block or 1)
        if best.sequence_id is None and 2 * reused >= best.length > 0:
            slot = best
        else:
            # An empty one, else the one that was not used for the longest time.
            slot = min(free, key=lambda each: (each.length > 0, each.used, each.index))
            if reused and slot is not best:
                self.storage.copy(best.index, slot.index, reused)
                slot.tokens[:reused] = tokens[:reused]
        slot.steady = min(best.steady, reused)
        slot.length = reused
        slot.resident = max(slot.resident, reused)
        slot.sequence_id = sequence_id
        slot.salt, slot.span = salt, span
        self._of_sequence[sequence_id] = slot
        self._touch(slot)
        return reused

    def _reusable(self, slot: Slot, tokens: Tokens, salt: str, span: Span) -> int:
        shared = slot.shared(tokens, salt, span)
        return shared if self.block is None else min(shared, slot.steady)

    def extend(self, sequence_id: int, start: int, tokens: Tokens) -> None:
        """Note that the tokens from `start` on are about to be computed."""
        slot, end = self[sequence_id], start + len(tokens)
        if not 0 <= start <= slot.length or end > self.max_length:
            raise EngineError(
                f"sequence {sequence_id}: tokens {start}..{end} do not continue the {slot.length} computed ones "
                f"within {self.max_length}"
            )
        if start == 0:
            # The claim may have named fewer tokens.
            slot.span = prefixes.find(self.prefix, tokens)
        slot.tokens[start:end] = tokens
        slot.steady = end if start == slot.steady and len(tokens) == self.block else min(slot.steady, start)
        slot.length = end
        slot.resident = max(slot.resident, end)

    def forget(self, sequence_id: int, length: int) -> None:
        """Note that only the first `length` tokens of a sequence can be trusted; unclaimed ids are ignored."""
        if (slot := self._of_sequence.get(sequence_id)) is not None:
            slot.length = min(slot.length, length)
            slot.steady = min(slot.steady, length)

    def free(self, sequence_id: int) -> None:
        slot = self._of_sequence.pop(sequence_id, None)
        if slot is not None:
            slot.sequence_id = None
            self._touch(slot)

    def line_up(self, sequence_ids: Sequence[int]) -> list[int]:
        """Bring sequences into the first slots, in any order.

        Returns:
            The sequences in the order of their slots, 0 to len(sequence_ids) - 1.
        """
        count = len(sequence_ids)
        wanted = {self[sequence_id].index for sequence_id in sequence_ids}
        holes = [index for index in range(count) if index not in wanted]
        strays = [index for index in wanted if index >= count]
        for hole, stray in zip(holes, sorted(strays), strict=True):
            a, b = self.slots[hole], self.slots[stray]
            self.storage.exchange(hole, stray, a.length, b.length)
            a.index, b.index = stray, hole
            self.slots[hole], self.slots[stray] = b, a
            a.resident, b.resident = max(a.length, b.resident), max(b.length, a.resident)
        return [slot.sequence_id for slot in self.slots[:count] if slot.sequence_id is not None]

    def trim(self) -> None:
        """Drop memory until the resident tokens fit the capacity.

        First what lies behind the tokens of claimed slots, left there by longer sequences before them; then what is
        only remembered, the oldest first.
        """
        total = sum(slot.resident for slot in self.slots)
        for slot in sorted(self.slots, key=lambda each: (each.sequence_id is None, each.used)):
            if total <= self.capacity:
                return
            keep = 0 if slot.sequence_id is None else slot.length
            if slot.resident > keep:
                self.storage.drop(slot.index, keep)
                total -= slot.resident - keep
                slot.length, slot.resident, slot.steady = min(slot.length, keep), keep, min(slot.steady, keep)

    def _touch(self, slot: Slot) -> None:
        self._clock += 1
        slot.used = self._clock
