"""tiktoken's files become a tokenizer.json that gives tiktoken's own ids."""

from __future__ import annotations

import base64
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_tiktoken import RANKS, folder_of

from llmc.converters import hf_tokenizer, tiktoken_model
from llmc.converters.difficult import DIFFICULT
from llmc.errors import CheckpointError, UnsupportedModelError
from llmc.tokenizer import Tokenizer

# The expressions as the authors' code has them: tokenization_qwen.py, llama3/tokenizer.py, tokenization_chatglm.
ONE_DIGIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {"qwen": ONE_DIGIT, "llama": ONE_DIGIT.replace(r"\p{N}|", r"\p{N}{1,3}|")}
PATTERNS["chatglm"] = PATTERNS["llama"]


def converted(source: Path, out: Path, **config: Any) -> Tokenizer:
    out.mkdir()
    hf_tokenizer.copy(source, out, config)
    return Tokenizer.load(out)


def theirs(model_type: str, special: dict[str, int]) -> tiktoken.Encoding:
    return tiktoken.Encoding("t", pat_str=PATTERNS[model_type], mergeable_ranks=RANKS, special_tokens=special)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[tiktoken.Encoding, Tokenizer]]:
    root, found = tmp_path_factory.mktemp("tiktoken"), {}
    for name in PATTERNS:
        ours = converted(folder_of(name, root / name), root / f"{name}-out", model_type=name)
        special = {token.content: number for number, token in ours.backend.get_added_tokens_decoder().items()}
        found[name] = theirs(name, special), ours
    return found


@pytest.mark.parametrize("name", PATTERNS)
@given(text=st.text() | st.text("aA'sS 1\n\r\té\u0301/") | st.sampled_from(DIFFICULT))
@example("Hello 123456 <|im_start|>x<|endoftext|>")
@settings(max_examples=150, deadline=None)
def test_ids_are_tiktoken_s(pairs: dict[str, tuple[tiktoken.Encoding, Tokenizer]], name: str, text: str) -> None:
    encoding, ours = pairs[name]
    normal = unicodedata.normalize("NFC", text) if name == "qwen" else text
    ids = ours.encode(text, add_special_tokens=False)
    assert ids == encoding.encode(normal, allowed_special="all")
    assert ours.decode(ids, skip_special_tokens=False) == normal


@pytest.mark.parametrize("name", PATTERNS)
@given(raw=st.binary(max_size=30))
@settings(max_examples=60, deadline=None)
def test_broken_utf_8_means_the_same_bytes(
    pairs: dict[str, tuple[tiktoken.Encoding, Tokenizer]], name: str, raw: bytes
) -> None:
    """Ids that a model may give, in any order: half a character shows as U+FFFD on both sides."""
    encoding, ours = pairs[name]
    ids = [RANKS[bytes([byte])] for byte in raw]
    assert encoding.decode_bytes(ids) == raw
    assert ours.decode(ids) == raw.decode("utf-8", errors="replace")


def test_tokens_after_the_ranked_ones(pairs: dict[str, tuple[tiktoken.Encoding, Tokenizer]]) -> None:
    count = len(RANKS)
    qwen, llama, glm = (pairs[name][1] for name in ("qwen", "llama", "chatglm"))
    assert [qwen.backend.token_to_id(t) for t in ("<|endoftext|>", "<|im_end|>", "<|extra_204|>")] == [
        count, count + 2, count + 207,
    ]  # fmt: skip
    # Llama 3's ids are known: 128000 ranked tokens, <|eot_id|> 128009, and 256 in all.
    assert [llama.backend.token_to_id(t) - count for t in ("<|begin_of_text|>", "<|eot_id|>")] == [0, 9]
    assert llama.vocab_size == count + 256
    assert glm.backend.token_to_id("<|user|>") == count + 7
    assert llama.encode("a")[0] == count
    assert glm.encode("a")[:2] == [count + 2, count + 4]
    assert qwen.encode("a") == qwen.encode("a", add_special_tokens=False)
    assert (qwen.eos_token, llama.eos_token, glm.eos_token) == ("<|endoftext|>", "<|end_of_text|>", "<|endoftext|>")


def test_a_word_that_is_a_token_needs_no_merges(tmp_path: Path) -> None:
    """tiktoken looks a word up before it merges; here no two tokens make it."""
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"abc": 256}
    ours = converted(folder_of("qwen", tmp_path / "s", ranks), tmp_path / "o", model_type="qwen")
    encoding = tiktoken.Encoding("t", pat_str=ONE_DIGIT, mergeable_ranks=ranks, special_tokens={})
    for text in ("abc", "abcd", "ab", " abc"):
        assert ours.encode(text) == encoding.encode(text)


def test_the_folder_s_own_added_tokens_win(tmp_path: Path) -> None:
    own = {str(len(RANKS)): {"content": "<|a|>", "special": True}, str(len(RANKS) + 1): {"content": "<b>"}}
    source = folder_of("llama", tmp_path / "s", tokenizer_config={"added_tokens_decoder": own, "eos_token": "<|a|>"})
    tokenizer = tiktoken_model.build(
        tiktoken_model.read(source / "tokenizer.model"),
        tiktoken_model.KINDS["llama"],
        {len(RANKS): ("<|a|>", True), len(RANKS) + 1: ("<b>", False)},
        source,
    )
    assert tokenizer.encode("<b><|a|>").ids == [len(RANKS) + 1, len(RANKS)]
    with pytest.raises(CheckpointError, match="does not fit"):
        tiktoken_model.build(
            [bytes([b]) for b in range(256)], tiktoken_model.KINDS["llama"], {300: ("<x>", True)}, source
        )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("YQ== 0\nYg== x\n", "not a tiktoken file"),
        ("YQ== 0\n*** 1\n", "not a tiktoken file"),
        ("YQ== 0\nYg== 2\n", "damaged"),
        ("YQ== 0\nYQ== 1\n", "damaged"),
        ("\n".join(f"{base64.b64encode(bytes([b, b])).decode()} {b}" for b in range(256)), "the byte 0 is no token"),
    ],
)
def test_a_damaged_file_is_named(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "qwen.tiktoken").write_text(text)
    with pytest.raises(CheckpointError, match=said):
        tiktoken_model.read(tmp_path / "qwen.tiktoken")


def test_a_model_that_is_not_known_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="'kimi'"):
        converted(folder_of("llama", tmp_path / "s"), tmp_path / "o", model_type="kimi")


def test_other_ids_than_tiktoken_s_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check that convert runs finds a wrong expression."""
    right = tiktoken_model.original
    wrong = tiktoken_model.KINDS["llama"]
    monkeypatch.setattr(tiktoken_model, "original", lambda ranked, _kind, special: right(ranked, wrong, special))
    with pytest.raises(UnsupportedModelError, match="cannot be converted exactly"):
        converted(folder_of("qwen", tmp_path / "s"), tmp_path / "o", model_type="qwen")
