"""Pieces of text against the whole text that the `tokenizers` package decodes."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from llmc.errors import UserError
from llmc.serve.stream import StopStrings, TextStream, Vocabulary
from llmc.tokenizer import Tokenizer

TEXTS = [
    "the quick brown fox",
    "  two  spaces\n\tand a tab ",
    "caf\u00e9 na\u00efve \u4f60\u597d\u4e16\u754c \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \u0e01\u0e33",
    "def f(x):\n    return x ** 2  # \u03c0\n",
    "",
]


def byte_level(folder: Path) -> Tokenizer:
    folder.mkdir(parents=True, exist_ok=True)
    tiny.save_tokenizer(folder)
    tokenizer = Tokenizer.load(folder)
    tokenizer.backend.add_tokens([AddedToken("<tool_call>", special=False), AddedToken("\u4f60\u597d", special=False)])
    return tokenizer


def byte_fallback() -> Tokenizer:
    """As Llama 2's tokenizer.json has it."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "\u2581",
        "\u2581the",
        "\u2581\u2581",
    ]
    pieces += ["a", "b", "\u00e9", "\u2581quick", "qu", "ick", "<0x>", "\n", "\u4f60", "\ufffd", "\u2581 \u2581"]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(backend, special_ids=frozenset({1, 2}))


def word_piece() -> Tokenizer:
    """A decoder that is none of a language model's."""
    pieces = ["[UNK]", "[PAD]", "the", "quick", "##er", "##ly", "fox", "\u4f60", "##\u597d"]
    backend = tokenizers.Tokenizer(models.WordPiece({piece: number for number, piece in enumerate(pieces)}))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece(cleanup=False)
    backend.add_special_tokens(["[PAD]"])
    return Tokenizer(backend, special_ids=frozenset({1}))


def metaspace() -> Tokenizer:
    """A decoder whose first token is treated otherwise than the same token later."""
    pieces = ["\u2581the", "\u2581", "qu", "ick", "\u2581fox", "a"]
    backend = tokenizers.Tokenizer(models.BPE({piece: number for number, piece in enumerate(pieces)}, []))
    backend.decoder = decoders.Metaspace()
    return Tokenizer(backend)


def undecoded() -> Tokenizer:
    backend = tokenizers.Tokenizer(models.WordLevel({"the": 0, "fox": 1, "jumps": 2}, unk_token="the"))
    return Tokenizer(backend)


@pytest.fixture(scope="module")
def all_of_them(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    return {
        "byte level": byte_level(tmp_path_factory.mktemp("byte-level")),
        "byte fallback": byte_fallback(),
        "word piece": word_piece(),
        "metaspace": metaspace(),
        "undecoded": undecoded(),
    }


def pieces_of(tokenizer: Tokenizer, ids: list[int], *, skip: bool = True) -> list[str]:
    detokenizer = Vocabulary(tokenizer).detokenizer(skip_special_tokens=skip)
    return [*(detokenizer.push(token) for token in ids), detokenizer.flush()]


NAMES = ["byte level", "byte fallback", "word piece", "metaspace", "undecoded"]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=300, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_pieces_make_up_the_whole(
    all_of_them: dict[str, Tokenizer], name: str, data: st.DataObject, skip: bool
) -> None:
    tokenizer = all_of_them[name]
    # Beyond the vocabulary, as models round theirs up.
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=40))
    pieces = pieces_of(tokenizer, ids, skip=skip)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("text", TEXTS)
def test_a_character_comes_in_one_piece(all_of_them: dict[str, Tokenizer], text: str) -> None:
    for name in ("byte level", "byte fallback"):
        tokenizer = all_of_them[name]
        ids = tokenizer.encode(text, add_special_tokens=False)
        pieces = pieces_of(tokenizer, ids)
        assert "".join(pieces) == tokenizer.decode(ids)
        if name == "byte level":
            assert "".join(pieces) == text
        assert not any("\ufffd" in piece for piece in pieces)


def test_text_is_not_held_longer_than_needed(all_of_them: dict[str, Tokenizer]) -> None:
    tokenizer = all_of_them["byte level"]
    ids = tokenizer.encode("fox \U0001f600", add_special_tokens=False)
    assert [len(piece) for piece in pieces_of(tokenizer, ids[-4:])] == [0, 0, 0, 1, 0]
    fallback = all_of_them["byte fallback"]
    smile = [3 + byte for byte in "\U0001f600".encode()]
    a = fallback.backend.token_to_id("a")
    assert pieces_of(fallback, [*smile, a, *smile]) == ["", "", "", "", "\U0001f600a", "", "", "", "", "\U0001f600"]


def test_tokens_on_their_own(all_of_them: dict[str, Tokenizer]) -> None:
    for name in NAMES:
        tokenizer, vocabulary = all_of_them[name], Vocabulary(all_of_them[name])
        for token in range(tokenizer.vocab_size + 2):
            raw = vocabulary.raw(token)
            assert vocabulary.text(token) == raw.decode("utf-8", "replace")
    vocabulary = Vocabulary(all_of_them["byte fallback"])
    assert vocabulary.raw(3 + 0xC3) == b"\xc3"
    assert vocabulary.text(all_of_them["byte fallback"].backend.token_to_id("\u2581the") or 0) == " the"


# Stop strings.


def reference(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The same by looking at the whole text: the first complete match, the longest of those that end there."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


SMALL = st.text("ab\u00e9", min_size=1, max_size=6)


@settings(max_examples=600, deadline=None)
@given(
    pieces=st.lists(st.text("ab\u00e9", max_size=5), max_size=12),
    stops=st.lists(SMALL, max_size=4),
    include=st.booleans(),
)
def test_stop_strings_are_found_wherever_pieces_are_cut(pieces: list[str], stops: list[str], include: bool) -> None:
    checker = StopStrings(stops, include=include)
    sent, whole = "", "".join(pieces)
    for piece in pieces:
        sent += checker.push(piece)
        assert whole.startswith(sent), "sent what was not there"
    before = sent
    sent += checker.flush()
    wanted, stop = reference(whole, stops, include)
    assert (sent, checker.found) == (wanted, stop)
    if stop is None and stops:
        # Held back is only what could still become a stop string, and nothing less.
        held = sent[len(before) :]
        longest = max(
            size for each in stops for size in range(len(each)) if whole.endswith(each[:size]) and size <= len(whole)
        )
        assert len(held) == longest


def test_a_long_text_with_long_stops_is_linear() -> None:
    stop = "a" * 999 + "b"
    checker = StopStrings([stop] * 3)
    text = "a" * 20_000
    sent = "".join(checker.push(char) for char in text)
    assert len(sent) == 20_000 - 999
    assert checker.push("b") == ""
    assert checker.found == stop


def test_empty_stop_strings_are_refused() -> None:
    with pytest.raises(UserError):
        StopStrings(["a", ""])


def test_both_stages_together(all_of_them: dict[str, Tokenizer]) -> None:
    tokenizer = all_of_them["byte level"]
    ids = tokenizer.encode("the quick brown fox", add_special_tokens=False)
    for stop, wanted in (("k bro", "the quic"), ("fox", "the quick brown "), ("never", "the quick brown fox")):
        text = TextStream(Vocabulary(tokenizer).detokenizer(), StopStrings([stop]))
        met = "".join(text.push(token) for token in ids) + text.flush()
        assert met == wanted
        assert text.stopped == (stop != "never")
    half = tokenizer.encode("\u4e16", add_special_tokens=False)[:1]
    text = TextStream(Vocabulary(tokenizer).detokenizer(), StopStrings(["\ufffd"]))
    assert "".join([text.push(half[0]), text.flush()]) == ""
    assert text.stopped
