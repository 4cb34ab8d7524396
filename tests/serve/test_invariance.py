"""The same tokens whatever the neighbours: on a toy that rounds as badly as it may, and on a real engine of int8."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import fake
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.builders import ort as builder
from llmc.errors import EngineError, UserError
from llmc.quant.quantize import quantize
from llmc.recipe import QuantRecipe, WeightFormat
from llmc.runtime import Chunk, Logits, Runner, Tokens
from llmc.serve import invariance
from llmc.serve.engine import Engine
from llmc.serve.handle import Event, Handle
from llmc.serve.request import Request, Sampling
from llmc.serve.runners import open_runner
from llmc.tokenizer import Tokenizer

BLOCK = 4
SYSTEM = tuple(tiny.tokens(11, seed=5))
PROMPTS = [(*SYSTEM[: 11 * (seed % 2)], *tiny.tokens(1 + 3 * seed, seed=seed)) for seed in range(6)]
SAMPLED = Sampling(temperature=1.2, seed=11, presence_penalty=0.3, ignore_eos=True)
CONTROL = Request(PROMPTS[3], SAMPLED, max_tokens=18, n=2, logprobs=1)


@pytest.fixture(autouse=True, scope="module")
def no_idling() -> Iterator[None]:
    """A turn with nothing to do does not wait for something; and blocks are small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmc.serve.engine.IDLE_SECONDS", 0.0)
        patch.setattr("llmc.serve.invariance.BLOCK", BLOCK)
        yield


class RoundingRunner(fake.FakeRunner):
    """Its logits depend on the pieces that the tokens were computed in, as those of real kernels do in their last bits.

    Args:
        deterministic: Reuse only whole blocks.
        crowded: They depend on how many sequences are in the step, too.
    """

    def __init__(self, *, deterministic: bool, crowded: bool = False, **options: int) -> None:
        super().__init__(**options)
        self.deterministic, self.crowded = deterministic, crowded
        self.modes: dict[int, list[int]] = {}
        self.past: list[tuple[str, list[int], list[int]]] = []
        self.size = 0

    def claim(self, sequence_id: int, tokens: Tokens, salt: str = "") -> int:
        wanted, best = tokens.tolist(), 0
        super().claim(sequence_id, tokens[:1], salt)
        self.modes[sequence_id] = []
        live = [(cache.salt, list(cache), self.modes[each]) for each, cache in self.caches.items()]
        for owner, known, modes in self.past + live:
            shared = min(fake._shared(wanted, known), len(wanted) - 1)
            if self.deterministic:
                whole = next((at for at, size in enumerate(modes) if size != BLOCK), len(modes))
                shared = min(shared, whole) // BLOCK * BLOCK
            if owner == salt and shared > best:
                best, self.modes[sequence_id] = shared, modes[:shared]
        self.caches[sequence_id][:] = wanted[:best]
        return best

    def step(self, chunks: Sequence[Chunk]) -> list[Logits]:
        self.size = len(chunks)
        return super().step(chunks)

    def _compute(self, chunk: Chunk) -> Logits:
        self.modes[chunk.sequence_id] += [len(chunk.tokens)] * len(chunk.tokens)
        rows = super()._compute(chunk)
        for place in range(len(rows)):
            modes = self.modes[chunk.sequence_id]
            seen = modes[: len(modes) - len(rows) + place + 1]
            noise = fake.row([*seen, self.size if self.crowded else 0], rows.shape[1])
            rows[place] += 0.05 * noise
        return rows

    def truncate(self, sequence_id: int, length: int) -> None:
        super().truncate(sequence_id, length)
        del self.modes[sequence_id][length:]

    def free(self, sequence_id: int) -> None:
        if sequence_id in self.caches:
            cache = self.caches[sequence_id]
            self.past = [*self.past, (cache.salt, list(cache), self.modes.pop(sequence_id))][-4:]
        super().free(sequence_id)


@dataclass(frozen=True)
class Neighbour:
    """Somebody else's request: which prompt, when it arrives and when it is given up, in steps."""

    prompt: int
    count: int
    arrives: int
    gives_up: int


neighbours = st.lists(
    st.builds(Neighbour, st.integers(0, 5), st.integers(0, 30), st.integers(0, 14), st.integers(1, 60)), max_size=7
)


def run(engine: Engine, arrives: int, others: Sequence[Neighbour]) -> list[Event]:
    """The events of the control request, by choice; the engine's thread is not started, so that nothing is left to it.

    Two steps after the control request has ended the same one is sent again: it must get the same.
    """
    handles: dict[int, Handle] = {}
    rounds: list[Handle] = []
    for turn in range(600):
        for number, other in enumerate(others):
            if other.arrives == turn:
                handles[number] = engine.submit(Request(PROMPTS[other.prompt], SAMPLED, other.count))
            elif other.arrives + other.gives_up == turn:
                handles[number].cancel()
        if turn >= arrives and (not rounds or (rounds[-1] not in engine._active and len(rounds) < 2)):
            rounds.append(engine.submit(CONTROL))
        if engine._active:
            engine._turn()
        elif len(rounds) == 2:
            break
    found = [sorted(handle.events(1), key=lambda event: event.choice) for handle in rounds]
    assert found[0] == found[1]
    return found[0]


def toy(tokenizer: Tokenizer, *, deterministic: bool) -> tuple[Engine, RoundingRunner]:
    runner = RoundingRunner(deterministic=deterministic, max_sequences=4, max_length=80, cache_tokens=130)
    return Engine(runner, tokenizer, max_step_tokens=7, deterministic=deterministic), runner


@settings(max_examples=60)
@given(arrives=st.integers(0, 12), others=neighbours)
def test_a_request_gets_the_same_alone_and_among_others(
    tokenizer: Tokenizer, arrives: int, others: list[Neighbour]
) -> None:
    alone, _ = toy(tokenizer, deterministic=True)
    wanted = run(alone, 0, [])
    alone.close()
    assert len(wanted) == 36
    engine, runner = toy(tokenizer, deterministic=True)
    assert run(engine, arrives, others) == wanted
    engine.close()
    assert not runner.caches


def test_the_toy_rounds_so_that_it_matters(tokenizer: Tokenizer) -> None:
    """Without the rule, the second of two equal requests differs: it finds the first one in the cache."""
    engine, _ = toy(tokenizer, deterministic=False)
    with pytest.raises(AssertionError):
        run(engine, 0, [])
    engine.close()


def test_preemption_computes_it_again_in_the_same_way(tokenizer: Tokenizer) -> None:
    alone, _ = toy(tokenizer, deterministic=True)
    wanted = run(alone, 0, [])
    alone.close()
    engine, _ = toy(tokenizer, deterministic=True)
    assert run(engine, 2, [Neighbour(5, 50, 0, 500), Neighbour(4, 55, 1, 500)]) == wanted
    assert engine.preemptions
    engine.close()


def test_an_engine_that_cannot_is_refused(tokenizer: Tokenizer) -> None:
    runner = RoundingRunner(deterministic=True, crowded=True)
    with pytest.raises(EngineError, match=r"--arithmetic float32.*--max-sequences 1"):
        Engine(runner, tokenizer, deterministic=True)
    assert not runner.caches
    Engine(runner, tokenizer).close()
    # One at a time is as alone.
    Engine(RoundingRunner(deterministic=True, crowded=True, max_sequences=1), tokenizer, deterministic=True).close()


def test_a_step_must_have_room_for_a_chunk(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="must be at least 7"):
        Engine(fake.FakeRunner(max_sequences=4), tokenizer, max_step_tokens=6, deterministic=True)


@pytest.fixture(scope="module", params=["qwen2.5-tied", "llama-bias"])
def int4(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable[[str], Path]
) -> Path:
    """An engine whose products are of int8."""
    folder = tmp_path_factory.mktemp("int4")
    recipe = QuantRecipe(algorithm="rtn", weights=WeightFormat(bits=4, group_size=32, symmetric=True))
    quantize(tiny_checkpoint(request.param), folder / "checkpoint", recipe)
    builder.build(folder / "checkpoint", folder / "engine", max_length=80)
    return folder / "engine"


def real(folder: Path, *, deterministic: bool) -> Engine:
    runner: Runner = open_runner(folder, threads=1, max_sequences=4, cache_tokens=130, deterministic=deterministic)
    return Engine(runner, Tokenizer.load(folder), max_step_tokens=7, deterministic=deterministic)


@settings(max_examples=8)
@given(arrives=st.integers(0, 12), others=neighbours)
def test_log_probabilities_of_a_real_engine_are_the_same_to_the_last_bit(
    int4: Path, arrives: int, others: list[Neighbour]
) -> None:
    alone, among = real(int4, deterministic=True), real(int4, deterministic=True)
    wanted = run(alone, 0, [])
    assert run(among, arrives, others) == wanted
    alone.close()
    among.close()


def test_a_real_engine_differs_without_it(int4: Path) -> None:
    engine = real(int4, deterministic=False)
    with pytest.raises(AssertionError):
        run(engine, 0, [])
    engine.close()


def test_the_check_passes_only_what_is_bit_exact(int4: Path) -> None:
    runner = open_runner(int4, threads=1, max_sequences=5)
    invariance.check(runner)
    step = runner.step

    def rounding(chunks: Sequence[Chunk]) -> list[Logits]:
        return [rows * np.float32(1 + 1e-6 * (len(chunks) > 2)) for rows in step(chunks)]

    runner.step = rounding  # type: ignore[method-assign]
    with pytest.raises(EngineError, match="depends on the others"):
        invariance.check(runner)
    # Nothing is claimed, and nothing of it is found by others.
    for number in range(5):
        assert runner.claim(number, np.arange(3)) == 0
    runner.close()
