"""The slot table against a storage that holds the tokens themselves: whatever happens, a slot holds what it says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from llmc.errors import EngineError
from llmc.prefix import find
from llmc.serve.runners.slots import SlotTable
from llmc.spec import Prefix

SLOTS, LENGTH, CAPACITY = 4, 24, 48


class Memory:
    """A cache whose "keys" are the tokens, -1 where nothing is."""

    def __init__(self) -> None:
        self.cells = np.full((SLOTS, LENGTH), -1)

    def copy(self, source: int, target: int, count: int) -> None:
        self.cells[target, :count] = self.cells[source, :count]

    def exchange(self, a: int, b: int, count_a: int, count_b: int) -> None:
        kept = self.cells[a, :count_a].copy()
        self.cells[a, :count_b] = self.cells[b, :count_b]
        self.cells[b, :count_a] = kept

    def drop(self, slot: int, keep: int) -> None:
        self.cells[slot, keep:] = -1


# Few different tokens, so that prompts often begin alike.
prompts = st.lists(st.integers(0, 1), min_size=1, max_size=LENGTH).map(lambda tokens: np.array(tokens, np.int64))


class Slots(RuleBasedStateMachine):
    sequences: Bundle[int] = Bundle("sequences")

    def __init__(self) -> None:
        super().__init__()
        self.memory = Memory()
        self.table = SlotTable(self.memory, SLOTS, LENGTH, CAPACITY)
        self.tokens: dict[int, np.ndarray] = {}
        self.next_id = 0

    @rule(target=sequences, prompt=prompts)
    def claim(self, prompt: np.ndarray) -> int:
        self.next_id += 1
        if len(self.tokens) == SLOTS:
            with pytest.raises(EngineError, match="in use"):
                self.table.claim(self.next_id, prompt)
            return -1
        best = max((slot.shared(prompt, "") for slot in self.table.slots), default=0)
        reused = self.table.claim(self.next_id, prompt)
        assert reused == min(best, len(prompt) - 1)
        self.tokens[self.next_id] = prompt[:reused]
        return self.next_id

    @rule(sequence=sequences, more=prompts)
    def extend(self, sequence: int, more: np.ndarray) -> None:
        if sequence not in self.tokens:
            return
        start = len(self.tokens[sequence])
        more = more[: LENGTH - start]
        if len(more):
            self.table.extend(sequence, start, more)
            self.table.trim()
            self.memory.cells[self.table[sequence].index, start : start + len(more)] = more
            self.tokens[sequence] = np.concatenate([self.tokens[sequence], more])

    @rule(sequence=consumes(sequences))
    def free(self, sequence: int) -> None:
        self.table.free(sequence)
        self.table.free(sequence)  # once more does no harm
        self.tokens.pop(sequence, None)

    @rule(data=st.data())
    def line_up(self, data: st.DataObject) -> None:
        if self.tokens:
            chosen = data.draw(st.lists(st.sampled_from(sorted(self.tokens)), unique=True, min_size=1))
            order = self.table.line_up(chosen)
            assert sorted(order) == sorted(chosen)
            assert [self.table[sequence].index for sequence in order] == list(range(len(chosen)))

    @invariant()
    def slots_hold_what_they_say(self) -> None:
        for index, slot in enumerate(self.table.slots):
            assert slot.index == index
            assert slot.length <= slot.resident
            np.testing.assert_array_equal(self.memory.cells[index, : slot.length], slot.tokens[: slot.length])
        for sequence, tokens in self.tokens.items():
            slot = self.table[sequence]
            np.testing.assert_array_equal(slot.tokens[: slot.length], tokens)

    @invariant()
    def nothing_is_remembered_beyond_the_capacity(self) -> None:
        self.table.trim()
        claimed = sum(slot.length for slot in self.table.slots if slot.sequence_id is not None)
        assert sum(slot.resident for slot in self.table.slots) <= max(CAPACITY, claimed)


Slots.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
TestSlots = Slots.TestCase


def test_a_conversation_continues_in_place() -> None:
    memory = Memory()
    table = SlotTable(memory, SLOTS, LENGTH, CAPACITY)
    first = np.arange(10)
    table.claim(1, first)
    table.extend(1, 0, first)
    memory.cells[table[1].index, :10] = first
    table.free(1)
    assert table.claim(2, np.arange(14)) == 10
    assert table[2].index == 0


def test_a_running_sequence_lends_its_beginning() -> None:
    memory = Memory()
    table = SlotTable(memory, SLOTS, LENGTH, CAPACITY)
    prompt = np.arange(8)
    table.claim(1, prompt)
    table.extend(1, 0, prompt)
    memory.cells[table[1].index, :8] = prompt
    assert table.claim(2, prompt) == 7
    assert table[2].index != table[1].index
    np.testing.assert_array_equal(memory.cells[table[2].index, :7], prompt[:7])


def test_tokens_must_continue_the_computed_ones() -> None:
    table = SlotTable(Memory(), SLOTS, LENGTH, CAPACITY)
    table.claim(1, np.arange(8))
    with pytest.raises(EngineError, match="do not continue the 0 computed"):
        table.extend(1, 3, np.arange(2))
    with pytest.raises(EngineError, match="within 24"):
        table.extend(1, 0, np.arange(25))
    with pytest.raises(EngineError, match="never claimed"):
        table.extend(2, 0, np.arange(2))


PREFIX = Prefix(end=2, marks=(1,))


def computed(tokens: list[int], known: dict[object, int]) -> list[int]:
    """What a model with a prefix has in its cache: of each token a number for all that it depends on."""
    span = find(PREFIX, np.array(tokens))
    seen = [(span, tuple(tokens[: max(at + 1, span.length)])) for at in range(len(tokens))]
    return [known.setdefault((at, what), len(known)) for at, what in enumerate(seen)]


@given(st.lists(st.lists(st.sampled_from([0, 1, 2]), min_size=1, max_size=8), min_size=2, max_size=12))
@settings(max_examples=300, deadline=None)
def test_of_a_prefix_only_the_whole_is_used_again(texts: list[list[int]]) -> None:
    memory, known = Memory(), dict[object, int]()
    table = SlotTable(memory, SLOTS, LENGTH, CAPACITY, PREFIX)
    for number, text in enumerate(texts):
        tokens, expected = np.array(text), computed(text, known)
        # As one asks who wants logits of every token, and so uses nothing again.
        reused = table.claim(number, tokens[:1] if number % 3 == 2 else tokens)
        cells = memory.cells[table[number].index]
        assert cells[:reused].tolist() == expected[:reused]
        table.extend(number, reused, tokens[reused:])
        cells[reused : len(text)] = expected[reused:]
        table.free(number)


def test_what_stands_behind_a_prefix_is_used_again() -> None:
    table = SlotTable(Memory(), SLOTS, LENGTH, CAPACITY, PREFIX)
    text = np.array([0, 0, 1, 2, 0, 0])
    table.claim(1, text)
    table.extend(1, 0, text)
    assert table.claim(2, np.array([0, 0, 1, 2, 0, 1])) == 5
    assert table.claim(3, np.array([0, 0, 1, 2])) == 3
    assert table.claim(4, np.array([0, 0, 2, 0])) == 0


def test_a_deterministic_table_reuses_whole_blocks_of_whole_blocks() -> None:
    memory = Memory()
    table = SlotTable(memory, SLOTS, LENGTH, CAPACITY, block=4)
    tokens = np.arange(20)
    table.claim(1, tokens)
    # Two blocks, half of one, and the rest one by one.
    for start, end in [(0, 4), (4, 8), (8, 10), *((at, at + 1) for at in range(10, 14))]:
        table.extend(1, start, tokens[start:end])
    memory.cells[table[1].index, :14] = tokens[:14]
    assert [table.claim(2, tokens), table.claim(3, tokens[:8]), table.claim(4, tokens[:7])] == [8, 4, 4]
    table.free(2)
    table.free(3)
    # Written again from within a block, it counts only to there; what was reused counts as before.
    table.extend(1, 5, tokens[5:9])
    assert table.claim(5, tokens[:9]) == 8
