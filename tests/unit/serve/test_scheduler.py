"""The scheduler against fabricated outputs: whatever arrives, leaves or is given up, its promises hold."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from llmc.errors import OverloadedError, UserError
from llmc.serve.request import Request
from llmc.serve.scheduler import Budget, Scheduler, Work
from llmc.serve.sequence import Sequence, State

NEVER: frozenset[int] = frozenset()


def rank(sequence: Sequence) -> tuple[int, int]:
    """Priority first, then arrival."""
    return sequence.request.priority, sequence.id


def next_token(tokens: list[int]) -> int:
    """A fabricated model: depends on every token so far."""
    return (sum((place + 1) * token for place, token in enumerate(tokens)) * 31 + len(tokens)) % 97


def expected(sequence: Sequence) -> list[int]:
    tokens = list(sequence.request.prompt)
    while len(tokens) < sequence.limit:
        tokens.append(next_token(tokens))
    return tokens


class Cache:
    """Holds what was computed, so that a token computed from a wrong or missing past is noticed."""

    def __init__(self) -> None:
        self.held: dict[int, list[int]] = {}
        self.reuse = 0
        self.block: int | None = None
        self.refuse = False

    def claim(self, sequence: Sequence) -> int:
        if self.refuse:
            raise OverloadedError("refused")
        assert sequence.id not in self.held
        most = len(sequence.tokens) - 1
        if self.block is not None:
            # A runner that was opened for it reuses whole blocks of prompts.
            most = min(most, sequence.num_prompt - 1, self.reuse) // self.block * self.block
        found = min(self.reuse, most)
        self.held[sequence.id] = sequence.tokens[:found]
        return found

    def free(self, sequence: Sequence) -> None:
        del self.held[sequence.id]


def compute(cache: Cache, work: list[Work[Sequence]]) -> list[Sequence]:
    """What the engine does with a plan; returns the sequences that got a token."""
    got = []
    for item in work:
        sequence, held = item.sequence, cache.held[item.sequence.id]
        assert len(held) == item.start == sequence.computed
        held.extend(sequence.tokens[item.start : item.start + item.length])
        sequence.computed += item.length
        if held == sequence.tokens:
            assert item.logits
            got.append(sequence)
        else:
            assert item.logits == 0 or sequence.request.prompt_logprobs
    return got


class Machine(RuleBasedStateMachine):
    """Arrivals, cancellations, failing steps and good ones, in any order."""

    @initialize(
        max_sequences=st.integers(1, 5),
        max_length=st.integers(2, 24),
        cache_tokens=st.integers(2, 60),
        extra=st.integers(0, 12),
        max_queue=st.integers(1, 8),
        max_queued_tokens=st.none() | st.integers(1, 40),
        block=st.none() | st.integers(1, 5),
    )
    def build(
        self,
        max_sequences: int,
        max_length: int,
        cache_tokens: int,
        extra: int,
        max_queue: int,
        max_queued_tokens: int | None,
        block: int | None,
    ) -> None:
        step = max_sequences + extra + (block or 0)
        self.budget = Budget(max_sequences, max_length, cache_tokens, step, max_queue, max_queued_tokens, block)
        self.cache = Cache()
        self.cache.block = block
        self.scheduler: Scheduler[Sequence] = Scheduler(self.budget, self.cache)
        self.everyone: list[Sequence] = []
        self.began: list[int] = []

    @rule(
        prompt=st.lists(st.integers(0, 96), max_size=30),
        max_tokens=st.none() | st.integers(0, 30),
        n=st.integers(1, 3),
        reuse=st.integers(0, 5),
        priority=st.sampled_from([0, 0, 0, -1, 3]),
        is_uncut=st.booleans(),
    )
    def arrive(
        self, prompt: list[int], max_tokens: int | None, n: int, reuse: int, priority: int, is_uncut: bool
    ) -> None:
        self.cache.reuse = reuse
        request = Request(tuple(prompt), max_tokens=max_tokens, n=n, priority=priority)
        longest = min(self.budget.max_length, self.budget.cache_tokens)
        fits = bool(prompt) and len(prompt) + (1 if max_tokens is None else max_tokens) <= longest
        if not fits:
            with pytest.raises(UserError):
                self.scheduler.limit(len(prompt), max_tokens)
            return
        limit = self.scheduler.limit(len(prompt), max_tokens)
        new = [Sequence(len(self.everyone) + index, request, limit, index=index) for index in range(n)]
        for each in new:
            each.uncut = len(prompt) if is_uncut else 0
        before = list(self.scheduler.waiting)
        queued, most = sum(len(each.tokens) for each in before), self.budget.max_queued_tokens
        many = len(before) + len(self.scheduler.running) + n > self.budget.max_queue + self.budget.max_sequences
        if many or (most is not None and before and queued + n * len(prompt) > most):
            with pytest.raises((OverloadedError, UserError)):
                self.scheduler.add(new)
            assert list(self.scheduler.waiting) == before
            return
        self.scheduler.add(new)
        self.everyone += new

    @precondition(lambda self: any(each.state is not State.FINISHED for each in self.everyone))
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        unfinished = [each for each in self.everyone if each.state is not State.FINISHED]
        sequence = data.draw(st.sampled_from(unfinished))
        self.scheduler.finish(sequence, "abort")
        self.scheduler.finish(sequence, "stop")
        assert sequence.finish_reason == "abort"

    @rule(fails=st.integers(0, 9).map(lambda number: number == 0))
    def step(self, fails: bool) -> None:
        decoding = [each for each in self.scheduler.running if len(each.tokens) - each.computed == 1]
        first = min((each for each in self.everyone if each.state is not State.FINISHED), key=rank, default=None)
        ran = first is not None and first.state is State.RUNNING
        work = self.scheduler.schedule()
        self.check_plan(work, decoding)
        if first is not None and ran:
            assert first.state is State.RUNNING, "the first in order gave up its place"
            assert first in [item.sequence for item in work], "the first in order got nothing to do"
        if fails:
            for item in work:
                self.scheduler.finish(item.sequence, "error")
            return
        for sequence in compute(self.cache, work):
            if len(sequence.tokens) < sequence.limit:
                sequence.append(next_token(sequence.tokens), NEVER)
            if len(sequence.tokens) >= sequence.limit:
                self.scheduler.finish(sequence, "length")

    def check_plan(self, work: list[Work[Sequence]], decoding: list[Sequence]) -> None:
        planned = [item.sequence for item in work]
        assert len({each.id for each in planned}) == len(planned)
        if sum(item.length for item in work) > self.budget.max_step_tokens:
            (long,) = (item for item in work if item.length > 1)
            assert long.start + long.length == long.sequence.uncut
        assert all(item.start + item.length >= item.sequence.uncut for item in work), "a prompt was cut"
        assert all(item.length >= 1 for item in work)
        if self.budget.block is not None:
            for item in work:
                rest, end = item.sequence.num_prompt - item.start, item.start + item.length
                whole = item.length == self.budget.block and end % self.budget.block == 0
                uncut = item.start < item.sequence.uncut == end
                assert item.length == 1 if rest <= 0 else whole or uncut or item.length == rest < self.budget.block
        assert bool(work) == any(each.state is not State.FINISHED for each in self.everyone)
        for each in decoding:
            assert each in planned or each.state is State.WAITING, "a decoding sequence got no token"
        for each in planned:
            if each.id not in self.began:
                self.began.append(each.id)
        unfinished = [each for each in self.everyone if each.state is not State.FINISHED]
        if len({each.request.priority for each in self.everyone}) == 1 and unfinished:
            assert unfinished[0] in self.scheduler.running, "the oldest does not run"

    @invariant()
    def nothing_is_exceeded_or_leaked(self) -> None:
        running, waiting = self.scheduler.running, list(self.scheduler.waiting)
        assert len(running) <= self.budget.max_sequences
        assert len(waiting) <= self.budget.max_queue + self.budget.max_sequences
        assert set(self.cache.held) == {each.id for each in running}
        assert sum(len(held) for held in self.cache.held.values()) <= self.budget.cache_tokens
        for each in (running, waiting):
            assert each == sorted(each, key=rank), "served out of order"
        if len({each.request.priority for each in self.everyone}) == 1:
            assert running + waiting == sorted(running + waiting, key=rank), "somebody was overtaken"
        alive = [each.id for each in self.everyone if each.state is not State.FINISHED]
        assert sorted(each.id for each in running + waiting) == alive, "a sequence was lost"

    @invariant()
    def first_come_first_served(self) -> None:
        for priority in {each.request.priority for each in self.everyone}:
            began = [number for number in self.began if self.everyone[number].request.priority == priority]
            assert began == sorted(began)

    @invariant()
    def tokens_are_as_alone(self) -> None:
        for each in self.everyone:
            assert each.tokens == expected(each)[: len(each.tokens)]
            if each.finish_reason == "length":
                assert each.tokens == expected(each)

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        # Each step either computes something or ends something: no more are needed than there are tokens, and what
        # preemption makes the young compute again.
        for _ in range(10_000):
            if not any(each.state is not State.FINISHED for each in self.everyone):
                break
            self.step(False)
            self.nothing_is_exceeded_or_leaked()
        assert all(each.finish_reason for each in self.everyone)
        assert not self.cache.held
        self.tokens_are_as_alone()


Machine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestScheduler = Machine.TestCase


def make(
    max_sequences: int = 2, cache_tokens: int = 100, max_step_tokens: int = 8, max_queue: int = 8
) -> tuple[Scheduler[Sequence], Cache]:
    cache = Cache()
    return Scheduler(Budget(max_sequences, 64, cache_tokens, max_step_tokens, max_queue), cache), cache


def sequence(scheduler: Scheduler[Sequence], number: int, prompt: int, max_tokens: int) -> Sequence:
    request = Request(tuple(range(prompt)), max_tokens=max_tokens)
    return Sequence(number, request, scheduler.limit(prompt, max_tokens))


def test_a_decoding_sequence_goes_on_while_a_long_prompt_is_read() -> None:
    scheduler, cache = make()
    first, second = sequence(scheduler, 0, 3, 20), sequence(scheduler, 1, 30, 5)
    scheduler.add([first])
    compute(cache, scheduler.schedule())
    first.append(1, NEVER)
    scheduler.add([second])
    lengths = []
    while second.prefilling:
        work = scheduler.schedule()
        assert (work[0].sequence, work[0].length) == (first, 1)
        lengths += [item.length for item in work if item.sequence is second]
        compute(cache, work)
        first.append(1, NEVER)
    assert lengths == [7, 7, 7, 7, 2]


def test_a_prompt_that_cannot_be_cut_waits_for_a_step_of_its_own() -> None:
    scheduler, cache = make(max_sequences=4, cache_tokens=200)
    decoding, short, long, last = (
        sequence(scheduler, number, prompt, 30) for number, prompt in enumerate((2, 9, 30, 3))
    )
    long.uncut, last.uncut = 30, 3
    scheduler.add([decoding])
    compute(cache, scheduler.schedule())
    steps = []
    decoding.append(1, NEVER)
    scheduler.add([short, long, last])
    for _ in range(4):
        work = scheduler.schedule()
        steps.append([(item.sequence.id, item.length) for item in work])
        for got in compute(cache, work):
            got.append(1, NEVER)
    assert not last.prefilling
    # Its 30 tokens are more than the budget of 8; nobody overtakes it meanwhile.
    assert steps == [[(0, 1), (1, 7)], [(0, 1), (1, 2)], [(0, 1), (1, 1), (2, 30)], [(0, 1), (1, 1), (2, 1), (3, 3)]]


def test_siblings_wait_for_the_prompt_they_share() -> None:
    scheduler, cache = make(max_sequences=4)
    request = Request(tuple(range(12)), max_tokens=4, n=2)
    siblings = [Sequence(index, request, 16, index=index) for index in range(2)]
    scheduler.add(siblings)
    assert [item.sequence.index for item in scheduler.schedule()] == [0]
    compute(cache, scheduler.schedule())
    compute(cache, scheduler.schedule())
    siblings[0].append(1, NEVER)
    cache.reuse = 11
    assert [(item.sequence.index, item.start) for item in scheduler.schedule()] == [(0, 12), (1, 11)]


def test_the_youngest_gives_way_and_comes_back_first() -> None:
    scheduler, cache = make(max_sequences=2, cache_tokens=44)
    old, young, last = (sequence(scheduler, number, 4, 30) for number in range(3))
    scheduler.add([old, young, last])
    met = []
    while not old.finish_reason:
        for each in compute(cache, scheduler.schedule()):
            each.append(next_token(each.tokens), NEVER)
            if len(each.tokens) >= each.limit:
                scheduler.finish(each, "length")
        met.append([each.id for each in scheduler.waiting])
    assert scheduler.preemptions >= 1
    assert [1, 2] in met
    assert old.tokens == expected(old)


def test_the_urgent_overtake_and_are_the_last_to_give_way() -> None:
    scheduler, cache = make(max_sequences=2, cache_tokens=44)
    requests = [Request(tuple(range(4)), max_tokens=30, priority=priority) for priority in (0, 0, 0, -1)]
    common, second, third, urgent = (Sequence(number, each, 34) for number, each in enumerate(requests))
    scheduler.add([common])
    compute(cache, scheduler.schedule())
    common.append(1, NEVER)
    scheduler.add([second, third])
    scheduler.add([urgent])
    assert list(scheduler.waiting) == [urgent, second, third]
    while not urgent.finish_reason:
        for each in compute(cache, scheduler.schedule()):
            each.append(next_token(each.tokens), NEVER)
            if len(each.tokens) >= each.limit:
                scheduler.finish(each, "length")
    assert scheduler.preemptions >= 1
    assert scheduler.waiting[0] is common or common in scheduler.running
    assert second.num_output == third.num_output == 0


def test_a_refused_claim_loses_nothing() -> None:
    scheduler, cache = make()
    first = sequence(scheduler, 0, 3, 3)
    scheduler.add([first])
    cache.refuse = True
    with pytest.raises(OverloadedError):
        scheduler.schedule()
    assert list(scheduler.waiting) == [first]
    assert not scheduler.running


def test_what_can_never_fit_is_refused_with_the_limit() -> None:
    scheduler, _ = make(cache_tokens=50)
    assert scheduler.limit(10, 40) == 50
    assert scheduler.limit(10, None) == 50
    for prompt, most, param in ((0, 1, "prompt"), (50, 1, "prompt"), (10, 41, "max_tokens"), (51, None, "prompt")):
        with pytest.raises(UserError, match=r"50 tokens|at least one") as caught:
            scheduler.limit(prompt, most)
        assert caught.value.param == param
    with pytest.raises(UserError, match="max_step_tokens"):
        Budget(8, 10, 10, 4, 1)


def test_prompt_logprobs_want_every_row() -> None:
    scheduler, cache = make()
    request = Request(tuple(range(10)), max_tokens=2, prompt_logprobs=True)
    one = Sequence(0, request, 12)
    scheduler.add([one])
    plans = []
    for _ in range(3):
        work = scheduler.schedule()
        plans += [(item.start, item.length, item.logits) for item in work]
        for each in compute(cache, work):
            if each.computed == len(each.tokens):
                each.append(5, NEVER)
    assert plans == [(0, 8, 8), (8, 2, 2), (10, 1, 1)]
