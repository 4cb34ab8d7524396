"""Whether two forms of a model compute the same: source, checkpoint, engine, running server.

Both read the same tokens. Where both give logits these are compared, and the hidden states after each layer where
both can say those; a server gives log-probabilities alone, of the tokens and of the likeliest ones.

    difference of logits      |a - b|, the largest and the mean; relative to the largest |a|, their scale
    difference of a layer     ||a - b|| / ||a|| over the hidden state of a token, the largest of all tokens

The norm of a whole hidden state is its scale, because some models keep single features a thousand times larger than
the rest in it (Sun et al. 2024, "Massive activations"), beside which nothing else would show.

Knows arithmetic and what a side can say. Does not know: folders, texts, how any side computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from llmc.errors import UserError
from llmc.evaluate.agreement import Agreement
from llmc.evaluate.perplexity import ROWS, Progress, log_softmax
from llmc.runtime import Chunk, Logits, Runner, Tokens
from llmc.tokenizer import Tokenizer

Array = npt.NDArray[Any]

# A piece of what both sides read: tokens, or a text where neither side says how it is cut into tokens.
Piece = Tokens | str

TOP = 5  # likeliest tokens that a server is asked for: OpenAI's own limit


@dataclass(frozen=True, slots=True)
class Reading:
    """What a side computes of a piece.

    Attributes:
        logits: float32 [tokens, vocab].
        states: float32 [tokens, hidden] before the first layer, and after each; empty when not asked for.
    """

    logits: Logits
    states: Sequence[Array] = ()


@dataclass(frozen=True, slots=True)
class Scores:
    """What a server says of a piece.

    Attributes:
        words: The tokens as texts.
        logprobs: Of each token but the first, nats.
        top: For each token but the first, the likeliest in its place: text -> log-probability.
    """

    words: Sequence[str]
    logprobs: Sequence[float]
    top: Sequence[Mapping[str, float]]


@dataclass(frozen=True)
class Side:
    """One of the two.

    Attributes:
        name: As the user gave it.
        kind: "hf", "source" (computed by the reference decoder), "checkpoint", "engine" or "server".
        close: Gives its memory back.
        vocab_size: Width of its logits; None where it does not say.
        max_length: Tokens that it can read; None where there is no limit.
        tokenizer: None where it has none that llmc can read.
        word: A token as a text, as servers write it.
        read: (tokens, whether the states are wanted) -> what it computes; None for a server.
        has_states: Whether `read` can give states.
        score: What a server says; None for the others.
    """

    name: str
    kind: str
    close: Callable[[], object]
    vocab_size: int | None = None
    max_length: int | None = None
    tokenizer: Tokenizer | None = None
    word: Callable[[int], str] = str
    read: Callable[[Tokens, bool], Reading] | None = None
    has_states: bool = False
    score: Callable[[Piece], Scores] | None = None


@dataclass
class Difference:
    """Of numbers that should be equal."""

    count: int = 0
    largest: float = 0.0
    total: float = 0.0
    scale: float = 0.0

    def add(self, a: Array, b: Array) -> None:
        """Count arrays of one shape. A NaN makes the largest difference one, and is never within a tolerance."""
        if a.size:
            distance = np.abs(a.astype(np.float64) - b)
            self.count += a.size
            self.total += float(distance.sum())
            self.largest = float(np.maximum(self.largest, distance.max()))
            self.scale = float(np.maximum(self.scale, np.abs(a).max()))

    @property
    def mean(self) -> float:
        return self.total / self.count

    @property
    def relative(self) -> float:
        return self.largest / self.scale if self.scale else self.largest


@dataclass
class Parity:
    """What was found.

    Attributes:
        tolerance: What `difference.relative` may be.
        of: What was compared: "logits" or "log-probabilities".
        tokens: Places where they were.
        agreement: KL(a || b) and how often the likeliest token is the same; its divergence means nothing for
            log-probabilities of single tokens.
        states: The relative difference before the first layer and after each; None where a side cannot say.
        top: Of the likeliest tokens that both name; None for logits.
    """

    a: Side
    b: Side
    tolerance: float
    of: str
    difference: Difference = field(default_factory=Difference)
    agreement: Agreement = field(default_factory=Agreement)
    states: list[float] | None = None
    top: Difference | None = None

    @property
    def is_within(self) -> bool:
        return self.difference.relative <= self.tolerance

    @property
    def first(self) -> int | None:
        """Index into `states` of the first that differs beyond tolerance, None when none does."""
        return next((at for at, value in enumerate(self.states or ()) if not value <= self.tolerance), None)

    def figures(self) -> dict[str, Any]:
        """Plain values, for a table or for JSON; None for what is not finite."""
        names = [state_name(at) for at in range(len(self.states or ()))]
        return {
            "a": {"name": self.a.name, "kind": self.a.kind},
            "b": {"name": self.b.name, "kind": self.b.kind},
            "compared": self.of,
            "tokens": self.agreement.tokens,
            "max_difference": _finite(self.difference.largest),
            "mean_difference": _finite(self.difference.mean),
            "scale": _finite(self.difference.scale),
            "relative_difference": _finite(self.difference.relative),
            "top_max_difference": self.top and _finite(self.top.largest),
            "kl": _finite(self.agreement.kl) if self.of == "logits" else None,
            "top1": self.agreement.top1,
            "layers": None if self.states is None else dict(zip(names, map(_finite, self.states), strict=True)),
            "first_layer": None if self.first is None else names[self.first],
            "tolerance": self.tolerance,
            "within": self.is_within,
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def state_name(index: int) -> str:
    """How one of `Parity.states` is called."""
    return f"layer {index - 1}" if index else "embeddings"


def compare(a: Side, b: Side, pieces: Sequence[Piece], *, tolerance: float, progress: Progress | None = None) -> Parity:
    """Let both read all pieces.

    Args:
        pieces: Tokens, two or more each; texts only when both sides are servers.
        tolerance: What the largest difference may be, relative to the scale of A's numbers.
        progress: Called after each piece with (pieces done, pieces).

    Raises:
        UserError: They choose among different words, or have different numbers of layers.
    """
    both_read = a.read is not None and b.read is not None
    found = Parity(a, b, tolerance, "logits" if both_read else "log-probabilities")
    for done, piece in enumerate(pieces):
        if a.read and b.read and not isinstance(piece, str):
            with_states = a.has_states and b.has_states
            _add_readings(found, a.read(piece, with_states), b.read(piece, with_states))
        else:
            _add_scores(found, _scores(a, piece), _scores(b, piece))
        if progress:
            progress(done + 1, len(pieces))
    return found


def _add_readings(found: Parity, a: Reading, b: Reading) -> None:
    if a.logits.shape != b.logits.shape:
        raise UserError(
            f"{found.a.name} gives logits of {a.logits.shape[1]} tokens, {found.b.name} of {b.logits.shape[1]}"
        )
    for row in range(0, len(a.logits), ROWS):
        ours, theirs = a.logits[row : row + ROWS], b.logits[row : row + ROWS]
        found.difference.add(ours, theirs)
        found.agreement.add(log_softmax(ours), log_softmax(theirs))
    shapes = [[state.shape for state in reading.states] for reading in (a, b)]
    if shapes[0] != shapes[1]:
        raise UserError(
            f"{found.a.name} has {len(shapes[0]) - 1} layers of width {shapes[0][0][1]}, "
            f"{found.b.name} {len(shapes[1]) - 1} of width {shapes[1][0][1]}"
        )
    if shapes[0]:
        met = [_apart(ours, theirs) for ours, theirs in zip(a.states, b.states, strict=True)]
        found.states = np.maximum(found.states or 0.0, met).tolist()


def _apart(a: Array, b: Array) -> float:
    """The relative difference of one layer's states [tokens, hidden]."""
    length = np.linalg.norm(a.astype(np.float64), axis=1)
    distance = np.linalg.norm(a.astype(np.float64) - b, axis=1)
    return float((distance / np.where(length > 0, length, 1.0)).max())


def _add_scores(found: Parity, a: Scores, b: Scores) -> None:
    if list(a.words) != list(b.words):
        at = next((at for at, pair in enumerate(zip(a.words, b.words, strict=False)) if pair[0] != pair[1]), 0)
        raise UserError(
            f"{found.a.name} and {found.b.name} have different tokenizers: they read {list(a.words[at : at + 4])} and "
            f"{list(b.words[at : at + 4])} in the same place"
        )
    found.difference.add(np.array(a.logprobs), np.array(b.logprobs))
    found.top = found.top or Difference()
    for ours, theirs in zip(a.top, b.top, strict=True):
        common = [word for word in ours if word in theirs]
        found.top.add(np.array([ours[word] for word in common]), np.array([theirs[word] for word in common]))
        found.agreement.tokens += 1
        found.agreement.agreed += max(ours, key=ours.__getitem__) == max(theirs, key=theirs.__getitem__)


def _scores(side: Side, piece: Piece) -> Scores:
    """What a server says, or what it would say if this side were served."""
    if side.score is not None:
        return side.score(piece)
    if side.read is None or isinstance(piece, str):
        raise ValueError(f"{side.name} cannot score {piece!r}")
    logprobs: list[float] = []
    top: list[dict[str, float]] = []
    rows = side.read(piece, False).logits
    for start in range(0, len(piece) - 1, ROWS):
        block = log_softmax(rows[start : min(start + ROWS, len(piece) - 1)])
        targets = piece[start + 1 : start + 1 + len(block)]
        logprobs += block[np.arange(len(block)), targets].tolist()
        for row, target in zip(block, targets, strict=True):
            best = np.argpartition(row, -min(TOP, len(row)))[-TOP:]
            # Of tokens with the same text (halves of a character) a server's answer holds the likeliest.
            order = sorted({*best.tolist(), int(target)}, key=lambda token: float(row[token]))
            top.append({side.word(token): float(row[token]) for token in order})
    return Scores([side.word(int(token)) for token in piece], logprobs, top)


def read_with(runner: Runner, tokens: Tokens) -> Logits:
    """The logits of all tokens of a runner, [tokens, vocab], computed as a prompt is."""
    # A claim that names only the first token finds nothing to reuse, so every row is computed.
    runner.claim(0, tokens[:1])
    try:
        return runner.step([Chunk(0, 0, tokens, logits=len(tokens))])[0]
    finally:
        runner.free(0)
