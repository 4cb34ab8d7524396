"""What is calibrated on: texts, and rows of the training formats as the model will meet them.

    notes.txt, prose.md                       text, cut into windows one after another
    chats.jsonl, train.json                   an object a line; each row begins a window of its own:
        {"messages": [{"role", "content"}]}   a conversation
        {"src", "tgt"}                        PaddleNLP's: a turn each, or lists of turns; of a preference's `response`s
                                              the one with the greatest `sort` is the last answer
        {"prompt", "response" | "chosen"}     a question and its answer (in a preference, the better one)
        {"text"}                              text

Rows with turns go through the model's own chat template, or, where it has none, are the turns one after another, as
pretraining met them. Files take turns, so that however little is read, all of them are in it.

Knows: files, templates, windows. Does not know: who looks at them.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import PositiveInt

from llmc import manifest as manifests
from llmc import prompt, sample_text, text
from llmc.config import Strict
from llmc.errors import UserError
from llmc.runtime import Tokens
from llmc.tokenizer import Tokenizer

JSON_LINES = (".jsonl", ".json", ".ndjson")

Messages = list[dict[str, Any]]


class Calibration(Strict):
    """Text to calibrate on.

    Attributes:
        path: A UTF-8 file, or several, of the kind that the model will meet; None is llmc/sample_text.py.
        window: Tokens read at a time.
        tokens: Tokens read at most.
    """

    path: Path | tuple[Path, ...] | None = None
    window: PositiveInt = 512
    tokens: PositiveInt = 8192

    @property
    def paths(self) -> tuple[Path, ...]:
        return (self.path,) if isinstance(self.path, Path) else self.path or ()

    def parents(self) -> list[manifests.Parent]:
        """The manifest's entries of it."""
        if self.paths:
            found = [(path.read_bytes(), path.name) for path in self.paths]
        else:
            found = [(sample_text.read("calibration").encode(), "sample text")]
        return [
            manifests.Parent(kind="text", sha256=hashlib.sha256(content).hexdigest(), name=name)
            for content, name in found
        ]


@dataclass(frozen=True, slots=True)
class Sample:
    """What was read.

    Attributes:
        windows: int64 [<= window] each.
        source: Where they come from, for people.
    """

    windows: Sequence[Tokens]
    source: str


def read(calibration: Calibration, tokenizer: Tokenizer, longest: int) -> Sample:
    """Read what calibration asks for.

    Args:
        longest: Tokens that the model can read at a time.

    Raises:
        UserError: A file cannot be read, a row has none of the formats, or the model's template refuses one.
    """
    length = min(calibration.window, longest)
    if not calibration.paths:
        windows = text.windows(sample_text.read("calibration"), tokenizer, length, limit=calibration.tokens)
        return Sample(windows, sample_text.describe("calibration"))
    files = [_File(path, tokenizer, length, calibration.tokens) for path in calibration.paths]
    found: list[Tokens] = []
    left = calibration.tokens
    for window in _in_turns([file.windows() for file in files]):
        if left < 2:
            break
        found.append(window[:left])
        left -= len(found[-1])
    return Sample(found, "; ".join(file.description for file in files))


def _in_turns(sources: Sequence[Iterator[Tokens]]) -> Iterator[Tokens]:
    for turn in itertools.zip_longest(*sources):
        yield from (window for window in turn if window is not None)


class _File:
    """A file's windows, read as they are asked for."""

    def __init__(self, path: Path, tokenizer: Tokenizer, length: int, limit: int) -> None:
        self.path, self._tokenizer, self._length, self._limit = path, tokenizer, length, limit
        self._rows: Counter[str] = Counter()

    @property
    def description(self) -> str:
        """For people; of what was read so far."""
        how = "through the model's chat template" if self._tokenizer.chat_template else "turns one after another"
        kinds = [
            f"{count} row{'s' * (count > 1)} of {kind}" + (f", {how}" if kind != "text" else "")
            for kind, count in self._rows.items()
        ]
        return f"{self.path} ({'; '.join(kinds)})" if kinds else str(self.path)

    def windows(self) -> Iterator[Tokens]:
        if self.path.suffix not in JSON_LINES:
            yield from text.windows(text.read(self.path), self._tokenizer, self._length, limit=self._limit)
            return
        for where, row in _rows(self.path):
            kind, ids = self._ids(where, row)
            self._rows[kind] += 1
            pieces = (ids[start : start + self._length] for start in range(0, len(ids), self._length))
            yield from (np.array(piece, np.int64) for piece in pieces if len(piece) >= 2)
        if not self._rows:
            raise UserError(f"{self.path} has no rows", param="calibration")

    def _ids(self, where: str, row: dict[str, Any]) -> tuple[str, list[int]]:
        for kind, (keys, messages_of) in FORMATS.items():
            if keys <= row.keys():
                try:
                    messages = messages_of(row)
                except (TypeError, ValueError, KeyError, IndexError):
                    break
                return kind, self._conversation(where, messages)
        if isinstance(row.get("text"), str):
            return "text", prompt.completion_ids(self._tokenizer, row["text"])
        formats = ", ".join("/".join(sorted(keys)) for keys, _ in FORMATS.values())
        raise UserError(
            f"{where} has no training format (there are {formats}, text): {_short(row)}", param="calibration"
        )

    def _conversation(self, where: str, messages: Messages) -> list[int]:
        if self._tokenizer.chat_template is None:
            contents = [message.get("content") for message in messages]
            return prompt.completion_ids(self._tokenizer, "\n".join(said for said in contents if isinstance(said, str)))
        try:
            return prompt.chat_ids(self._tokenizer, messages, add_generation_prompt=False)
        except UserError as error:
            raise UserError(f"{where}: {error}", param="calibration") from None


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it stands, row)"""
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield f"{path}:{number}", _row(f"{path}:{number}", line)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the calibration file {path}: {error}", param="calibration") from None


def _row(where: str, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not a JSON object on a line of its own: {error}", param="calibration") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object, met {_short(row)}", param="calibration")
    return row


def _short(value: Any) -> str:
    shown = json.dumps(value, ensure_ascii=False)
    return shown if len(shown) <= 80 else shown[:77] + "..."


def _as_given(row: dict[str, Any]) -> Messages:
    messages = [{**message, "role": message["role"]} for message in row["messages"]]
    if not messages:
        raise ValueError("no messages")
    return messages


def _turns(row: dict[str, Any]) -> Messages:
    asked, answered = _list(row["src"]), _list(row["tgt"])
    if "response" in row:
        best = max(range(len(row["response"])), key=lambda index: row["sort"][index])
        answered = [*answered, row["response"][best]]
    return _talk(asked, answered)


def _answer(key: str) -> Callable[[dict[str, Any]], Messages]:
    return lambda row: _talk(_list(row["prompt"]), _list(row[key]))


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _talk(asked: list[Any], answered: list[Any]) -> Messages:
    if not asked or len(asked) != len(answered) or not all(isinstance(part, str) for part in (*asked, *answered)):
        raise ValueError("as many questions as answers are expected")
    found = []
    for question, answer in zip(asked, answered, strict=True):
        found += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return found


# Name for people -> (keys that such a row has, its conversation); the first that fits counts.
FORMATS: dict[str, tuple[frozenset[str], Callable[[dict[str, Any]], Messages]]] = {
    "messages": (frozenset({"messages"}), _as_given),
    "src/tgt": (frozenset({"src", "tgt"}), _turns),
    "prompt/response": (frozenset({"prompt", "response"}), _answer("response")),
    "prompt/chosen": (frozenset({"prompt", "chosen"}), _answer("chosen")),
}
