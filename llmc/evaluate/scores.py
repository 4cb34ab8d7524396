"""What a scoring head says of texts, one by one, and how often it prefers the chosen answer to the rejected one.

Knows: the Runner protocol, and the files that reward models are tested with. Does not know: HTTP, folders.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmc.errors import UserError
from llmc.prompt import score_ids
from llmc.runtime import Chunk, Runner
from llmc.tokenizer import Tokenizer

CHUNK_TOKENS = 128


@dataclass(frozen=True, slots=True)
class Scored:
    """One row of a file.

    Attributes:
        scores: Of the text, or of the chosen answer; as many as the head has labels.
        rejected: Of the rejected answer, where the row has a pair.
    """

    scores: list[float]
    rejected: list[float] | None = None


def scores(runner: Runner, ids: Sequence[int]) -> list[float]:
    """The scores of a text's last token.

    Args:
        ids: See `llmc.prompt.score_ids`.

    Raises:
        UserError: The model has no scoring head, or the text does not fit it.
    """
    if not runner.limits.num_scores:
        raise UserError("this model has no scoring head: give one whose checkpoint has a 'score.weight'")
    if not 0 < len(ids) <= runner.limits.max_length:
        raise UserError(f"a text of {len(ids)} tokens; this model takes 1 to {runner.limits.max_length}")
    tokens = np.array(ids, np.int64)
    start, row = runner.claim(0, tokens), []
    try:
        while start < len(tokens):
            part = tokens[start : start + CHUNK_TOKENS]
            start += len(part)
            (rows,) = runner.step([Chunk(0, start - len(part), part, int(start == len(tokens)))])
            row = rows.tolist()
    finally:
        runner.free(0)
    found: list[float] = row[-1]
    return found


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a file with one JSON object a line.

    Raises:
        UserError: It cannot be read, or a line is none; with its number.
    """
    found = []
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if line.strip():
                found.append(json.loads(line))
                if not isinstance(found[-1], dict):
                    raise UserError(f"{path}, line {number}: expected a JSON object")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    except ValueError as error:
        raise UserError(f"{path}, line {number}: {error}") from None
    if not found:
        raise UserError(f"{path} has no rows")
    return found


def score_rows(
    runner: Runner,
    tokenizer: Tokenizer,
    rows: Sequence[Mapping[str, Any]],
    pad: int | None,
    progress: Callable[[int, int], object] | None = None,
) -> Iterator[Scored]:
    """Score each row: its `text`, its `messages`, or its `chosen` and `rejected` answers to its `prompt`.

    `chosen` and `rejected` are texts, or conversations; without a `prompt` they are whole.

    Raises:
        UserError: A row is none of these, or too long; with its number.
    """
    for number, row in enumerate(rows, 1):
        try:
            given = [_given(row, key) for key in ("chosen", "rejected")] if "chosen" in row else [_given(row)]
            found = [scores(runner, score_ids(tokenizer, each, pad)) for each in given]
        except UserError as error:
            raise UserError(f"row {number}: {error}") from None
        yield Scored(*found)
        if progress:
            progress(number, len(rows))


def _given(row: Mapping[str, Any], key: str = "") -> Any:
    key = key or next((name for name in ("text", "messages") if name in row), "text")
    value, prompt = row.get(key), row.get("prompt")
    if isinstance(value, list) and value and all(isinstance(turn, Mapping) for turn in value):
        return value
    if not isinstance(value, str) or not isinstance(prompt, str | None):
        raise UserError("expected 'text', 'messages', or 'chosen' and 'rejected', as texts or lists of messages")
    return value if prompt is None else (prompt, value)


def accuracy(found: Sequence[Scored]) -> float | None:
    """How often the chosen answer has the higher score (of the first label); None without pairs."""
    pairs = [each.scores[0] > each.rejected[0] for each in found if each.rejected is not None]
    return sum(pairs) / len(pairs) if pairs else None
