"""What two forms of a model are given to read: a text, or texts that are hard on a tokenizer and random tokens.

Knows: texts, and what the two sides say of themselves. Does not know: how they compute.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from llmc import text as texts
from llmc.errors import UserError
from llmc.evaluate.parity import Piece, Side
from llmc.runtime import Tokens
from llmc.tokenizer import Tokenizer

# Characters that look like others are here on purpose.
# ruff: noqa: RUF001
TEXTS = (
    "The quick brown fox jumps over the lazy dog, twice; then it rests (until 17:45).",
    "def mean(xs: list[float]) -> float:\n\treturn sum(xs) / len(xs)  # fails on []\n",
    '{"name": "llmc", "sizes": [1, 2.5e-3, -7], "nested": {"ok": true, "none": null}}',
    "  leading, trailing  and\t\ttabs\r\n\n\n   three blank lines, then spaces      ",
    "从训练到服务：大语言模型的转换、量化与部署。第１２３号，约３．５％。",
    "モデルを変換して、サーバーで動かします。한국어 문장도 하나 있습니다.",
    "Быстрая лиса — «прыгает»; ¿y el perro? Déjà vu, naïve, Straße, Ærøskøbing, ﬁn.",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🤷🏽‍♀️ e\u0301 = é, a\u200bb, \u202eright to left\u202c, \ufeffmark, שלום مرحبا",
    "3.14159265358979 + 1,000,000 = 0x1F4A9; 2**64 == 18446744073709551616",
    "<|im_start|>user\nHello<|im_end|>\n<s>[INST] not a real prompt [/INST]</s><pad><unk>",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "∀x∈ℝ: ⌈x⌉ = −⌊−x⌋, α ∧ ¬β → γ ⇔ ∑ᵢ₌₁ⁿ i² = n(n+1)(2n+1)/6",
)
RANDOM_PIECES, RANDOM_LENGTH, SEED = 4, 64, 0
SPECIAL_TOKENS = 4  # that a tokenizer puts around a text, at most


def pieces(a: Side, b: Side, text: str | None, *, window: int, max_tokens: int | None) -> list[Piece]:
    """What both sides are to read.

    Args:
        text: In place of the built-in samples.
        window: Tokens of a piece, at most.
        max_tokens: Tokens of `text` to use.

    Raises:
        UserError: The two have different vocabularies, or a text is to be read and neither has a tokenizer.
    """
    if a.vocab_size and b.vocab_size and a.vocab_size != b.vocab_size:
        raise UserError(
            f"{a.name} chooses among {a.vocab_size} tokens, {b.name} among {b.vocab_size}: they are different models"
        )
    window = min([window, *(side.max_length for side in (a, b) if side.max_length)])
    vocab_size = a.vocab_size or b.vocab_size
    if vocab_size is None:
        return short_texts((text,) if text else TEXTS, window, max_tokens)

    def cut_by(tokenizer: Tokenizer) -> list[Tokens]:
        if text is not None:
            return texts.windows(text, tokenizer, window, limit=max_tokens)
        return [texts.windows(sample, tokenizer, window)[0] for sample in TEXTS]

    found = _cut(a, b, cut_by)
    if text is None:
        rng = np.random.default_rng(SEED)
        found += [rng.integers(0, vocab_size, min(window, RANDOM_LENGTH)) for _ in range(RANDOM_PIECES)]
    elif not found:
        raise UserError(f"neither {a.name} nor {b.name} has a tokenizer.json, so the text cannot be read", param="text")
    return list(found)


def short_texts(given: Sequence[str], window: int, max_tokens: int | None) -> list[Piece]:
    """Pieces for two servers, which cut texts into tokens by themselves: as many bytes as there may be tokens.

    No tokenizer makes more tokens than bytes, but for those that it puts in front.
    """
    size = max(window - SPECIAL_TOKENS, 1)
    found: list[Piece] = []
    for text in given:
        raw = text.encode()[:max_tokens]
        cut = (raw[start : start + size].decode("utf-8", "ignore") for start in range(0, len(raw), size))
        found += [piece for piece in cut if piece.strip()]
    return found


def _cut(a: Side, b: Side, cut_by: Callable[[Tokenizer], list[Tokens]]) -> list[Tokens]:
    """The texts as tokens, on which all tokenizers must agree; none where there is no tokenizer."""
    both: Sequence[list[Tokens]] = [cut_by(side.tokenizer) for side in (a, b) if side.tokenizer]
    if len(both) == 2:
        for ours, theirs in zip(*both, strict=False):
            if not np.array_equal(ours, theirs):
                count = min(len(ours), len(theirs))
                at = int(np.argmax(np.append(ours[:count] != theirs[:count], True)))
                raise UserError(
                    f"{a.name} and {b.name} have different tokenizers: at token {at} of a text they have "
                    f"{ours[at : at + 4].tolist()} and {theirs[at : at + 4].tolist()}"
                )
    return both[0] if both else []
