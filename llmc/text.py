"""Plain text files as windows of tokens: what is calibrated on and what perplexity is measured on.

Knows: files and the tokenizer. Does not know: models.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from llmc.errors import UserError
from llmc.runtime import Tokens
from llmc.tokenizer import Tokenizer


def read(path: Path) -> str:
    """A whole UTF-8 file.

    Raises:
        UserError: It cannot be read, is not UTF-8, or holds nothing.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the text {path}: {error}", param="text") from None
    if not text.strip():
        raise UserError(f"the text {path} is empty", param="text")
    return text


def windows(text: str, tokenizer: Tokenizer, length: int, *, limit: int | None = None) -> list[Tokens]:
    """Cut a text into windows that do not overlap.

    Each begins with the special tokens that the tokenizer puts before a text (Llama's `<s>`, none for Qwen), or before
    what continues one (ChatGLM-6B's `[gMASK]<sop>`), since such models never saw a context without. A last piece of a
    single token is dropped: it predicts nothing.

    Args:
        length: Tokens of a window, special ones included.
        limit: Tokens of the text to use at most; None uses all.

    Returns:
        int64 [<= length] each, all but the last of them full.

    Raises:
        UserError: The text is shorter than two tokens, or the window has no room for any.
    """
    opening = _opening(tokenizer)
    step = length - len(opening)
    if step < 2:
        raise UserError(f"a window of {length} tokens is too short", param="window")
    ids = tokenizer.encode(text, add_special_tokens=False)[:limit]
    pieces = [opening + ids[start : start + step] for start in range(0, len(ids), step)]
    found = [np.array(piece, np.int64) for piece in pieces if len(piece) >= 2]
    if not found:
        raise UserError("the text has fewer than two tokens", param="text")
    return found


def _opening(tokenizer: Tokenizer) -> list[int]:
    """The special tokens in front of every text, or of what continues one; not those that end it."""
    ids, plain = tokenizer.encode("a", add_special_tokens=True), tokenizer.encode("a", add_special_tokens=False)
    added = len(ids) - len(plain)
    before = next((at for at in range(added + 1) if ids[at : at + len(plain)] == plain), 0)
    return ids[:before] or [token for token in ids[len(plain) :] if token not in tokenizer.eos_ids]
