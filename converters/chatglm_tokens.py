"""What the code of ChatGLM's tokenizers adds to their SentencePiece models (tokenization_chatglm.py of each).

ChatGLM-6B writes line ends, tabs and runs of spaces as tokens of their own, and counts its ids from behind those of
images, of which only the first release had any. That one keeps most of these tokens in the code: here they are put
behind the vocabulary, as there. ChatGLM2 and ChatGLM3 have some special tokens in the code.

Knows tokens. Does not know files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llmc.converters.gguf_tokenizer import WRITTEN, TokenType

_KEY = "tokenizer.ggml."

# ChatGLM2; the last four came with ChatGLM3.
_SPECIAL_2 = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
_ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")

_SPECIAL = ("[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>")
# Text -> token, in the order in which the authors replace it: the longest run of spaces first.
_WRITTEN = {"\n": "<n>", "\t": "<|tab|>"} | {" " * count: f"<|blank_{count}|>" for count in range(80, 1, -1)}
_BLANKS = ("<|tab|>", *(f"<|blank_{count}|>" for count in range(2, 81)))
_IMAGES = 20000  # where tokenizer_config.json does not say


@dataclass(frozen=True, slots=True)
class Additions:
    """What one model's code adds.

    Attributes:
        added: Special tokens behind the vocabulary, where the folder does not list them.
        before, after: What stands around every text.
        pieces: Behind the vocabulary, and known to SentencePiece: (token, type).
        images: Ids before the vocabulary.
        written: Text -> token, replaced in this order before a text is cut.
    """

    added: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    pieces: tuple[tuple[str, TokenType], ...] = ()
    images: int = 0
    written: Mapping[str, str] | None = None

    def apply(self, metadata: dict[str, Any]) -> None:
        """Change a vocabulary in the words of GGUF's metadata so."""
        tokens, types, scores = (metadata[_KEY + name] for name in ("tokens", "token_type", "scores"))
        tokens.extend(token for token, _ in self.pieces)
        types.extend(int(kind) for _, kind in self.pieces)
        scores.extend([0.0] * len(self.pieces))
        if self.written:
            metadata[WRITTEN] = dict(self.written)
            types[:] = [
                int(TokenType.CONTROL) if token in _SPECIAL else kind for token, kind in zip(tokens, types, strict=True)
            ]
        tokens[:0] = [f"<image_{number}>" for number in range(self.images)]
        types[:0] = [int(TokenType.UNUSED)] * self.images
        scores[:0] = [0.0] * self.images

    def around(self, encode: Callable[[str], list[int]]) -> Callable[[str], list[int]]:
        """SentencePiece's way from text to ids, as the authors' code calls it."""

        def theirs(text: str) -> list[int]:
            for plain, token in (self.written or {}).items():
                text = text.replace(plain, token)
            return [self.images + number for number in encode(text)]

        return theirs


def of(config: Mapping[str, Any], words: Mapping[str, Any], tokens: list[str]) -> Additions:
    """What is added to a folder's SentencePiece model.

    Args:
        config: The model's.
        words: The tokenizer's config.
        tokens: Of the SentencePiece model.
    """
    if config.get("model_type") != "chatglm":
        return Additions()
    if config.get("position_encoding_2d"):
        kinds = dict.fromkeys(_SPECIAL, TokenType.CONTROL) | dict.fromkeys(_BLANKS, TokenType.USER_DEFINED)
        known = set(tokens)
        kinds |= {f"<0x{byte:02X}>": TokenType.BYTE for byte in range(256)}
        return Additions(
            after=("[gMASK]", "<sop>"),
            pieces=tuple((token, kind) for token, kind in kinds.items() if token not in known),
            images=int(words.get("num_image_tokens", _IMAGES)),
            written=_WRITTEN,
        )
    has_roles = "chatglm2" not in str(config.get("_name_or_path")).lower()
    return Additions(added=_SPECIAL_2 + (_ROLES if has_roles else ()), before=("[gMASK]", "sop"))
