"""`tokenizer.model`, SentencePiece's own file, in the words of GGUF's metadata (see gguf_tokenizer.py).

The file is one protocol buffer, of which few fields matter (sentencepiece, src/sentencepiece_model.proto):

    1 pieces (repeated)     1 piece   2 score   3 type (the numbers that GGUF uses, too)
    2 trainer               3 kind: 1 unigram, 2 BPE
    3 normalizer            2 compiled map of characters   3 a space begins the text   4 extra spaces are removed

Reading these needs neither the sentencepiece package nor protobuf; tests compare the outcome with the former.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llmc.errors import CheckpointError, UnsupportedModelError

_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_BPE = 2
_NORMAL = 1

# A field's value: a number, or bytes where the field is a text or a message of its own.
_Value = int | float | bytes


def read(path: Path) -> dict[str, Any]:
    """The vocabulary of a SentencePiece BPE model.

    Raises:
        CheckpointError: The file is damaged.
        UnsupportedModelError: It is not BPE, or changes the text beforehand.
    """
    try:
        fields = list(_fields(path.read_bytes()))
        pieces = [dict(_fields(value)) for number, value in fields if number == _PIECES and isinstance(value, bytes)]
        tokens = [bytes(piece[1]).decode("utf-8") for piece in pieces]  # type: ignore[arg-type]
        trainer, normalizer = (dict(_fields(_message(fields, number))) for number in (_TRAINER, _NORMALIZER))
    except (OSError, IndexError, KeyError, TypeError, ValueError, struct.error) as error:
        raise CheckpointError(f"{path} is not a SentencePiece model: {error!r}") from None
    if (kind := trainer.get(3, 1)) != _BPE:
        raise UnsupportedModelError(f"{path} is a SentencePiece model of kind {kind!r}; llmc reads BPE ({_BPE})")
    if normalizer.get(2) or normalizer.get(4, 1):
        raise UnsupportedModelError(
            f"{path} changes characters or spaces before it cuts a text, which llmc does not do: load the tokenizer "
            "with transformers, save it, and convert that folder"
        )
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [piece.get(2, 0.0) for piece in pieces],
        "tokenizer.ggml.token_type": [piece.get(3, _NORMAL) for piece in pieces],
        "tokenizer.ggml.add_space_prefix": bool(normalizer.get(3, 1)),
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


def original(path: Path) -> Callable[[str], list[int]] | None:
    """SentencePiece's own way from text to ids, None where the package is not installed."""
    try:
        import sentencepiece
    except ImportError:
        return None
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    return lambda text: list(model.EncodeAsIds(text))
