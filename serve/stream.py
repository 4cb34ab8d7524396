"""From tokens to text, piece by piece: characters that are whole, and stop strings held back until they are not one.

    tokens ──► Detokenizer ──► whole characters ──► StopStrings ──► text to send

The pieces put together are exactly what decoding all tokens at once gives, broken UTF-8 included. A token costs the
same however long the text is.

Knows: the decoders that language models' tokenizers are made with. Does not know: sequences, requests or HTTP.
"""

from __future__ import annotations

import codecs
import functools
import json
from collections.abc import Sequence
from typing import Any, Protocol

from llmc.errors import UserError
from llmc.tokenizer import Tokenizer


class Detokenizer(Protocol):
    """Turns one sequence's tokens into text."""

    def push(self, token: int) -> str:
        """The text that became certain with this token; often one word, sometimes nothing."""
        ...

    def flush(self) -> str:
        """What is left at the end: replacement characters for half a character."""
        ...


class Vocabulary:
    """A tokenizer's tokens as text or bytes, prepared once and shared by all sequences."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._steps = _decoder_steps(tokenizer)
        self._cache: dict[int, str | bytes] = {}
        self._byte_level = [step["type"] for step in self._steps or []] == ["ByteLevel"]

    @functools.cached_property
    def longest_piece(self) -> int:
        """Characters of text that one token can stand for at most; a normalizer may have joined three to one."""
        replaced = (step["content"] for step in self._steps or () if step["type"] == "Replace")
        written = max(map(len, (*self.tokenizer.backend.get_vocab(), *replaced)), default=1)
        return written * (1 if self.tokenizer.backend.normalizer is None else 3)

    def detokenizer(self, *, skip_special_tokens: bool = True) -> Detokenizer:
        """A fresh one, for one sequence."""
        skip = self.tokenizer.special_ids if skip_special_tokens else frozenset()
        if self._steps is None:
            return _Window(self.tokenizer, skip)
        if self._byte_level:
            return _Utf8(self, skip)
        strip = next((step["start"] for step in self._steps if step["type"] == "Strip"), 0)
        content = next((step["content"] for step in self._steps if step["type"] == "Strip"), "")
        return _ByteFallback(self, skip, content, strip)

    def piece(self, token: int) -> str | bytes:
        """A token as its decoder sees it: bytes where it stands for raw bytes, else text."""
        found = self._cache.get(token)
        if found is None:
            found = self._cache[token] = self._make(token)
        return found

    def text(self, token: int) -> str:
        """A token on its own, as shown beside its log-probability."""
        raw = self.raw(token)
        return raw.decode("utf-8", "replace")

    def raw(self, token: int) -> bytes:
        """The UTF-8 bytes of a token on its own."""
        if self._steps is None:
            return self.tokenizer.decode([token], skip_special_tokens=False).encode()
        piece = self.piece(token)
        return piece if isinstance(piece, bytes) else piece.encode()

    def _make(self, token: int) -> str | bytes:
        text = self.tokenizer.backend.id_to_token(token)
        if text is None:
            # Models round their vocabulary up: rows without a token decode to nothing, and end no run of bytes.
            return b""
        if self._byte_level:
            return _from_byte_level(text)
        for step in self._steps or []:
            if step["type"] == "Replace":
                text = text.replace(step["pattern"]["String"], step["content"])
            elif step["type"] == "ByteFallback" and (value := _byte_of(text)) is not None:
                return value
        return text


def _decoder_steps(tokenizer: Tokenizer) -> list[dict[str, Any]] | None:
    """The tokenizer's decoder as the list of its steps, None when it is not one that is known below."""
    decoder = tokenizer.backend.decoder
    if decoder is None:
        return None
    state = json.loads(decoder.__getstate__())
    steps: list[dict[str, Any]] = state["decoders"] if state["type"] == "Sequence" else [state]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return steps
    # Llama 2 and Mistral: "▁" is a space, <0x0A> a byte, and the text's very first space goes.
    shape = [kind for kind in kinds if kind != "Replace"]
    replaced = kinds[: kinds.count("Replace")] == ["Replace"] * kinds.count("Replace")
    plain = all("String" in step["pattern"] for step in steps if step["type"] == "Replace")
    ends_whole = all(step["stop"] == 0 for step in steps if step["type"] == "Strip")
    known = shape in (["ByteFallback", "Fuse"], ["ByteFallback", "Fuse", "Strip"])
    return steps if known and replaced and plain and ends_whole else None


def _byte_table() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others for characters from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(0x100 + place): byte for place, byte in enumerate(others)}


_BYTES = _byte_table()


def _from_byte_level(text: str) -> bytes:
    """Tokens that were added as plain text are not in the alphabet, and stand for themselves."""
    try:
        return bytes([_BYTES[char] for char in text])
    except KeyError:
        return text.encode()


def _byte_of(text: str) -> bytes | None:
    """ "<0x0A>" -> b"\\n"."""
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        try:
            return bytes([int(text[3:5], 16)])
        except ValueError:
            return None
    return None


class _Utf8:
    """Byte-level BPE: every token is some bytes of UTF-8."""

    __slots__ = ("_decode", "_skip", "_vocabulary")

    def __init__(self, vocabulary: Vocabulary, skip: frozenset[int]) -> None:
        self._vocabulary = vocabulary
        self._skip = skip
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def push(self, token: int) -> str:
        if token in self._skip:
            return ""
        piece = self._vocabulary.piece(token)
        return self._decode(piece) if isinstance(piece, bytes) else piece

    def flush(self) -> str:
        return self._decode(b"", True)


class _ByteFallback:
    """SentencePiece with byte fallback: tokens are text, except for runs of single bytes.

    A run is text if all of it is UTF-8, and else one replacement character a byte (so the `tokenizers` package has
    it): only the next text token tells which.
    """

    __slots__ = ("_content", "_run", "_skip", "_strip", "_vocabulary")

    def __init__(self, vocabulary: Vocabulary, skip: frozenset[int], content: str, strip: int) -> None:
        self._vocabulary = vocabulary
        self._skip = skip
        self._content = content
        self._strip = strip
        self._run: list[bytes] = []

    def push(self, token: int) -> str:
        if token in self._skip:
            return ""
        piece = self._vocabulary.piece(token)
        if isinstance(piece, bytes):
            self._run.append(piece)
            return ""
        return self._stripped(self._end_run() + piece)

    def flush(self) -> str:
        return self._stripped(self._end_run())

    def _end_run(self) -> str:
        if not self._run:
            return ""
        run = b"".join(self._run)
        self._run.clear()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(run)

    def _stripped(self, text: str) -> str:
        """Leave out the first `strip` characters of the whole text, as long as they are `content`."""
        while self._strip and text:
            if not text.startswith(self._content):
                self._strip = 0
                break
            text = text.removeprefix(self._content)
            self._strip -= 1
        return text


class _Window:
    """Any other decoder: decode the last few tokens with and without the newest; the difference is its text.

    Exact wherever a token's text depends on its near neighbours alone.
    """

    SIZE = 8

    def __init__(self, tokenizer: Tokenizer, skip: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._skip = skip
        self._before: list[int] = []
        self._new: list[int] = []

    def push(self, token: int) -> str:
        # A token that decodes to nothing must not push a word out of the window.
        if token in self._skip or self._tokenizer.backend.id_to_token(token) is None:
            return ""
        self._new.append(token)
        text = self._difference()
        if text.endswith("\ufffd") and len(self._new) < self.SIZE:
            return ""
        return self._take(text)

    def flush(self) -> str:
        return self._take(self._difference()) if self._new else ""

    def _difference(self) -> str:
        before = self._tokenizer.decode(self._before, skip_special_tokens=False)
        return self._tokenizer.decode(self._before + self._new, skip_special_tokens=False)[len(before) :]

    def _take(self, text: str) -> str:
        self._before = (self._before + self._new)[-self.SIZE :]
        self._new = []
        return text


class StopStrings:
    """Passes text on until one of some strings has appeared in it.

    What could be the beginning of a stop string is held back until it is certain. Each string is matched by the
    automaton of Knuth, Morris and Pratt, so a character costs the same however long the strings are.

    Attributes:
        found: The stop string that ended the text, None so far.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        if not all(stops):
            raise UserError("a stop string must not be empty", param="stop")
        # Longest first: of several that are complete at the same character, the one that began first ends the text.
        self._stops = sorted(set(stops), key=len, reverse=True)
        self._borders = [_borders(stop) for stop in self._stops]
        self._matched = [0] * len(self._stops)
        self._include = include
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """Text that is certain to come before any stop string (with it, at the end, if included)."""
        if not self._stops:
            return text
        if self.found is not None:
            return ""
        whole = self._held + text
        for end, char in enumerate(text, len(self._held) + 1):
            if (stop := self._advance(char)) is not None:
                self.found, self._held = stop, ""
                return whole[: end if self._include else end - len(stop)]
        certain = len(whole) - max(self._matched)
        self._held = whole[certain:]
        return whole[:certain]

    def flush(self) -> str:
        """What was held back, now that nothing follows."""
        held, self._held = self._held, ""
        return held

    def _advance(self, char: str) -> str | None:
        """Feed one character; the stop string that it completes, if any."""
        for which, stop in enumerate(self._stops):
            matched, borders = self._matched[which], self._borders[which]
            while matched and stop[matched] != char:
                matched = borders[matched]
            matched += stop[matched] == char
            if matched == len(stop):
                return stop
            self._matched[which] = matched
        return None


def _borders(text: str) -> list[int]:
    """For each length, the longest shorter beginning of `text` that also ends its first `length` characters."""
    borders = [0, 0]
    for char in text[1:]:
        size = borders[-1]
        while size and text[size] != char:
            size = borders[size]
        borders.append(size + (text[size] == char))
    return borders


class TextStream:
    """Both stages for one sequence."""

    def __init__(self, detokenizer: Detokenizer, stops: StopStrings) -> None:
        self._detokenizer = detokenizer
        self._stops = stops

    @property
    def stopped(self) -> bool:
        """A stop string has come."""
        return self._stops.found is not None

    def push(self, token: int, *, check: bool = True) -> str:
        """The text that may be sent now that this token has come.

        Args:
            check: Look for stop strings in it; once True, it stays so.
        """
        text = self._detokenizer.push(token)
        return self._stops.push(text) if check else text

    def flush(self) -> str:
        """The rest, when no more tokens come."""
        if self.stopped:
            return ""
        text = self._stops.push(self._detokenizer.flush())
        return text if self.stopped else text + self._stops.flush()
