"""Speculative decoding: the same texts as without, whatever is drafted, and drafts that are worth something."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import fake
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.builders import ort as builder
from llmc.errors import UserError
from llmc.serve.engine import Engine
from llmc.serve.grammar import Constraint
from llmc.serve.handle import Event, Handle
from llmc.serve.request import Request, Sampling
from llmc.serve.runners import open_runner
from llmc.serve.speculate import Drafter, Drafting, DraftModel, NGram, Speculation, open_speculation
from llmc.tokenizer import Tokenizer

PROMPTS = [tuple(tiny.tokens(1 + 5 * seed, seed=seed)) for seed in range(5)]
# Each kind of request that the sampler, the stream or the scheduler treats in its own way.
KINDS = {
    "greedy": Request((), Sampling(temperature=0), 20),
    "ends": Request((), Sampling(temperature=0), 40),
    "sampled": Request((), Sampling(temperature=1.1, seed=5, top_p=0.95, ignore_eos=True), 20, n=2),
    "penalties": Request((), Sampling(temperature=0, repetition_penalty=1.4, frequency_penalty=0.5), 20),
    "logprobs": Request((), Sampling(temperature=0), 12, logprobs=2, prompt_logprobs=True),
    "stop": Request((), Sampling(temperature=0, stop=["e"], min_tokens=4), 30),
    "biased": Request((), Sampling(temperature=0.7, seed=1, logit_bias={70: 6, 71: 6}), 20),
    "long": Request((), Sampling(temperature=0, ignore_eos=True), 40),
    "none": Request((), Sampling(temperature=0), 0),
}


@pytest.fixture(autouse=True, scope="module")
def no_idling() -> Iterator[None]:
    """A turn with nothing to do does not wait for something."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmc.serve.engine.IDLE_SECONDS", 0.0)
        yield


class Oracle:
    """Drafts what will come, but for some places: every other, say, is wrong, and some drafts are short.

    Args:
        wrong: At which places of the output a draft is wrong, in a cycle.
    """

    def __init__(self, wrong: Sequence[bool]) -> None:
        self.wrong = wrong
        self.forgotten: list[int] = []
        self.closed = False

    def draft(self, sequence_id: int, tokens: Sequence[int], count: int, salt: str) -> list[int]:
        found: list[int] = []
        for _ in range(count):
            token = int(fake.row([*tokens, *found], eos=2).argmax())
            place = (len(tokens) + len(found)) % len(self.wrong)
            found.append((token + 7) % fake.VOCAB if self.wrong[place] else token)
        return found

    def forget(self, sequence_id: int) -> None:
        self.forgotten.append(sequence_id)

    def close(self) -> None:
        self.closed = True


def play(engine: Engine, arrivals: Sequence[tuple[int, str, int, int]]) -> list[list[Event]]:
    """Submit at the given steps, give up some, and let the engine turn until all is done; events by request.

    Args:
        arrivals: Step, kind, prompt, and after how many steps it is given up.
    """
    handles: list[Handle | None] = [None] * len(arrivals)
    for turn in range(1000):
        for number, (arrives, kind, prompt, gives_up) in enumerate(arrivals):
            handle = handles[number]
            if arrives == turn:
                request = KINDS[kind]
                handles[number] = engine.submit(
                    Request(
                        PROMPTS[prompt], request.sampling, request.max_tokens, request.n, request.logprobs,
                        request.prompt_logprobs,
                    )
                )  # fmt: skip
            elif handle is not None and arrives + gives_up == turn:
                handle.cancel()
        if engine._active:
            engine._turn()
        elif all(handles):
            break
    return [[event for handle in [each] if handle for event in handle.events(1)] for each in handles]


def told(events: list[Event]) -> dict[int, list[object]]:
    """What a client sees of each choice: all but at which step it came."""
    found: dict[int, list[object]] = {}
    for event in events:
        kept = found.setdefault(event.choice, [""])
        kept[0] = str(kept[0]) + event.text
        kept += [each for each in (event.logprobs, *event.prompt_logprobs, event.finish_reason) if each is not None]
    return found


def toy(tokenizer: Tokenizer, speculation: Speculation | None, cache_tokens: int = 90) -> Engine:
    runner = fake.FakeRunner(max_sequences=4, max_length=80, cache_tokens=cache_tokens, eos=2)
    return Engine(runner, tokenizer, max_step_tokens=9, speculation=speculation)


arrivals = st.lists(
    st.tuples(st.integers(0, 12), st.sampled_from(sorted(KINDS)), st.integers(0, 4), st.integers(1, 80)),
    min_size=1,
    max_size=6,
)


@settings(max_examples=60)
@given(
    arrivals=arrivals,
    wrong=st.lists(st.booleans(), min_size=1, max_size=5),
    most=st.integers(1, 7),
    together=st.integers(1, 4),
)
def test_every_request_is_told_the_same(
    tokenizer: Tokenizer, arrivals: list[tuple[int, str, int, int]], wrong: list[bool], most: int, together: int
) -> None:
    plain, oracle = toy(tokenizer, None), Oracle(wrong)
    drafting = toy(tokenizer, Speculation(oracle, most, together))
    # Who gives up is at another place in his text then.
    patient = [(arrives, kind, prompt, 999) for arrives, kind, prompt, _ in arrivals]
    wanted = [told(events) for events in play(plain, patient)]
    assert [told(events) for events in play(drafting, patient)] == wanted
    for number, events in enumerate(play(drafting, arrivals)):
        for choice, (text, *_) in told(events).items():
            assert str(wanted[number][choice][0]).startswith(str(text))
    stats = drafting.stats
    assert stats.accepted_tokens == sum(stats.accepted_at.values()) <= stats.draft_tokens
    for engine in (plain, drafting):
        runner = engine._runner
        engine.close()
        assert isinstance(runner, fake.FakeRunner)
        assert not runner.caches
        assert max(runner.batches, default=0) <= 9
        assert engine.stats.failed_steps == 0
    assert oracle.closed


def test_right_drafts_save_steps_and_wrong_ones_cost_none(tokenizer: Tokenizer) -> None:
    steps = {}
    for name, wrong in {"right": [False], "wrong": [True], "none": []}.items():
        engine = toy(tokenizer, Speculation(Oracle(wrong), 4) if wrong else None, cache_tokens=320)
        play(engine, [(0, "sampled" if name == "sampled" else "greedy", 1, 999)])
        steps[name], stats = engine.stats.steps, engine.stats
        if name == "right":
            assert stats.accepted_tokens == stats.draft_tokens > 10
            assert stats.drafts == stats.accepted_at[0]
        if name == "wrong":
            assert stats.accepted_tokens == 0
            # After the first, one token is tried at a time.
            assert stats.draft_tokens == stats.drafts + 3
        engine.close()
    assert steps["right"] <= 6
    assert steps["wrong"] == steps["none"] == 20


def test_nothing_is_drafted_in_a_crowd(tokenizer: Tokenizer) -> None:
    engine = toy(tokenizer, Speculation(Oracle([False])), cache_tokens=320)
    play(engine, [(0, "greedy", 1, 999), (0, "greedy", 2, 999)])
    assert engine.stats.drafts == 0
    engine.close()


def test_a_drafter_that_fails_costs_nobody_anything(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    oracle = Oracle([False])
    monkeypatch.setattr(oracle, "draft", lambda *_: 1 / 0)
    engine = toy(tokenizer, Speculation(oracle))
    (events,) = play(engine, [(0, "greedy", 1, 999)])
    assert told(events)[0][0] == tokenizer.decode(fake.greedy(PROMPTS[1], 20, eos=2))
    assert engine.health.ok
    engine.close()


def test_a_form_is_kept_through_drafts(tokenizer: Tokenizer) -> None:
    """Masks are those of each place: drafts that leave the form are not taken, whatever the model says."""
    schema = json.dumps({"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 4})
    told_by = []
    for speculation in (None, Speculation(NGram(), 4), Speculation(Oracle([False, True]), 4)):
        engine = toy(tokenizer, speculation)
        grammar = engine.grammars.compile(Constraint("json_schema", schema, "schema"))
        sampling = Sampling(temperature=1, seed=3)
        handle = engine.submit(Request(PROMPTS[1], sampling, 60, grammar=grammar))
        while engine._active:
            engine._turn()
        told_by.append(told(list(handle.events(1))))
        engine.close()
    assert told_by[0] == told_by[1] == told_by[2]
    (text, reason) = told_by[0][0]
    assert reason == "length" or 2 <= len(json.loads(str(text))) <= 4


def test_the_distribution_is_the_model_s(tokenizer: Tokenizer) -> None:
    """Two tokens of a vocabulary of 8, drawn 4,000 times with drafts: chi-square against the product of softmaxes."""
    size, count, temperature = 8, 4000, 0.8

    def softmax(tokens: Sequence[int]) -> np.ndarray:
        weights = np.exp(fake.row(tokens, size).astype(np.float64) / temperature)
        return np.asarray(weights / weights.sum())

    class Drafts(Oracle):
        def draft(self, sequence_id: int, tokens: Sequence[int], count: int, salt: str) -> list[int]:
            found: list[int] = []
            for _ in range(count):
                found.append(int(softmax([*tokens, *found]).argmax()))
            return found

    runner = fake.FakeRunner(max_sequences=1, max_length=16, vocab_size=size)
    engine = Engine(runner, tokenizer, speculation=Speculation(Drafts([False]), 2))
    drawn: Counter[tuple[int, ...]] = Counter()
    for seed in range(count):
        sampling = Sampling(temperature=temperature, seed=seed, ignore_eos=True)
        handle = engine.submit(Request((5, 3), sampling, 4, logprobs=0))
        while engine._active:
            engine._turn()
        # The first is drawn without a draft; the second and third stand or fall with one.
        drawn[tuple(event.logprobs.token for event in handle.events(1) if event.logprobs)[:3]] += 1
    expected = {}
    for a, p in enumerate(softmax((5, 3))):
        for b, q in enumerate(softmax((5, 3, a))):
            for c, r in enumerate(softmax((5, 3, a, b))):
                expected[a, b, c] = count * p * q * r
    assert sum(drawn.values()) == count
    assert 0.2 < engine.stats.accepted_tokens / engine.stats.draft_tokens < 0.9
    # Cells that are expected fewer than 5 times are taken together, as the test wants it.
    common = [each for each in expected if expected[each] >= 5]
    seen = [drawn[each] for each in common]
    wanted = [expected[each] for each in common]
    pairs = zip([*seen, count - sum(seen)], [*wanted, count - sum(wanted)], strict=True)
    statistic, freedom = sum((a - b) ** 2 / b for a, b in pairs), len(common)
    assert freedom > 40
    # The 99 % quantile by Wilson and Hilferty (1931).
    assert statistic < freedom * (1 - 2 / (9 * freedom) + 2.326 * (2 / (9 * freedom)) ** 0.5) ** 3
    engine.close()


def test_n_grams_are_found_where_they_occurred_last() -> None:
    drafter = NGram()
    tokens = [1, 2, 3, 4, 5, 6, 2, 3, 4, 9, 8, 3, 4]
    # 2, 3, 4 are not the last three, and 3, 4 came last before the 9.
    assert drafter.draft(1, tokens, 3, "") == [9, 8, 3]
    assert drafter.draft(1, [*tokens, 9, 8], 2, "") == [3, 4]
    assert drafter.draft(1, [*tokens, 9, 8, 7], 2, "") == []
    # A repetition is taken to go on beyond the end.
    assert drafter.draft(2, [7, 1, 2, 1, 2], 5, "") == [1, 2, 1, 2, 1]
    assert drafter.draft(3, [7], 5, "") == []
    drafter.forget(1)
    drafter.forget(1)


def test_as_much_as_goes_well_is_drafted() -> None:
    lengths: list[int] = []

    class Counting(Oracle):
        def draft(self, sequence_id: int, tokens: Sequence[int], count: int, salt: str) -> list[int]:
            lengths.append(count)
            return [5] * count

    speculation = Speculation(Counting([False]), most=6)
    for accepted in (6, 2, 2, 0, 0, 1, 2, 4):
        drafted = len(speculation.draft(1, [5], 100, ""))
        speculation.learn(1, drafted, min(accepted, drafted))
    assert lengths == [6, 6, 2, 4, 1, 1, 2, 4]
    assert speculation.draft(1, [5], 3, "") == (5, 5, 5)
    assert speculation.draft(1, [5], 0, "") == ()


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable[[str], Path]) -> Path:
    """A target and a draft model, both of float32."""
    folder = tmp_path_factory.mktemp("engines")
    for name in ("qwen2.5-tied", "llama-tied"):
        builder.build(tiny_checkpoint(name), folder / name, max_length=80)
    return folder


@pytest.mark.parametrize("how", ["ngram:5", "itself", "another"])
def test_greedy_texts_of_a_real_engine_are_identical(engines: Path, how: str) -> None:
    """With a cache so small that sequences are preempted, and with sequences that are given up."""
    folder = engines / "qwen2.5-tied"
    tokenizer = Tokenizer.load(folder)

    def open_engine(speculation: Speculation | None) -> Engine:
        runner = open_runner(folder, threads=1, max_sequences=4, cache_tokens=84)
        return Engine(runner, tokenizer, max_step_tokens=9, speculation=speculation)

    drafter: Drafter = NGram()
    if how != "ngram:5":
        other = folder if how == "itself" else engines / "llama-tied"
        drafter = DraftModel(open_runner(other, threads=1, max_sequences=1), tiny.VOCAB_SIZE)
    plain, drafting = open_engine(None), open_engine(Speculation(drafter, 5, together=3))
    calls = [(number, "penalties" if number == 2 else "long", number, 999) for number in range(5)]
    calls += [(140, "long", 4, 999), (141, "sampled", 3, 999), (160, "long", 2, 4)]
    wanted, found = ([told(events) for events in play(engine, calls)] for engine in (plain, drafting))
    assert found[:-1] == wanted[:-1]
    assert drafting.preemptions > 0
    assert drafting.stats.draft_tokens > 20
    if how == "itself":
        assert drafting.stats.accepted_tokens > 20
    plain.close()
    drafting.close()


def test_a_draft_model_reads_no_token_twice(tokenizer: Tokenizer) -> None:
    runner = fake.FakeRunner(max_sequences=1, max_length=60, eos=2)
    drafter = DraftModel(runner, fake.VOCAB)
    tokens = list(PROMPTS[2])
    truth = fake.greedy(tokens, 20)
    assert drafter.draft(1, tokens, 3, "") == truth[:3]
    assert sum(runner.batches) == len(tokens) + 2
    # All accepted, and one more.
    tokens += truth[:4]
    assert drafter.draft(1, tokens, 2, "") == truth[4:6]
    assert sum(runner.batches) == len(tokens) + 2 - 1 + 1 - 1
    # The second was wrong.
    tokens += [truth[4], 99]
    drafter.draft(1, tokens, 1, "")
    assert runner.caches[1] == tokens
    # Another sequence, then the first again; one that is too long.
    drafter.draft(2, PROMPTS[3], 2, "")
    assert list(runner.caches) == [2]
    assert drafter.draft(1, tokens, 1, "") != []
    assert drafter.draft(3, [5] * 60, 4, "") == []
    drafter.forget(1)
    drafter.forget(1)
    assert not runner.caches
    drafter.close()
    assert runner.closed


def test_tokens_that_the_model_does_not_have_are_not_drafted() -> None:
    drafter = DraftModel(fake.FakeRunner(max_sequences=1), vocab_size=3)
    assert drafter.draft(1, [5, 6], 4, "") == []


BAD = ["", "ngrams", "ngram:0", "ngram:17", "ngram:x", "ngram=x", "draft", "draft=", "draft:0=x", "draft:²=x"]


@pytest.mark.parametrize("how", BAD)
def test_what_is_said_wrongly_is_refused(how: str) -> None:
    with pytest.raises(UserError, match="ngram:K"):
        Drafting.read(how)


def test_what_is_said_rightly(engines: Path, tokenizer: Tokenizer) -> None:
    assert open_speculation(Drafting.read("ngram"), tokenizer, fake.VOCAB).most == 6
    assert open_speculation(Drafting.read("ngram:3"), tokenizer, fake.VOCAB).most == 3
    smaller = Drafting.read(f"draft:2={engines / 'llama-tied'}")
    found = open_speculation(smaller, tokenizer, fake.VOCAB, threads=1)
    assert isinstance(found.drafter, DraftModel)
    assert found.most == 2
    found.drafter.close()
    other = tokenizer.backend.from_str(tokenizer.backend.to_str())
    other.add_tokens(["another"])
    with pytest.raises(UserError, match="another vocabulary"):
        open_speculation(smaller, dataclasses.replace(tokenizer, backend=other), 320)
    with pytest.raises(UserError, match="exclude each other"):
        Engine(fake.FakeRunner(), tokenizer, deterministic=True, speculation=Speculation(NGram()))
