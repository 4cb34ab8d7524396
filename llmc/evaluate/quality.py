"""What quantizing cost: the original and the result walk through the same text side by side, a layer at a time.

    original   embed ─► layer 0 ─► layer 1 ─► ... ─► head ─► perplexity
    result     embed'─► layer 0'─► layer 1'─► ... ─► head'─► perplexity, KL, top-1
    part 1     embed ─► layer 0 ─► layer 1'─► ... ─► head ─► KL: what this part alone costs

A *lane* takes some parts from the result and all others from the original. Until the first part that differs it is the
original, and shares its states. Memory: one layer of both, and the states of every lane.

Knows: checkpoints of one model, before and after. Does not know: how the result was made.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llmc import text
from llmc.checkpoint import Checkpoint
from llmc.evaluate.agreement import Agreement
from llmc.evaluate.perplexity import ROWS, Score, add, log_softmax
from llmc.layerwise import States, Walker
from llmc.names import FRONT, TAIL, parts
from llmc.runtime import Tokens
from llmc.tokenizer import Tokenizer

Progress = Callable[[int, int], None]

_RESULT = "result"


@dataclass
class Lane:
    """What was measured of one lane."""

    score: Score = field(default_factory=Score)
    agreement: Agreement = field(default_factory=Agreement)


@dataclass(frozen=True)
class Quality:
    """What was measured of a quantized checkpoint.

    Attributes:
        original, result: Perplexities.
        kl, top1: Of the result against the original: mean divergence in nats, share of equal first choices.
        tokens: Predicted tokens.
        source: Where the text came from, for people.
    """

    original: float
    result: float
    kl: float
    top1: float
    tokens: int
    source: str = ""

    @property
    def increase(self) -> float:
        """Of the perplexity, as a share of the original's."""
        return self.result / self.original - 1

    def figures(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "tokens": self.tokens,
            "perplexity_before": round(self.original, 5),
            "perplexity_after": round(self.result, 5),
            "increase": round(self.increase, 5),
            "kl": round(self.kl, 6),
            "top1": round(self.top1, 5),
        }


def quality(
    original: Checkpoint, result: Checkpoint, windows: Sequence[Tokens], *, progress: Progress | None = None
) -> Quality:
    """Measure a quantized checkpoint.

    Args:
        windows: int64 [tokens] each, two tokens or more.
    """
    baseline, lanes = walk(original, result, windows, {_RESULT: list(parts(original.spec))}, progress)
    after = lanes[_RESULT]
    return Quality(
        baseline.perplexity, after.score.perplexity, after.agreement.kl, after.agreement.top1, baseline.tokens
    )


def sensitivity(
    original: Checkpoint, result: Checkpoint, windows: Sequence[Tokens], *, progress: Progress | None = None
) -> dict[str, float]:
    """What each part alone costs, in one walk: a lane leaves the original at its part, and returns to its weights.

    With L layers that is L (L + 1) / 2 layers and L + 2 heads to compute for each window, and one reading of both
    checkpoints; the states of every lane are held.

    Returns:
        Part -> mean KL in nats per token when it alone is quantized. A tied model's head is its embedding.
    """
    alone = {part: [part] for part in parts(original.spec)}
    if original.spec.tied:
        alone[FRONT] += alone.pop(TAIL)
    _, lanes = walk(original, result, windows, alone, progress)
    return {part: lane.agreement.kl for part, lane in lanes.items()}


@torch.inference_mode()
def walk(
    original: Checkpoint,
    result: Checkpoint,
    windows: Sequence[Tokens],
    lanes: Mapping[str, Collection[str]],
    progress: Progress | None = None,
) -> tuple[Score, dict[str, Lane]]:
    """Run lanes beside the original.

    Args:
        lanes: Name -> the parts (`llmc.layerwise.parts`) that it has from the result.

    Returns:
        The original's score, and what was measured of each lane.
    """
    exact, rounded = Walker(original), Walker(result)
    names = list(parts(original.spec))
    exact.load(FRONT)
    rounded.load(FRONT)
    baseline, other = exact.enter(windows), rounded.enter(windows)
    states = {lane: other for lane, chosen in lanes.items() if FRONT in chosen}
    for done, part in enumerate(names[1:-1]):
        exact.drop()
        rounded.drop()
        layers = exact.load(part), rounded.load(part)
        for lane, chosen in lanes.items():
            if lane in states or part in chosen:
                walker, layer = (rounded, layers[1]) if part in chosen else (exact, layers[0])
                before = enumerate(states.get(lane, baseline))
                states[lane] = States(walker.through(layer, state, window) for window, state in before)
        exact.advance(layers[0], baseline)
        if progress:
            progress(done + 1, len(names) - 1)
    exact.drop()
    rounded.drop()
    exact.load(TAIL)
    rounded.load(TAIL)
    found, score = {lane: Lane() for lane in lanes}, Score()
    for index, window in enumerate(windows):
        ends = [
            (found[lane], rounded if TAIL in chosen else exact, states.get(lane, baseline)[index])
            for lane, chosen in lanes.items()
        ]
        _compare(window, score, (exact, baseline[index]), ends)
    if progress:
        progress(len(names) - 1, len(names) - 1)
    return score, found


def _compare(
    window: Tokens,
    score: Score,
    baseline: tuple[Walker, Tensor],
    lanes: Sequence[tuple[Lane, Walker, Tensor]],
) -> None:
    """Logits of one window by all lanes, some rows at a time."""
    targets = window[1:]
    for start in range(0, len(targets), ROWS):
        rows = slice(start, min(start + ROWS, len(targets)))
        expected = log_softmax(_logits(*baseline, rows))
        add(score, expected, targets[rows])
        for lane, walker, state in lanes:
            met = log_softmax(_logits(walker, state, rows))
            add(lane.score, met, targets[rows])
            lane.agreement.add(expected, met)


def _logits(walker: Walker, state: Tensor, rows: slice) -> Any:
    return walker.decoder.logits(walker.decoder.leave(state[0, rows])).numpy()


class TextJudge:
    """Measures checkpoints on a text.

    Args:
        content: The text.
        source: Where it comes from, for people.
        tokens: Read at most.
        window: Tokens read at a time.
    """

    def __init__(
        self,
        content: str,
        source: str,
        *,
        tokens: int = 2048,
        window: int = 512,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        self._content, self._source = content, source
        self._tokens, self._window = tokens, window
        self._progress = progress or (lambda *_: None)

    def __call__(self, original: Checkpoint, result: Checkpoint) -> Quality:
        length = min(self._window, original.spec.max_positions)
        windows = text.windows(self._content, Tokenizer.load(original.folder), length, limit=self._tokens)
        found = quality(original, result, windows, progress=lambda done, of: self._progress("judging", done, of))
        return dataclasses.replace(found, source=self._source)
