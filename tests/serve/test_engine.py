"""The engine on the toy model: the same tokens as alone, and the least harm when something fails."""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable, Iterable

import fake
import numpy as np
import pytest

from llmc.errors import DrainingError, EngineError, LlmcError, OverloadedError, UserError
from llmc.serve.engine import Engine
from llmc.serve.handle import Event, Handle
from llmc.serve.request import Request, Sampling
from llmc.tokenizer import Tokenizer

MakeEngine = Callable[..., Engine]
GREEDY = Sampling(temperature=0)


def prompt(seed: int, count: int) -> tuple[int, ...]:
    return tuple(random.Random(seed).randrange(3, fake.VOCAB) for _ in range(count))


def collect(handle: Handle, timeout: float = 30) -> list[Event]:
    return list(handle.events(timeout))


def texts(events: Iterable[Event]) -> dict[int, str]:
    found: dict[int, str] = {}
    for event in events:
        found[event.choice] = found.get(event.choice, "") + event.text
    return found


def wait_for(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.002)


def test_one_request_gives_the_model_s_tokens(make_engine: MakeEngine, tokenizer: Tokenizer) -> None:
    engine = make_engine()
    handle = engine.submit(Request(prompt(0, 5), GREEDY, max_tokens=20))
    events = collect(handle)
    assert texts(events) == {0: tokenizer.decode(fake.greedy(prompt(0, 5), 20))}
    assert [event.finish_reason for event in events if event.finish_reason] == ["length"]
    assert (handle.prompt_tokens, handle.completion_tokens, handle.cached_tokens) == (5, 20, 0)


@pytest.mark.parametrize("cache_tokens", [None, 70])
def test_many_with_random_arrivals_give_the_same_as_alone(
    make_engine: MakeEngine, tokenizer: Tokenizer, cache_tokens: int | None
) -> None:
    runner = fake.FakeRunner(max_sequences=16, max_length=64, cache_tokens=cache_tokens, delay=0.0005, eos=2)
    engine = make_engine(runner, max_step_tokens=24)
    requests = [Request(prompt(seed, 1 + 7 * seed % 16), GREEDY, max_tokens=1 + 5 * seed % 48) for seed in range(40)]
    results: dict[int, str] = {}
    reasons: dict[int, str | None] = {}

    def client(number: int) -> None:
        time.sleep(random.Random(number).random() * 0.05)
        events = collect(engine.submit(requests[number]))
        results[number] = texts(events).get(0, "")
        reasons[number] = events[-1].finish_reason

    threads = [threading.Thread(target=client, args=(number,)) for number in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for number, request in enumerate(requests):
        tokens = fake.greedy(request.prompt, request.max_tokens or 0, eos=2)
        assert reasons[number] == ("stop" if tokens[-1] == 2 else "length")
        assert results[number] == tokenizer.decode(tokens)
    assert runner.most_sequences > (4 if cache_tokens is None else 1)
    assert (engine.preemptions > 0) == (cache_tokens is not None)
    assert "stop" in reasons.values()


def test_a_seed_gives_the_same_whatever_runs_beside_it(make_engine: MakeEngine) -> None:
    engine = make_engine(fake.FakeRunner(max_sequences=8))
    sampling = Sampling(temperature=1.3, top_p=0.95, seed=7, frequency_penalty=0.5)
    request = Request(prompt(1, 4), sampling, max_tokens=30, n=2)
    alone = texts(collect(engine.submit(request)))
    noise = [engine.submit(Request(prompt(seed, 9), Sampling(), max_tokens=50)) for seed in range(5)]
    assert texts(collect(engine.submit(request))) == alone
    assert alone[0] != alone[1]
    for handle in noise:
        collect(handle)


def test_several_prompts_and_choices_are_numbered_through(make_engine: MakeEngine, tokenizer: Tokenizer) -> None:
    engine = make_engine()
    requests = [Request(prompt(seed, 20), GREEDY, max_tokens=6, n=2) for seed in range(3)]
    handle = engine.submit(*requests)
    found = texts(collect(handle))
    wanted = [tokenizer.decode(fake.greedy(request.prompt, 6)) for request in requests for _ in range(2)]
    assert [found[index] for index in range(6)] == wanted
    assert handle.prompt_tokens == 60
    # Each second choice takes the first one's prompt from the cache, all but its last token.
    assert handle.cached_tokens >= 3 * 19


def test_logprobs_of_output_and_prompt(make_engine: MakeEngine) -> None:
    engine = make_engine(fake.FakeRunner(max_length=400), max_step_tokens=16)
    ids = prompt(3, 40)
    collect(engine.submit(Request(ids, GREEDY, max_tokens=1)))
    events = collect(engine.submit(Request(ids, GREEDY, max_tokens=3, logprobs=2, prompt_logprobs=True)))
    prompts = [each for event in events for each in event.prompt_logprobs]
    output = [event.logprobs for event in events if event.logprobs]
    tokens = list(ids) + fake.greedy(ids, 3)
    assert [each.token for each in prompts + output] == tokens[1:]
    for place, each in enumerate(prompts + output, 1):
        row = fake.row(tokens[:place]).astype(np.float64)
        row -= math.log(np.exp(row).sum())
        order = np.argsort(-row)[:2]
        assert each.logprob == pytest.approx(row[each.token], abs=1e-5)
        assert [token for token, _ in each.top] == order.tolist()
        assert each.rank == int((row > row[each.token]).sum())


def test_prompt_logprobs_come_once_though_the_prompt_is_computed_twice(make_engine: MakeEngine) -> None:
    engine = make_engine(fake.FakeRunner(max_sequences=2, max_length=100, cache_tokens=100), max_step_tokens=16)
    requests = [Request(prompt(seed, 20), GREEDY, max_tokens=70, logprobs=0, prompt_logprobs=True) for seed in (1, 2)]
    handles = [engine.submit(request) for request in requests]
    for request, handle in zip(requests, handles, strict=True):
        reported = [each.token for event in collect(handle) for each in event.prompt_logprobs]
        assert reported == list(request.prompt[1:])
    assert engine.preemptions > 0


def test_no_token_at_all(make_engine: MakeEngine) -> None:
    handle = make_engine().submit(Request(prompt(3, 40), GREEDY, max_tokens=0))
    events = collect(handle)
    assert [(event.text, event.tokens, event.finish_reason) for event in events] == [("", 0, "length")]


def test_stop_strings_tokens_and_the_model_s_own_end(make_engine: MakeEngine, tokenizer: Tokenizer) -> None:
    engine = make_engine(fake.FakeRunner(max_length=300))
    ids = prompt(4, 6)
    tokens = fake.greedy(ids, 40)
    whole = tokenizer.decode(tokens)
    stop = whole[20:24]
    first = whole.index(stop)
    for include in (False, True):
        sampling = Sampling(temperature=0, stop=[stop], include_stop_str_in_output=include)
        events = collect(engine.submit(Request(ids, sampling, max_tokens=40)))
        assert texts(events)[0] == whole[: first + len(stop) * include]
        assert events[-1].finish_reason == "stop"
    late = Sampling(temperature=0, stop_token_ids=[tokens[5]], min_tokens=3)
    handle = engine.submit(Request(ids, late, max_tokens=40))
    assert texts(collect(handle))[0] == tokenizer.decode(tokens[: tokens.index(tokens[5])])
    ending = fake.FakeRunner(eos=2, max_length=300)
    engine = make_engine(ending)
    normal = fake.greedy(ids, 200, eos=2)
    assert normal[-1] == 2
    assert engine.submit(Request(ids, GREEDY, max_tokens=200)).choices == 1
    ignoring = Sampling(temperature=0, ignore_eos=True)
    events = collect(engine.submit(Request(ids, ignoring, max_tokens=len(normal) + 5)))
    assert events[-1].finish_reason == "length"
    longer = Sampling(temperature=0, min_tokens=len(normal) + 3)
    handle = engine.submit(Request(ids, longer, max_tokens=len(normal) + 200))
    collect(handle)
    assert handle.completion_tokens >= len(normal) + 3


@pytest.mark.parametrize("when", ["running", "waiting", "reading its prompt"])
def test_cancel_frees_the_slot_within_two_steps(make_engine: MakeEngine, when: str) -> None:
    runner = fake.FakeRunner(max_sequences=1 if when == "waiting" else 4, max_length=4000, delay=0.005)
    engine = make_engine(runner, max_step_tokens=8)
    other = engine.submit(Request(prompt(1, 3), GREEDY, max_tokens=60))
    wait_for(lambda: runner.steps > 3)
    size = 1000 if when == "reading its prompt" else 3
    handle = engine.submit(Request(prompt(2, size), GREEDY, max_tokens=2000))
    if when == "waiting":
        wait_for(lambda: engine.num_waiting == 1)
    else:
        wait_for(lambda: engine.num_running == 2)
    handle.cancel()
    steps = runner.steps
    wait_for(lambda: engine.num_waiting == 0 and engine.num_running <= 1)
    assert runner.steps - steps <= 2
    handle.cancel()
    assert collect(handle)[-1].finish_reason == "abort"
    assert texts(collect(other)) == {0: engine.tokenizer.decode(fake.greedy(prompt(1, 3), 60))}


def test_a_reader_that_stopped_reading_is_given_up(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmc.serve.engine.MAX_BACKLOG", 20)
    engine = make_engine(fake.FakeRunner(max_length=4000))
    handle = engine.submit(Request(prompt(1, 3), GREEDY, max_tokens=3000))
    wait_for(lambda: engine.stats.finished["abort"] == 1)
    assert handle.backlog < 40


def test_a_failing_step_ends_its_requests_and_no_others(make_engine: MakeEngine, tokenizer: Tokenizer) -> None:
    runner = fake.FakeRunner(max_sequences=2)
    runner.fail_steps = {6}
    engine = make_engine(runner)
    lost = [engine.submit(Request(prompt(seed, 3), GREEDY, max_tokens=30)) for seed in range(2)]
    waits = engine.submit(Request(prompt(9, 3), GREEDY, max_tokens=10))
    for handle in lost:
        with pytest.raises(EngineError, match=r"a step of the engine failed: told to fail"):
            collect(handle)
    assert texts(collect(waits)) == {0: tokenizer.decode(fake.greedy(prompt(9, 3), 10))}
    assert engine.health.ok
    assert engine.stats.failed_steps == 1


def test_what_is_wrong_with_one_request_is_no_matter_of_the_others(
    make_engine: MakeEngine, tokenizer: Tokenizer
) -> None:
    runner = fake.FakeRunner(max_sequences=3)
    runner.poison = 300
    engine = make_engine(runner)
    good = engine.submit(Request(prompt(1, 3), GREEDY, max_tokens=30))
    bad = engine.submit(Request((5, 300, 6), Sampling(seed=1), max_tokens=30, n=2))
    with pytest.raises(EngineError, match="not finite"):
        collect(bad)
    wanted = fake.greedy(prompt(1, 3), 30)
    assert 300 not in wanted
    assert texts(collect(good)) == {0: tokenizer.decode(wanted)}
    assert engine.health.ok


def test_steps_that_keep_failing_are_unhealthy_until_one_succeeds(make_engine: MakeEngine) -> None:
    runner = fake.FakeRunner()
    runner.fail_steps = {0, 1, 2}
    engine = make_engine(runner)
    for _ in range(3):
        with pytest.raises(EngineError):
            collect(engine.submit(Request((5, 6), GREEDY, max_tokens=2)))
    assert not engine.health.ok
    assert "3 steps failed" in engine.health.reason
    collect(engine.submit(Request((5, 6), GREEDY, max_tokens=2)))
    assert engine.health.ok


def test_a_claim_that_fails_ends_that_request(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = fake.FakeRunner()
    engine = make_engine(runner)
    claim = runner.claim

    def broken(sequence_id: int, tokens: np.ndarray, salt: str) -> int:
        if tokens[0] == 99:
            raise EngineError("no room")
        return claim(sequence_id, tokens, salt)

    monkeypatch.setattr(runner, "claim", broken)
    with pytest.raises(EngineError, match="no room"):
        collect(engine.submit(Request((99, 6), GREEDY, max_tokens=2)))
    collect(engine.submit(Request((5, 6), GREEDY, max_tokens=2)))


def test_a_broken_loop_fails_everything_and_says_so(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = fake.FakeRunner(max_length=4000, delay=0.002)
    engine = make_engine(runner)
    handle = engine.submit(Request((5, 6), GREEDY, max_tokens=3000))
    wait_for(lambda: runner.steps > 2)
    monkeypatch.setattr("llmc.serve.engine._chunk", lambda item: 1 / 0)
    with pytest.raises(EngineError, match="has stopped"):
        collect(handle)
    wait_for(lambda: not engine.health.ok)
    with pytest.raises(EngineError, match="ZeroDivisionError"):
        engine.submit(Request((5, 6), GREEDY, max_tokens=3))


def test_a_stuck_step_is_noticed(make_engine: MakeEngine) -> None:
    runner = fake.FakeRunner()
    engine = make_engine(runner, stuck_after=0.05)
    runner.gate.clear()
    handle = engine.submit(Request((5, 6), GREEDY, max_tokens=3))
    wait_for(lambda: not engine.health.ok)
    assert "has not come back" in engine.health.reason
    runner.gate.set()
    collect(handle)
    assert engine.health.ok


def test_drain_finishes_what_runs_and_takes_nothing_new(make_engine: MakeEngine) -> None:
    engine = make_engine(fake.FakeRunner(max_sequences=1, delay=0.002))
    handles = [engine.submit(Request(prompt(seed, 3), GREEDY, max_tokens=20)) for seed in range(3)]
    engine.begin_drain()
    assert engine.health.draining
    with pytest.raises(DrainingError):
        engine.submit(Request((5, 6), GREEDY, max_tokens=3))
    assert engine.drain(30)
    assert [collect(handle)[-1].finish_reason for handle in handles] == ["length"] * 3


def test_drain_ends_what_takes_too_long(make_engine: MakeEngine) -> None:
    engine = make_engine(fake.FakeRunner(max_sequences=1, max_length=9000, delay=0.002))
    handle = engine.submit(Request((5, 6), GREEDY, max_tokens=8000))
    assert not engine.drain(0.05)
    with pytest.raises(DrainingError, match="before this request was finished"):
        collect(handle)


BAD = {
    "too long": (Request(prompt(1, 100), max_tokens=100), "max_tokens", "128 tokens"),
    "prompt too long": (Request(prompt(1, 128)), "prompt", "128 tokens"),
    "empty": (Request(()), "prompt", "no tokens"),
    "no such token": (Request((5, fake.VOCAB)), "prompt", "no token 320"),
    "negative token": (Request((5, -1)), "prompt", "no token -1"),
    "bias": (Request((5,), Sampling(logit_bias={999: 1.0})), "logit_bias", "no token 999"),
    "allowed": (Request((5,), Sampling(allowed_token_ids=[999])), "allowed_token_ids", "no token 999"),
    "stop token": (Request((5,), Sampling(stop_token_ids=[999])), "stop_token_ids", "no token 999"),
    "minimum": (Request((5,), Sampling(min_tokens=9), max_tokens=8), "min_tokens", "at most 8"),
    "too many": (Request((5,), n=100), "n", "7 sequences"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_request_that_cannot_be_done_is_refused_at_once(make_engine: MakeEngine, name: str) -> None:
    request, param, words = BAD[name]
    with pytest.raises(UserError, match=words) as caught:
        make_engine(max_queue=3).submit(request)
    assert caught.value.param == param


def test_a_full_queue_refuses(make_engine: MakeEngine) -> None:
    runner = fake.FakeRunner(max_sequences=1)
    engine = make_engine(runner, max_queue=2)
    runner.gate.clear()
    first = engine.submit(Request((5, 6), GREEDY, max_tokens=3))
    wait_for(lambda: engine.num_running == 1)
    others = [engine.submit(Request((5, 6), GREEDY, max_tokens=3)) for _ in range(2)]
    with pytest.raises(OverloadedError, match="queue is full"):
        engine.submit(Request((5, 6), GREEDY, max_tokens=3))
    runner.gate.set()
    for handle in [first, *others]:
        collect(handle)
    assert engine.stats.refused == {"queue_full": 1}
    assert issubclass(OverloadedError, LlmcError)


def test_stats_add_up(make_engine: MakeEngine) -> None:
    engine = make_engine()
    for seed in range(3):
        collect(engine.submit(Request(prompt(seed, 10), GREEDY, max_tokens=5)))
    collect(engine.submit(Request(prompt(0, 10), GREEDY, max_tokens=5)))
    stats = engine.stats
    assert (stats.prompt_tokens, stats.generation_tokens) == (40, 20)
    assert stats.finished == {"length": 4}
    assert (stats.prefix_queries, stats.prefix_hits) == (40, 9)
    assert sum(stats.first_token_time.counts) == sum(stats.queue_time.counts) == 4
    assert sum(stats.inter_token_time.counts) == 16
    assert stats.steps == sum(stats.step_time.counts) == 20
    assert engine.cache_usage == 0


def test_a_caller_s_timeout_gives_the_request_up(make_engine: MakeEngine) -> None:
    engine = make_engine(fake.FakeRunner(max_length=9000, delay=0.005))
    with pytest.raises(TimeoutError):
        collect(engine.submit(Request((5, 6), GREEDY, max_tokens=8000)), timeout=0.05)
    wait_for(lambda: engine.num_running == 0)
