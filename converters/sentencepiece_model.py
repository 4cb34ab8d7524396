"""`tokenizer.model`, SentencePiece's own file, in the words of GGUF's metadata (see gguf_tokenizer.py).

GGUF calls a model of pieces joined by scores (BPE) "llama", and one of pieces that are likeliest together (unigram,
Kudo 2018) "t5".

The file is one protocol buffer, of which few fields matter (sentencepiece, src/sentencepiece_model.proto):

    1 pieces (repeated)     1 piece   2 score   3 type (the numbers that GGUF uses, too)
    2 trainer               3 kind: 1 unigram, 2 BPE    35 unknown characters become bytes
    3 normalizer            2 compiled map of characters   3 a space begins the text   4 extra spaces are removed

Reading these needs neither the sentencepiece package nor protobuf; tests compare the outcome with the former.
"""

from __future__ import annotations

import math
import operator
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from llmc.errors import CheckpointError, UnsupportedModelError

_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_UNIGRAM, _BPE = 1, 2
_NORMAL = 1
_BYTE_FALLBACK = 35
_TIE = 1e-5  # what sums in float32 can tell apart

# A field's value: a number, or bytes where the field is a text or a message of its own.
_Value = int | float | bytes


def read(path: Path) -> dict[str, Any]:
    """The vocabulary of a SentencePiece model.

    Raises:
        CheckpointError: The file is damaged.
        UnsupportedModelError: It is neither BPE nor unigram, or is BPE and changes the text beforehand.
    """
    try:
        fields = list(_fields(path.read_bytes()))
        pieces = [dict(_fields(value)) for number, value in fields if number == _PIECES and isinstance(value, bytes)]
        tokens = [bytes(piece[1]).decode("utf-8") for piece in pieces]  # type: ignore[arg-type]
        trainer, normalizer = (dict(_fields(_message(fields, number))) for number in (_TRAINER, _NORMALIZER))
    except (OSError, IndexError, KeyError, TypeError, ValueError, struct.error) as error:
        raise CheckpointError(f"{path} is not a SentencePiece model: {error!r}") from None
    kind, charsmap, removes_spaces = trainer.get(3, _UNIGRAM), normalizer.get(2, b""), bool(normalizer.get(4, 1))
    if kind not in (_UNIGRAM, _BPE) or not isinstance(charsmap, bytes):
        raise UnsupportedModelError(
            f"{path} is a SentencePiece model of kind {kind!r}; llmc reads unigram ({_UNIGRAM}) and BPE ({_BPE})"
        )
    if kind == _BPE and (charsmap or removes_spaces):
        raise UnsupportedModelError(
            f"{path} changes characters or spaces before it cuts a text, which llmc does not do: load the tokenizer "
            "with transformers, save it, and convert that folder"
        )
    return {
        "tokenizer.ggml.model": "llama" if kind == _BPE else "t5",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [piece.get(2, 0.0) for piece in pieces],
        "tokenizer.ggml.token_type": [piece.get(3, _NORMAL) for piece in pieces],
        "tokenizer.ggml.add_space_prefix": bool(normalizer.get(3, 1)),
        "tokenizer.ggml.precompiled_charsmap": charsmap,
        "tokenizer.ggml.remove_extra_whitespaces": removes_spaces,
    }


def _message(fields: list[tuple[int, _Value]], wanted: int) -> bytes:
    found = next((value for number, value in fields if number == wanted), b"")
    if not isinstance(found, bytes):
        raise ValueError(f"field {wanted} is no message")
    return found


def _fields(data: bytes) -> Iterator[tuple[int, _Value]]:
    """The fields of a message (protobuf's encoding: a key of number and wire type, then the value)."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        size, at = _varint(data, at) if wire == 2 else ({1: 8, 5: 4}[wire], at)
        if at + size > len(data):
            raise ValueError(f"field {number} is cut short")
        raw, at = data[at : at + size], at + size
        yield number, struct.unpack("<f", raw)[0] if wire == 5 else raw


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number in groups of 7 bits, the lowest first, and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("a number has more than 64 bits")


def as_likely(metadata: Mapping[str, Any]) -> Callable[[list[int], list[int]], bool]:
    """Whether ids are as good as others.

    A unigram model may have several likeliest cuts, as of a run of one character; SentencePiece's choice among them
    hangs on the last bit of a sum in float32.
    """
    if metadata["tokenizer.ggml.model"] != "t5":
        return operator.eq
    tokens, scores = (metadata[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores"))

    def alike(a: list[int], b: list[int]) -> bool:
        (text_a, score_a), (text_b, score_b) = (
            ("".join(tokens[number] for number in ids), math.fsum(scores[number] for number in ids)) for ids in (a, b)
        )
        return a == b or (text_a == text_b and math.isclose(score_a, score_b, rel_tol=_TIE))

    return alike


def original(path: Path, pieces: Iterable[tuple[str, int]] = ()) -> Callable[[str], list[int]] | None:
    """SentencePiece's own way from text to ids, None where the package is not installed.

    Args:
        pieces: More of them, with their types; bytes among them, which unknown characters then become.
    """
    try:
        import sentencepiece
    except ImportError:
        return None
    # What is appended to a protocol buffer is added to its lists, and wins over what it said before.
    more = [_field(_PIECES, _field(1, token.encode()) + _field(3, kind)) for token, kind in pieces]
    more += [_field(_TRAINER, _field(_BYTE_FALLBACK, 1))] * bool(more)
    model = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes() + b"".join(more))
    return lambda text: list(model.EncodeAsIds(text))


def _field(number: int, value: int | bytes) -> bytes:
    """The inverse of `_fields`, for one number or message."""
    if isinstance(value, int):
        return _as_varint(number << 3) + _as_varint(value)
    return _as_varint(number << 3 | 2) + _as_varint(len(value)) + value


def _as_varint(value: int) -> bytes:
    groups = []
    while True:
        value, group = value >> 7, value & 0x7F
        groups.append(group | 0x80 * bool(value))
        if not value:
            return bytes(groups)
