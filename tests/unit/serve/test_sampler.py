"""Sampled distributions against transformers' logits processors, and the draws against the distributions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from llmc.errors import EngineError, UserError
from llmc.serve.request import Sampling
from llmc.serve.sampler import Sampler, logprobs

VOCAB = 500
NEVER: frozenset[int] = frozenset()


def logits(seed: int, size: int = VOCAB, scale: float = 2.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(size) * scale).astype(np.float32)


class Lever:
    """In place of a random generator: hands out the numbers one asks for."""

    def __init__(self) -> None:
        self.value = 0.0

    def random(self) -> float:
        return self.value


def support(sampling: Sampling, row: np.ndarray, prompt: list[int], output: list[int]) -> dict[int, float]:
    """Token -> probability, measured by drawing with an even grid of "random" numbers."""
    sampler = prepared(sampling, prompt, output)
    lever = Lever()
    sampler._random = lever  # type: ignore[assignment]
    counts: dict[int, int] = {}
    grid = 4000
    for step in range(grid):
        lever.value = (step + 0.5) / grid
        adjusted = row if sampler._plain else sampler._adjusted(row)
        token = sampler._draw(adjusted, int(adjusted.argmax()), lever)  # type: ignore[arg-type]
        counts[token] = counts.get(token, 0) + 1
    return {token: count / grid for token, count in counts.items()}


def prepared(sampling: Sampling, prompt: list[int], output: list[int]) -> Sampler:
    sampler = Sampler(sampling, prompt, NEVER)
    if sampler._history is not None:
        for token in output:
            sampler._history.add(token)
    return sampler


def truth(sampling: Sampling, row: np.ndarray, prompt: list[int], output: list[int]) -> np.ndarray:
    """The distribution after transformers' processors, in the order of its generation."""
    import torch
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    scores = row.copy()
    steps: list[Any] = []
    if sampling.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(penalty=sampling.repetition_penalty))
    ids = torch.tensor([prompt + output])
    scores_t = LogitsProcessorList(steps)(ids, torch.from_numpy(scores)[None].clone())
    # OpenAI's penalties, which transformers has not: of the output alone.
    for token in set(output):
        scores_t[0, token] -= sampling.presence_penalty + sampling.frequency_penalty * output.count(token)
    for token, bias in sampling.logit_bias.items():
        scores_t[0, token] += bias
    warpers: list[Any] = []
    if sampling.temperature != 1:
        warpers.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k > 0:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p > 0:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    return torch.softmax(LogitsProcessorList(warpers)(ids, scores_t)[0].double(), -1).numpy()


CASES = [
    {},
    {"temperature": 0.6},
    {"temperature": 1.7},
    {"top_k": 7},
    {"top_k": VOCAB + 5},
    {"top_p": 0.8},
    {"top_p": 0.05},
    {"top_p": 0.999},
    {"min_p": 0.1},
    {"temperature": 0.7, "top_k": 30, "top_p": 0.9},
    {"temperature": 1.3, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 0.9, "top_k": 40, "top_p": 0.7, "min_p": 0.02},
    {"repetition_penalty": 1.8},
    {"repetition_penalty": 0.7, "temperature": 1.2, "top_p": 0.95},
    {"presence_penalty": 1.5, "frequency_penalty": -0.7},
    {"repetition_penalty": 1.3, "frequency_penalty": 0.9, "top_k": 50},
    {"logit_bias": {3: 6.0, 4: -100.0}, "top_p": 0.9},
]


@pytest.mark.parametrize("values", CASES, ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_distribution_is_transformers(values: dict[str, Any], seed: int) -> None:
    sampling = Sampling(**values)
    row = logits(seed)
    random = np.random.default_rng(seed + 100)
    prompt, output = random.integers(0, VOCAB, 20).tolist(), random.integers(0, 40, 60).tolist()
    wanted = truth(sampling, row, prompt, output)
    met = support(sampling, row, prompt, output)
    # A grid of 4000 numbers puts at most one more or less into an interval.
    for token in range(VOCAB):
        assert met.get(token, 0.0) == pytest.approx(wanted[token], abs=1.01 / 4000)
    assert {token for token in met if wanted[token] == 0} == set()


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.99])
def test_a_large_vocabulary_has_the_same_nucleus(top_p: float) -> None:
    from llmc.serve.sampler import _nucleus

    for scale in (0.5, 2.0, 6.0):
        row = logits(3, 50_000, scale)
        weights = np.exp(row - row.max())
        kept = _nucleus(weights, top_p)
        wanted = np.flatnonzero(truth(Sampling(top_p=top_p), row, [0], []))
        # transformers sums up in float32: a token at the very border may fall on the other side.
        assert len(set(kept.tolist()) ^ set(wanted.tolist())) <= 2 + len(wanted) // 2000


def test_draws_follow_the_distribution() -> None:
    row = logits(5, 2000, 1.0)
    row[:4] += 4
    sampler = Sampler(Sampling(seed=11, top_k=6), [], NEVER)
    count = 20_000
    counts = np.bincount([sampler.sample(row) for _ in range(count)], minlength=2000)
    wanted = truth(Sampling(top_k=6), row, [0], [])
    assert counts[wanted == 0].sum() == 0
    kept = wanted > 0
    chi2 = float((((counts - count * wanted) ** 2)[kept] / (count * wanted[kept])).sum())
    # 5 degrees of freedom: 25.7 is exceeded by one honest sampler in ten thousand; the seed is fixed.
    assert chi2 < 25.7


def test_every_block_of_a_large_row_is_reached_in_proportion() -> None:
    row = np.zeros(3000, np.float32)
    row[:1000] = math.log(3)
    sampler = Sampler(Sampling(seed=2), [], NEVER)
    tokens = np.array([sampler.sample(row) for _ in range(6000)])
    assert (tokens < 1000).mean() == pytest.approx(0.6, abs=0.03)
    assert len(set((tokens // 100).tolist())) == 30


def test_greedy_takes_the_first_of_the_largest() -> None:
    row = logits(1)
    for values in ({"temperature": 0}, {"temperature": 1e-9}, {"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}):
        assert Sampler(Sampling(**values), [], NEVER).sample(row) == row.argmax()
    assert Sampler(Sampling(temperature=2e-5, seed=1), [], NEVER).sample(row) == row.argmax()


def test_a_seed_decides_and_choices_differ() -> None:
    rows = [logits(seed) for seed in range(30)]

    def draw(seed: int | None, index: int = 0) -> list[int]:
        sampler = Sampler(Sampling(seed=seed), [], NEVER, index=index)
        return [sampler.sample(row) for row in rows]

    assert draw(1) == draw(1)
    assert draw(-1) == draw(-1)
    different = [draw(1), draw(2), draw(-1), draw(1, index=1), draw(None), draw(None)]
    assert len({tuple(each) for each in different}) == len(different)


def test_minimum_length_allowed_tokens_and_bias() -> None:
    row = logits(2)
    best = int(row.argmax())
    ends = frozenset({best})
    sampler = Sampler(Sampling(temperature=0, min_tokens=2), [], ends)
    tokens = [sampler.sample(row) for _ in range(3)]
    assert best not in tokens[:2]
    assert tokens[2] == best
    few = Sampler(Sampling(allowed_token_ids=[7, 9, 11], seed=0), [], NEVER)
    assert {few.sample(row) for _ in range(200)} <= {7, 9, 11}
    assert Sampler(Sampling(temperature=0, logit_bias={5: 100.0}), [], NEVER).sample(row) == 5
    assert Sampler(Sampling(temperature=0, logit_bias={best: -100.0}), [], NEVER).sample(row) != best


def test_penalties_follow_what_was_generated() -> None:
    row = np.zeros(8, np.float32)
    row[3], row[5] = 1.0, 0.9
    sampler = Sampler(Sampling(temperature=0, frequency_penalty=0.2), [3, 3, 3], NEVER)
    assert [sampler.sample(row) for _ in range(4)] == [3, 5, 3, 5]
    repeated = Sampler(Sampling(temperature=0, repetition_penalty=2.0), [3], NEVER)
    assert [repeated.sample(row) for _ in range(2)] == [5, 3]


def test_the_row_is_not_changed() -> None:
    row = logits(0)
    before = row.copy()
    row.flags.writeable = False
    values = {"logit_bias": {1: 5.0}, "repetition_penalty": 1.2, "top_p": 0.9, "min_p": 0.1, "temperature": 0.5}
    Sampler(Sampling(**values), [1, 2], NEVER).sample(row)
    logprobs(row, 3, 5)
    assert (row == before).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error(bad: float, temperature: float) -> None:
    row = logits(0)
    row[17 if bad != -math.inf else slice(None)] = bad
    with pytest.raises(EngineError, match="not finite"):
        Sampler(Sampling(temperature=temperature), [], NEVER).sample(row)


def test_a_few_masked_tokens_are_fine() -> None:
    row = logits(0)
    row[100:] = -math.inf
    for values in ({}, {"top_p": 0.9}, {"top_k": 200}, {"temperature": 0}, {"top_k": 200, "top_p": 0.5, "min_p": 0.01}):
        sampler = Sampler(Sampling(seed=1, **values), [], NEVER)
        assert all(sampler.sample(row) < 100 for _ in range(300))


def test_logprobs_are_the_raw_log_softmax() -> None:
    import torch

    row = logits(4)
    wanted = torch.log_softmax(torch.from_numpy(row).double(), -1)
    for token, top in ((3, 0), (int(row.argmax()), 5), (9, VOCAB), (8, VOCAB + 1)):
        found = logprobs(row, token, top)
        assert found.logprob == pytest.approx(float(wanted[token]), abs=1e-6)
        best = torch.topk(wanted, min(top, VOCAB))
        assert [each for each, _ in found.top] == best.indices.tolist()
        assert [value for _, value in found.top] == pytest.approx(best.values.tolist(), abs=1e-6)
        assert found.rank == int((wanted > wanted[token]).sum())


def test_settings_that_leave_no_token_are_the_request_s_mistake() -> None:
    sampling = Sampling(temperature=0, allowed_token_ids=[2], min_tokens=1)
    with pytest.raises(UserError, match="no token to choose"):
        Sampler(sampling, (5,), frozenset({2})).sample(np.zeros(8, np.float32))
