"""Whatever is asked at the same time, each answer is the one that it gets alone: every kind of request, adapters,
drafts, blocks, prefixes, a cache that is too small, and clients that leave, on real engines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tiny
from adapters import make
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.builders import ort as builder
from llmc.checkpoint import Checkpoint
from llmc.converters import lora
from llmc.serve.engine import Engine
from llmc.serve.grammar import Constraint
from llmc.serve.handle import Event, Handle
from llmc.serve.request import Request, Sampling
from llmc.serve.runners import open_runner
from llmc.serve.speculate import NGram, Speculation
from llmc.tokenizer import Tokenizer

Folder = Callable[[str], Path]
ADAPTERS = ["lora", "patterns", "one-layer"]
# The second begins as the first does; the third repeats itself, so that drafts are made.
PROMPTS = [tiny.tokens(20), tiny.tokens(20)[:12] + tiny.tokens(9, seed=1), tiny.tokens(4, seed=2) * 9, [7]]
CALL = '{"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": false}'
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"sampling": Sampling(temperature=0, ignore_eos=True), "max_tokens": 44},
    "sampled": {"sampling": Sampling(temperature=1.0, seed=5), "max_tokens": 12, "n": 2},
    "penalties": {"sampling": Sampling(temperature=0, repetition_penalty=1.3, stop=["e"]), "max_tokens": 18},
    "logprobs": {"sampling": Sampling(temperature=0), "max_tokens": 6, "logprobs": 1, "prompt_logprobs": True},
    "regex": {"sampling": Sampling(temperature=0), "max_tokens": 12, "grammar": Constraint("regex", "(ab)+c", "r")},
    "call": {"sampling": Sampling(temperature=0), "max_tokens": 30, "grammar": Constraint("json_schema", CALL, "s")},
    "mean": {"max_tokens": 0, "pooling": "mean"},
    "last": {"max_tokens": 0, "pooling": "last"},
}


class Ask(NamedTuple):
    """One request: at which turn it comes, what it is, and after how many turns its client leaves."""

    turn: int
    kind: str
    prompt: int
    adapter: str
    priority: int
    leaves: int


def asks(adapters: list[str]) -> st.SearchStrategy[list[Ask]]:
    leaves = st.one_of(st.just(999), st.integers(0, 6))
    one = st.builds(
        Ask, st.integers(0, 12), st.sampled_from(list(KINDS)), st.integers(0, 3), st.sampled_from(["", *adapters]),
        st.integers(0, 1), leaves,
    )  # fmt: skip
    return st.lists(one, min_size=2, max_size=9)


class Case:
    """Engines of one model: one that answers a request at a time, and those under test by name."""

    def __init__(self, folder: Path, adapters: Any, end: int | None) -> None:
        self.end = end
        self.tokenizer = Tokenizer.load(folder)
        room = {"threads": 1, "max_sequences": 4, "adapters": adapters}

        def opened(cache_tokens: int, **options: Any) -> Engine:
            deterministic = options.get("deterministic", False)
            runner = open_runner(folder, cache_tokens=cache_tokens, deterministic=deterministic, **room)
            return Engine(runner, self.tokenizer, max_step_tokens=None if deterministic else 9, **options)

        self.engines = {
            "alone": opened(400),
            "plain": opened(120),
            "ngram": opened(120, speculation=Speculation(NGram(), 4)),
            "deterministic": opened(120, deterministic=True),
            "deterministic alone": opened(400, deterministic=True),
        }
        self.known: dict[tuple[str, Ask], Any] = {}

    def request(self, engine: Engine, ask: Ask) -> Request:
        fields = dict(KINDS[ask.kind])
        if (form := fields.get("grammar")) is not None:
            fields["grammar"] = engine.grammars.compile(form)
        prompt = [*PROMPTS[ask.prompt], *([] if self.end is None else [self.end])]
        return Request(tuple(prompt), adapter=ask.adapter, priority=ask.priority, **fields)

    def alone(self, name: str, ask: Ask) -> Any:
        key = (name, ask._replace(turn=0, priority=0, leaves=0))
        if key not in self.known:
            ((_, events),) = play(self, self.engines[name], [ask._replace(turn=0, leaves=999)])
            self.known[key] = told(events)
        return self.known[key]


def play(case: Case, engine: Engine, arrivals: list[Ask]) -> list[tuple[Ask, list[Event]]]:
    """Let the engine turn until all is done."""
    handles: dict[int, Handle] = {}
    for turn in range(2000):
        for number, ask in enumerate(arrivals):
            if ask.turn == turn:
                handles[number] = engine.submit(case.request(engine, ask))
            elif number in handles and ask.turn + ask.leaves == turn:
                handles[number].cancel()
        if engine._active:
            engine._turn()
        elif len(handles) == len(arrivals):
            break
    assert (engine.num_running, engine.num_waiting, engine.cache_usage) == (0, 0, 0)
    return [(ask, handles[number].take(0)) for number, ask in enumerate(arrivals)]


def told(events: list[Event]) -> dict[int, tuple[str, list[Any], list[float]]]:
    """Of each choice the text, tokens and endings, and the numbers."""
    found: dict[int, tuple[str, list[Any], list[float]]] = {}
    for event in events:
        assert event.error is None
        text, exact, numbers = found.get(event.choice, ("", [], []))
        for each in (*event.prompt_logprobs, event.logprobs):
            if each is not None:
                exact.append(each.token)
                numbers.append(each.logprob)
        if event.vector is not None:
            numbers += event.vector.tolist()
        if event.finish_reason is not None:
            exact.append(event.finish_reason)
        found[event.choice] = (text + event.text, exact, numbers)
    return found


def check(case: Case, name: str, arrivals: list[Ask]) -> None:
    exact = name == "deterministic"
    for ask, events in play(case, case.engines[name], arrivals):
        found = told(events)
        wanted = case.alone("deterministic alone" if exact else "alone", ask)
        for choice, (text, ends, numbers) in found.items():
            if ends[-1:] == ["abort"]:
                assert wanted[choice][0].startswith(text), ask
                continue
            assert (text, ends) == wanted[choice][:2], ask
            if exact:
                assert numbers == wanted[choice][2], ask
            np.testing.assert_allclose(numbers, wanted[choice][2], atol=2e-4, rtol=0, err_msg=str(ask))
        assert ask.leaves < 999 or found.keys() == wanted.keys()


@pytest.fixture(autouse=True, scope="module")
def no_idling() -> Iterator[None]:
    """A turn with nothing to do does not wait for something."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmc.serve.engine.IDLE_SECONDS", 0.0)
        yield


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, tiny_source: Folder, tiny_checkpoint: Folder) -> Iterator[Case]:
    folder = tmp_path_factory.mktemp("mixed")
    checkpoint = tiny_checkpoint("llama")
    for name in ADAPTERS:
        make(name, tiny_source("llama"), folder / name)
    read = [lora.read(name, folder / name, Checkpoint(checkpoint).spec) for name in ADAPTERS]
    builder.build(checkpoint, folder / "engine", max_length=96, lora=True)
    yield from closing(Case(folder / "engine", read, None))


@pytest.fixture(scope="module")
def glm(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Folder) -> Iterator[Case]:
    """A model whose prompt sees itself whole."""
    folder = tmp_path_factory.mktemp("mixed-prefix") / "engine"
    checkpoint = tiny_checkpoint("chatglm-6b")
    builder.build(checkpoint, folder, max_length=96)
    prefix = Checkpoint(checkpoint).spec.prefix
    assert prefix is not None
    yield from closing(Case(folder, (), prefix.end))


def closing(case: Case) -> Iterator[Case]:
    """Afterwards every slot is there."""
    yield case
    for engine in case.engines.values():
        assert engine.stats.failed_steps == 0
        for each in range(4):
            engine._runner.claim(-1 - each, np.array([1]))
        engine.close()


@pytest.mark.parametrize("name", ["plain", "ngram", "deterministic"])
@settings(max_examples=40)
@given(arrivals=asks(ADAPTERS))
def test_all_kinds_at_once_with_adapters(llama: Case, name: str, arrivals: list[Ask]) -> None:
    check(llama, name, arrivals)


@pytest.mark.parametrize("name", ["plain", "ngram", "deterministic"])
@settings(max_examples=30)
@given(arrivals=asks([]))
def test_all_kinds_at_once_with_prefixes(glm: Case, name: str, arrivals: list[Ask]) -> None:
    check(glm, name, arrivals)


@pytest.mark.parametrize("name", ["plain", "ngram", "deterministic"])
@pytest.mark.parametrize("model", ["llama", "glm"])
def test_a_full_cache_and_drafts_for_every_kind(name: str, model: str, request: pytest.FixtureRequest) -> None:
    """Each kind by itself, in company of long ones, and once more out of the cache."""
    case: Case = request.getfixturevalue(model)
    adapters = ["", *ADAPTERS] if model == "llama" else [""]
    for number, kind in enumerate(KINDS):
        adapter = adapters[number % len(adapters)]
        long = [Ask(1, "greedy", 2, adapters[-1 - each % len(adapters)], 0, 999) for each in range(4)]
        check(case, name, [Ask(0, kind, number % 4, adapter, 1, 999), *long])
        check(case, name, [Ask(0, kind, number % 4, adapter, 0, 999)])
    engine = case.engines[name]
    assert engine.preemptions > 0
    # A prefix that is used again whole is no number of whole blocks.
    assert (engine.stats.prefix_hits > 0) == ((model, name) != ("glm", "deterministic"))
    assert (engine.stats.accepted_tokens > 0) == (name == "ngram")
