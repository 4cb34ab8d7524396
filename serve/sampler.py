"""From a row of logits to the next token, one sequence at a time.

The order is that of transformers' logits processors and of vLLM: allowed tokens, grammar, minimum length, bias,
penalties; then temperature, top_k, top_p, min_p; then a draw. Log-probabilities are those of the model itself, before
all of it, as OpenAI reports them.

A vocabulary has 150,000 entries and a step many rows, so nothing here sorts a whole row, and a greedy row without
penalties costs one argmax.

Knows: numpy rows and a sequence's own history. Does not know: sequences of others, text, the runner.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from llmc.errors import EngineError, UserError
from llmc.serve.grammar import Matcher
from llmc.serve.request import Sampling

Row = npt.NDArray[np.float32]

# Below this, dividing by the temperature changes nothing but the overflow (vLLM's bound, too).
GREEDY_TEMPERATURE = 1e-5
# Entries that are sorted at once, and that are summed up before one of them is looked for.
SORTED = 2048
BLOCK = 512


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural logarithms of probabilities at one position.

    Attributes:
        token, logprob: The token that stands there.
        rank: How many tokens are likelier.
        top: The likeliest tokens, best first, as (token, logprob).
    """

    token: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


class Sampler:
    """Chooses the tokens of one sequence."""

    def __init__(
        self,
        sampling: Sampling,
        prompt: Iterable[int],
        ends: frozenset[int],
        *,
        index: int = 0,
        matcher: Matcher | None = None,
    ) -> None:
        """Begin a sequence.

        Args:
            prompt: Tokens that the repetition penalty counts from the start.
            ends: Tokens that must not come before `min_tokens`.
            index: Which choice of a request this is: each draws its own numbers from the request's seed.
            matcher: Says which tokens its grammar allows.
        """
        self._matcher = matcher
        self._sampling = sampling
        self._greedy = sampling.temperature < GREEDY_TEMPERATURE or sampling.top_p == 0 or sampling.top_k == 1
        entropy = None if sampling.seed is None else [sampling.seed % 2**64, index]
        self._random = None if self._greedy else np.random.Generator(np.random.PCG64(entropy))
        self._ends = np.array(sorted(ends), np.int64)
        self._bias_ids = np.array(list(sampling.logit_bias), np.int64)
        self._bias = np.array(list(sampling.logit_bias.values()), np.float32)
        allowed = sampling.allowed_token_ids
        self._allowed = None if allowed is None else np.array(sorted(set(allowed)), np.int64)
        self._generated = 0
        self._history = _History(prompt) if _penalizes(sampling) else None
        self._plain = not (self._history or allowed or sampling.logit_bias or sampling.min_tokens or matcher)

    @property
    def finished(self) -> bool:
        """The grammar lets nothing follow."""
        return self._matcher is not None and self._matcher.finished

    def sample(self, logits: Row) -> int:
        """Choose a token and remember it.

        Args:
            logits: float32 [vocab]; not changed.

        Raises:
            EngineError: There is nothing to choose from, because the logits are not finite.
            UserError: The grammar has no way on, or the request's own settings leave no token.
        """
        row = logits if self._plain else self._adjusted(logits)
        best = int(row.argmax())
        if row[best] == -np.inf and logits[logits.argmax()] > -np.inf:
            raise UserError(
                "allowed_token_ids, min_tokens and the form of the output together leave no token to choose"
            )
        # argmax finds a NaN before anything else.
        if not np.isfinite(row[best]):
            raise EngineError(f"the model's logits are not finite (token {best}: {row[best]}): nothing can be sampled")
        token = best if self._random is None else self._draw(row, best, self._random)
        self._generated += 1
        if self._history is not None:
            self._history.add(token)
        if self._matcher is not None:
            self._matcher.advance(token)
        return token

    def _adjusted(self, logits: Row) -> Row:
        """The logits after everything that may change which is the largest."""
        row = logits.copy()
        if self._allowed is not None:
            row.fill(-np.inf)
            row[self._allowed] = logits[self._allowed]
        mask = None if self._matcher is None else self._matcher.allowed()
        if mask is not None:
            row[~mask] = -np.inf
        # Where a grammar allows nothing but the end, it ends.
        if self._generated < self._sampling.min_tokens and not self._only_end(mask):
            row[self._ends] = -np.inf
        row[self._bias_ids] += self._bias
        if self._history is not None:
            self._history.penalize(row, self._sampling)
        return row

    def _only_end(self, mask: npt.NDArray[np.bool_] | None) -> bool:
        return mask is not None and int(mask.sum()) == int(mask[self._ends].sum())

    def _draw(self, row: Row, best: int, random: np.random.Generator) -> int:
        sampling = self._sampling
        # ids stays None while all tokens are candidates: no array of all ids is made.
        ids: npt.NDArray[np.int64] | None = None
        if 0 < sampling.top_k < row.size:
            # As transformers has it, tokens that tie with the k-th stay.
            threshold = np.partition(row, row.size - sampling.top_k)[row.size - sampling.top_k]
            ids = np.flatnonzero(row >= threshold)
        weights = row - row[best] if ids is None else row[ids] - row[best]
        if sampling.temperature != 1:
            weights *= np.float32(1 / sampling.temperature)
        np.exp(weights, out=weights)
        if sampling.top_p < 1:
            kept = _nucleus(weights, sampling.top_p)
            ids, weights = kept if ids is None else ids[kept], weights[kept]
        if sampling.min_p > 0:
            # The likeliest has weight 1.
            kept = np.flatnonzero(weights >= sampling.min_p)
            ids, weights = kept if ids is None else ids[kept], weights[kept]
        chosen = _pick(weights, random)
        return chosen if ids is None else int(ids[chosen])


def _penalizes(sampling: Sampling) -> bool:
    return bool(sampling.repetition_penalty != 1 or sampling.presence_penalty or sampling.frequency_penalty)


def _nucleus(weights: Row, top_p: float) -> npt.NDArray[np.int64]:
    """Indices of the fewest entries whose sum is at least `top_p` of the whole (Holtzman et al. 2019), in their order.

    Entries below (1 - top_p) / size of the whole sum up to less than 1 - top_p, so they are never needed. Among the
    others, the border is searched for by halving their range, and only the last few are sorted. Entries that tie with
    the smallest one kept are kept.
    """
    needed = top_p * float(weights.sum(dtype=np.float64))
    rest = weights[weights >= (1 - top_p) / top_p * needed / weights.size]
    while rest.size > SORTED:
        low, high = float(rest.min()), float(rest.max())
        above = rest >= np.float32((low * high) ** 0.5)
        upper = rest[above]
        if upper.size == rest.size or upper.size == 0:
            break
        mass = float(upper.sum(dtype=np.float64))
        if mass >= needed:
            rest = upper
        else:
            needed -= mass
            rest = rest[~above]
    rest = np.sort(rest)[::-1]
    last = int(np.searchsorted(np.cumsum(rest, dtype=np.float64), needed))
    return np.flatnonzero(weights >= rest[min(last, rest.size - 1)])


def _pick(weights: Row, random: np.random.Generator) -> int:
    """An index, with a probability in proportion to its weight: first a block, then one of its entries."""
    starts = np.arange(0, weights.size, BLOCK)
    sums = np.cumsum(np.add.reduceat(weights, starts, dtype=np.float64))
    target = random.random() * sums[-1]
    block = min(int(np.searchsorted(sums, target, side="right")), starts.size - 1)
    inside = np.cumsum(weights[starts[block] : starts[block] + BLOCK], dtype=np.float64)
    target -= sums[block] - inside[-1]
    # Rounding may put the target beyond the last entry that has any weight.
    place = min(int(np.searchsorted(inside, target, side="right")), int(np.searchsorted(inside, inside[-1])))
    return int(starts[block]) + place


class _History:
    """The distinct tokens of a sequence, and how often each was generated."""

    def __init__(self, prompt: Iterable[int]) -> None:
        self._place = {token: place for place, token in enumerate(dict.fromkeys(prompt))}
        self._ids = np.array(list(self._place), np.int64)
        self._counts = np.zeros(len(self._place), np.float32)

    def add(self, token: int) -> None:
        place = self._place.setdefault(token, len(self._place))
        if place >= self._ids.size:
            room = max(64, self._ids.size)
            self._ids = np.append(self._ids, np.zeros(room, np.int64))
            self._counts = np.append(self._counts, np.zeros(room, np.float32))
        self._ids[place] = token
        self._counts[place] += 1

    def penalize(self, row: Row, sampling: Sampling) -> None:
        """Change `row` in place: repetition (Keskar et al. 2019), then OpenAI's frequency and presence penalties."""
        count = len(self._place)
        ids, counts = self._ids[:count], self._counts[:count]
        values = row[ids]
        factor = np.float32(sampling.repetition_penalty)
        values = np.where(values > 0, values / factor, values * factor)
        values -= np.float32(sampling.frequency_penalty) * counts
        values -= np.float32(sampling.presence_penalty) * (counts > 0)
        row[ids] = values


def logprobs(logits: Row, token: int, top: int) -> TokenLogprobs:
    """Log-softmax of a raw row at `token` and at the `top` likeliest tokens.

    Args:
        logits: float32 [vocab].
    """
    peak = logits.max()
    normalizer = float(peak) + float(np.log(np.exp(logits - peak).sum(dtype=np.float64)))
    rank = int(np.count_nonzero(logits > logits[token]))
    best: list[Any] = []
    if top:
        found = np.argpartition(logits, logits.size - top)[logits.size - top :] if top < logits.size else None
        candidates = np.arange(logits.size) if found is None else found
        best = candidates[np.argsort(-logits[candidates], kind="stable")].tolist()
    pairs = tuple((each, float(logits[each]) - normalizer) for each in best)
    return TokenLogprobs(token, float(logits[token]) - normalizer, rank, pairs)
