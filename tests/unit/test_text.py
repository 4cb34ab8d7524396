"""llmc.text: windows of tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing

from llmc import text
from llmc.errors import UserError
from llmc.tokenizer import Tokenizer

CONTENT = "the quick brown fox jumps over the lazy dog. " * 10


@pytest.fixture
def tokenizer(tiny_source: Callable[[str], Path]) -> Tokenizer:
    return Tokenizer.load(tiny_source("llama"))


@pytest.mark.parametrize("length", [3, 16, 1000])
def test_windows_are_the_text_in_pieces(tokenizer: Tokenizer, length: int) -> None:
    found = text.windows(CONTENT, tokenizer, length)
    ids = tokenizer.encode(CONTENT)
    joined = [token for window in found for token in window.tolist()]
    assert joined == ids[: len(joined)]
    assert len(ids) - len(joined) <= 1
    assert {len(window) for window in found[:-1]} <= {length}
    assert 2 <= len(found[-1]) <= length


def test_limit(tokenizer: Tokenizer) -> None:
    assert sum(map(len, text.windows(CONTENT, tokenizer, 8, limit=20))) == 20


def test_every_window_begins_as_a_text_does(tokenizer: Tokenizer) -> None:
    """Only what stands in front is repeated, not what a tokenizer puts behind."""
    tokenizer.backend.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    found = text.windows(CONTENT, tokenizer, 8)
    assert len(found) > 2
    assert {window[0] for window in found} == {1}
    assert not [window for window in found if {1, 2} & set(window[1:].tolist())]
    assert {len(window) for window in found[:-1]} == {8}


@pytest.mark.parametrize(
    ("content", "length", "message"), [("a", 8, "fewer than two tokens"), (CONTENT, 1, "window of 1 tokens")]
)
def test_too_short(tokenizer: Tokenizer, content: str, length: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        text.windows(content, tokenizer, length)


@pytest.mark.parametrize("content", [b"", b" \n", b"\xff\xfe\xfa", None])
def test_what_is_not_text(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"text\.txt"):
        text.read(path)
