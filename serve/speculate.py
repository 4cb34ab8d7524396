"""Speculative decoding: tokens that something cheap foretells are checked in one step of the model. Lossless.

    tokens ──► drafter ──► step of 1 + k tokens ──► k + 1 rows of logits ──► the sequence's sampler, row after row
                                                                              as long as it chooses what was drafted

A drafter names one token a place, so it is a proposal of certainty, and rejection sampling (Leviathan et al. 2023,
section 2.3) comes down to this: draw from the model's own distribution p; what was drafted is thereby accepted with
p(draft), and any other outcome is a draw from the rest. So drafts change no distribution, and no text of a seed either.
Penalties, grammars and log-probabilities need no care: each row passes through the same sampler as without drafts.

A chunk of several tokens is a run of its own (llmc/serve/runners/ort.py) while single tokens share one, so that drafts
pay only for a sequence that decodes alone: others in the step, and nothing is drafted.

Knows tokens, and the Runner protocol for the draft model. Does not know sampling, the scheduler, text.
"""

from __future__ import annotations

from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from llmc.errors import UserError
from llmc.log import logger
from llmc.runtime import Chunk, Runner
from llmc.serve.runners import open_runner
from llmc.tokenizer import Tokenizer

DEFAULT_DRAFT = 6
MAX_DRAFT = 16
# Lengths of what is looked up, the first that is found counts.
NGRAMS = (4, 3, 2)
# Tokens of a prompt that a draft model reads at a time.
PIECE = 256


class Drafter(Protocol):
    """Foretells tokens."""

    def draft(self, sequence_id: int, tokens: Tokens[int], count: int, salt: str) -> list[int]:
        """What may follow `tokens`, at most `count` of them; `tokens` begins as it did the last time."""
        ...

    def forget(self, sequence_id: int) -> None:
        """Nothing more is asked of this sequence; unknown ids are ignored."""
        ...

    def close(self) -> None:
        """Give back all memory."""
        ...


@dataclass
class Speculation:
    """How much is drafted of which sequence: more while drafts are accepted, one token while they are not.

    Attributes:
        most: Tokens drafted at a time.
        together: Sequences in a step for which anything is drafted.
    """

    drafter: Drafter
    most: int = DEFAULT_DRAFT
    together: int = 1
    _lengths: dict[int, int] = field(default_factory=dict)

    def draft(self, sequence_id: int, tokens: Tokens[int], room: int, salt: str) -> tuple[int, ...]:
        """Drafted tokens, at most `room`; none where the drafter fails, since nothing depends on it."""
        count = min(room, self._lengths.get(sequence_id, self.most))
        if count <= 0:
            return ()
        try:
            return tuple(self.drafter.draft(sequence_id, tokens, count, salt))
        except Exception:
            logger.exception("drafting failed")
            self.forget(sequence_id)
            return ()

    def learn(self, sequence_id: int, drafted: int, accepted: int) -> None:
        """Draft more of what goes well, and less of what does not."""
        self._lengths[sequence_id] = min(self.most, 2 * drafted) if accepted == drafted else max(1, accepted)

    def forget(self, sequence_id: int) -> None:
        """See Drafter."""
        self._lengths.pop(sequence_id, None)
        self.drafter.forget(sequence_id)


class NGram:
    """Prompt lookup (Saxena 2023): what followed the last tokens where they occurred before, in prompt or output."""

    def __init__(self) -> None:
        self._seen: dict[int, _Seen] = {}

    def draft(self, sequence_id: int, tokens: Tokens[int], count: int, salt: str) -> list[int]:
        """See Drafter."""
        return self._seen.setdefault(sequence_id, _Seen()).following(tokens, count)

    def forget(self, sequence_id: int) -> None:
        """See Drafter."""
        self._seen.pop(sequence_id, None)

    def close(self) -> None:
        """See Drafter."""
        self._seen.clear()


@dataclass(slots=True)
class _Seen:
    """Where n-grams of one sequence ended the last time; grows with the sequence, so that no step searches it all."""

    ends: dict[tuple[int, ...], int] = field(default_factory=dict)
    done: int = 1

    def following(self, tokens: Tokens[int], count: int) -> list[int]:
        # Those at the very end have nothing after them yet.
        for end in range(self.done, len(tokens)):
            for size in NGRAMS:
                if size <= end:
                    self.ends[tuple(tokens[end - size : end])] = end
        self.done = max(1, len(tokens))
        end = next((self.ends[last] for size in NGRAMS if (last := tuple(tokens[-size:])) in self.ends), 0)
        found: list[int] = []
        while end and len(found) < count:
            # Behind the end comes what was found already: a repetition goes on.
            found.append(tokens[end] if end < len(tokens) else found[end - len(tokens)])
            end += 1
        return found


class DraftModel:
    """A smaller model of the same vocabulary, that takes its likeliest token at each place."""

    def __init__(self, runner: Runner, vocab_size: int) -> None:
        """Take over `runner`.

        Args:
            vocab_size: Of the model that checks.
        """
        self._runner = runner
        self._vocab_size = vocab_size
        self._held: dict[int, _Held] = {}

    def draft(self, sequence_id: int, tokens: Tokens[int], count: int, salt: str) -> list[int]:
        """See Drafter."""
        limits = self._runner.limits
        count = min(count, limits.max_length - len(tokens), limits.cache_tokens - len(tokens))
        if count <= 0:
            return []
        held = self._held.get(sequence_id) or self._begin(sequence_id, tokens, salt)
        new = held.missing(tokens)
        self._runner.truncate(sequence_id, len(held.tokens))
        found: list[int] = []
        while len(found) < count and (token := self._next(sequence_id, held, new)) < self._vocab_size:
            found.append(token)
            new = [token]
        return found

    def _begin(self, sequence_id: int, tokens: Tokens[int], salt: str) -> _Held:
        # Sequences that decode together are few; one that is left out for long begins again.
        for other in list(self._held):
            self.forget(other)
        reused = self._runner.claim(sequence_id, np.array(tokens, np.int64), salt)
        self._held[sequence_id] = _Held(list(tokens[:reused]), reused)
        return self._held[sequence_id]

    def _next(self, sequence_id: int, held: _Held, new: list[int]) -> int:
        for start in range(0, len(new), PIECE):
            piece, last = new[start : start + PIECE], start + PIECE >= len(new)
            (rows,) = self._runner.step([Chunk(sequence_id, len(held.tokens), np.array(piece, np.int64), int(last))])
            held.tokens += piece
        return int(rows[-1].argmax())

    def forget(self, sequence_id: int) -> None:
        """See Drafter."""
        if self._held.pop(sequence_id, None) is not None:
            self._runner.free(sequence_id)

    def close(self) -> None:
        """See Drafter."""
        self._held.clear()
        self._runner.close()


@dataclass(slots=True)
class _Held:
    """What the draft model has in its cache of one sequence; the first `known` tokens are the sequence's own."""

    tokens: list[int]
    known: int

    def missing(self, tokens: Tokens[int]) -> list[int]:
        """Drop drafts that were not accepted; returns the tokens that are not computed yet, one at least."""
        most = min(len(self.tokens), len(tokens) - 1)
        while self.known < most and self.tokens[self.known] == tokens[self.known]:
            self.known += 1
        self.known = min(self.known, most)
        del self.tokens[self.known :]
        return list(tokens[self.known :])


@dataclass(frozen=True, slots=True)
class Drafting:
    """What `llmc serve --speculate` was told.

    Attributes:
        most: Tokens drafted at a time.
        model: The draft model's engine; None: n-grams.
    """

    most: int = DEFAULT_DRAFT
    model: Path | None = None

    @classmethod
    def read(cls, how: str) -> Drafting:
        """From words: ngram, ngram:K, draft=ENGINE_FOLDER or draft:K=ENGINE_FOLDER.

        Raises:
            UserError: `how` is none of these.
        """
        kind, _, folder = how.partition("=")
        name, _, count = kind.partition(":")
        most = int(count) if count.isdecimal() and len(count) < 3 else 0 if count else DEFAULT_DRAFT
        if not 1 <= most <= MAX_DRAFT or (name, bool(folder)) not in {("ngram", False), ("draft", True)}:
            raise UserError(
                f"--speculate {how}: say ngram, ngram:K with K from 1 to {MAX_DRAFT}, draft=ENGINE_FOLDER or "
                "draft:K=ENGINE_FOLDER",
                param="speculate",
            )
        return cls(most, Path(folder) if folder else None)


def open_speculation(
    how: Drafting, tokenizer: Tokenizer, vocab_size: int, *, threads: int | None = None
) -> Speculation:
    """Open what drafts.

    Args:
        tokenizer: Of the model that checks.
        vocab_size: Width of its logits.

    Raises:
        UserError: The draft model's tokens mean something else.
    """
    if how.model is None:
        return Speculation(NGram(), how.most)
    if Tokenizer.load(how.model).backend.get_vocab() != tokenizer.backend.get_vocab():
        raise UserError(f"the draft model in {how.model} has another vocabulary: its tokens mean something else")
    return Speculation(DraftModel(open_runner(how.model, threads=threads, max_sequences=1), vocab_size), how.most)
