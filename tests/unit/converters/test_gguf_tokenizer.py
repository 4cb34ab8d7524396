from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_gguf
import tiny_sentencepiece
import tokenizers
from gguf import TokenType
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers, trainers

from llmc.converters import gguf_tokenizer
from llmc.converters.gguf_tokenizer import PRE_TOKENIZERS, merges_of
from llmc.errors import CheckpointError, UnsupportedModelError
from llmc.tokenizer import Tokenizer

TEXTS = [
    "The quick brown fox doesn't jump over 12345 lazy dogs, WE'LL see; I'm sure it's fine...",
    "def f(x):\n    return x ** 2\n\n\n\tprint(f(10))  # two  spaces\r\n",
    "Größe naïve café Ελληνικά русский язык 日本語のテキスト 中文 العربية हिन्दी 🎉👩‍👩‍👧",
    "trailing space ",
    " leading",
    "e\u0301 is not é until it is normalized",
    "½ ² ㊿ ٣٤ ǅ ʰ",
]


def metadata_of(tokenizer: tokenizers.Tokenizer, pre: str) -> dict[str, Any]:
    """What llama.cpp's converter writes of a byte-level tokenizer."""
    values = json.loads(tokenizer.to_str())
    ids = {number: token for token, number in values["model"]["vocab"].items()}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [ids[number] for number in range(len(ids))],
        "tokenizer.ggml.token_type": [int(TokenType.NORMAL)] * len(ids),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in values["model"]["merges"]],
    }


def recovered(metadata: dict[str, Any], folder: Path) -> Tokenizer:
    folder.mkdir(exist_ok=True)
    gguf_tokenizer.write(metadata, folder, where="m.gguf")
    return Tokenizer.load(folder)


# llama.cpp's own expressions (src/llama-vocab.cpp) for what transformers does not know.
_GLM4 = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA_CPP = {"bloom": r" ?[^(\s|.,!?…。，、।۔،)]+", "glm4": _GLM4, "chatglm-bpe": _GLM4}  # noqa: RUF001


def authors_pre_tokenizer(name: str) -> Any:
    """As transformers or llama.cpp builds it for the same name: another hand than ours."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    if expression := GGUF_PRE_TOKENIZER_SPLITS.get(name) or LLAMA_CPP.get(name):
        split = tokenizers.Regex(expression)
        steps = [
            pre_tokenizers.Split(split, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
        return pre_tokenizers.Sequence(steps)
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name in ("smollm", "starcoder"):
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain])
    return plain


def trained(name: str) -> tokenizers.Tokenizer:
    found = tokenizers.Tokenizer(models.BPE(ignore_merges=PRE_TOKENIZERS[name].whole_words))
    found.pre_tokenizer = authors_pre_tokenizer(name)
    found.decoder = tokenizers.decoders.ByteLevel()
    if name == "qwen2":
        found.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    found.train_from_iterator(TEXTS * 3, trainer)
    return found


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[tokenizers.Tokenizer, Tokenizer]]:
    """Of each way of cutting words: a tokenizer, and the one found again from its GGUF metadata."""
    root = tmp_path_factory.mktemp("gguf-tokenizers")
    originals = {name: trained(name) for name in PRE_TOKENIZERS}
    return {
        name: (original, recovered(metadata_of(original, name), root / name)) for name, original in originals.items()
    }


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
@given(text=st.text() | st.text("aA'sS 1\n\r\té\u0301/") | st.sampled_from(TEXTS))
@settings(max_examples=60, deadline=None)
def test_text_becomes_the_same_ids_and_comes_back(
    pairs: dict[str, tuple[tokenizers.Tokenizer, Tokenizer]], name: str, text: str
) -> None:
    original, found = pairs[name]
    ids = found.encode(text, add_special_tokens=False)
    assert ids == original.encode(text).ids
    expected = original.normalizer.normalize_str(text) if original.normalizer else text
    assert found.decode(ids) == expected


def test_every_way_of_cutting_words_that_transformers_knows_too_was_compared() -> None:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    assert set(PRE_TOKENIZERS) & set(GGUF_PRE_TOKENIZER_SPLITS) == {
        "llama-bpe",
        "llama-v3",
        "llama3",
        "qwen2",
        "tekken",
    }


def chat_metadata(**changes: Any) -> dict[str, Any]:
    """The tiny tokenizer, with tokens of every type behind it, as Qwen has them."""
    found = tiny_gguf.vocabulary()
    found["tokenizer.ggml.tokens"] += ["<tool>", "<|fim|>", "<|endofx|>", "[PAD1]", "[PAD2]"]
    found["tokenizer.ggml.token_type"] += [4, 3, 1, 5, 5]
    return {key: value for key, value in {**found, **changes}.items() if value is not None}


def test_added_tokens_have_one_id_and_the_right_flags(tmp_path: Path) -> None:
    found = recovered(chat_metadata(), tmp_path)
    assert found.vocab_size == tiny.VOCAB_SIZE + 3
    text = "<|im_start|>user\n<tool>{}<|fim|><|im_end|>"
    ids = found.encode(text)
    assert [ids.count(number) for number in (1, 2, 320, 321)] == [1, 1, 1, 1]
    assert found.special_ids == {0, 1, 2, 321}
    assert found.decode(ids) == "user\n<tool>{}"
    assert found.decode(ids, skip_special_tokens=False) == text
    assert (found.eos_token, found.pad_token, found.bos_token) == (tiny.IM_END, tiny.END_OF_TEXT, None)
    assert found.chat_template == tiny.CHAT_TEMPLATE
    assert found.eos_ids == {0, 2}


def test_transformers_reads_what_is_written_as_we_do(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    found = recovered(
        chat_metadata(**{"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": 0}), tmp_path
    )
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert theirs(text).input_ids == found.encode(text)
        assert theirs.decode(found.encode(text), skip_special_tokens=True) == found.decode(found.encode(text))
    assert (theirs.eos_token_id, theirs.pad_token_id, theirs.bos_token_id) == (2, 0, 0)
    assert len(theirs) == found.vocab_size


def test_unused_tokens_in_the_midst_keep_their_places(tmp_path: Path) -> None:
    metadata = chat_metadata()
    metadata["tokenizer.ggml.token_type"][50] = int(TokenType.UNUSED)
    found = recovered(metadata, tmp_path)
    assert found.backend.id_to_token(51) == metadata["tokenizer.ggml.tokens"][51]
    assert found.backend.id_to_token(323) is None


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"bos_token_id": 1}, []),
        ({"bos_token_id": 1, "add_bos_token": True}, [1]),
        ({"bos_token_id": 1, "pre": "llama-bpe"}, [1]),
        ({"bos_token_id": 1, "pre": "llama-bpe", "add_bos_token": False}, []),
        ({"add_bos_token": True}, []),
    ],
)
def test_what_begins_a_text(tmp_path: Path, changes: dict[str, Any], expected: list[int]) -> None:
    found = recovered(chat_metadata(**{f"tokenizer.ggml.{key}": value for key, value in changes.items()}), tmp_path)
    whole = found.encode("the dog")
    assert whole == expected + found.encode("the dog", add_special_tokens=False)


def test_what_ends_a_text(tmp_path: Path) -> None:
    metadata = chat_metadata(**{"tokenizer.ggml.add_eos_token": True, "tokenizer.ggml.eot_token_id": 321})
    found = recovered(metadata, tmp_path)
    assert found.encode("the dog")[-1] == 2
    assert found.eos_ids == {0, 2, 321}


def refused(tmp_path: Path, kind: type[Exception], **changes: Any) -> str:
    with pytest.raises(kind) as caught:
        recovered(chat_metadata(**{f"tokenizer.ggml.{key}": value for key, value in changes.items()}), tmp_path)
    return str(caught.value)


def test_a_vocabulary_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    assert "token_type" in refused(tmp_path, CheckpointError, token_type=[1, 2])
    assert "tokens" in refused(tmp_path, CheckpointError, tokens=None)
    assert "'abc'" in refused(tmp_path, CheckpointError, merges=["abc"])
    assert "contradicts itself" in refused(tmp_path, CheckpointError, merges=["zzz yyy"])
    assert "twice" in refused(tmp_path, CheckpointError, tokens=["a", "a"], token_type=None)
    assert "eos_token_id" in refused(tmp_path, CheckpointError, eos_token_id=10**6)
    assert "scores" in refused(tmp_path, CheckpointError, model="llama")
    assert "'bert'" in refused(tmp_path, UnsupportedModelError, model="bert")
    assert "'chameleon'" in refused(tmp_path, UnsupportedModelError, pre="chameleon")


def test_no_word_on_cutting_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recovered(chat_metadata(**{"tokenizer.ggml.pre": None}), tmp_path)
    assert "GPT-2" in caplog.text


def sentencepiece_metadata(model: Any) -> dict[str, Any]:
    def kind(number: int) -> TokenType:
        if model.IsByte(number):
            return TokenType.BYTE
        if model.IsControl(number):
            return TokenType.CONTROL
        if model.IsUnknown(number):
            return TokenType.UNKNOWN
        return TokenType.USER_DEFINED if model.IdToPiece(number) == "<extra>" else TokenType.NORMAL

    numbers = range(model.GetPieceSize())
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [model.IdToPiece(number) for number in numbers],
        "tokenizer.ggml.scores": [model.GetScore(number) for number in numbers],
        "tokenizer.ggml.token_type": [int(kind(number)) for number in numbers],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Tokenizer]:
    model = tiny_sentencepiece.train(TEXTS)
    return model, recovered(sentencepiece_metadata(model), tmp_path_factory.mktemp("sentencepiece"))


@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\u2581"), min_size=1))
@example("  two spaces before")
@example("\n\tx")
@settings(max_examples=200, deadline=None)
def test_sentencepiece_s_ids_are_found_again(pieces: tuple[Any, Tokenizer], text: str) -> None:
    model, found = pieces
    ids = found.encode(text, add_special_tokens=False)
    assert ids == model.EncodeAsIds(text)
    assert found.decode(ids) == text


@pytest.mark.parametrize("text", TEXTS)
def test_sentencepiece_on_texts_that_it_has_merges_for(pieces: tuple[Any, Tokenizer], text: str) -> None:
    model, found = pieces
    ids = found.encode(text)
    assert ids[0] == 1
    assert ids[1:] == model.EncodeAsIds(text)
    assert len(ids) < len(text)
    assert found.special_ids == {0, 1, 2}
    assert (found.bos_token, found.eos_token, found.unk_token) == ("<s>", "</s>", "<unk>")


def test_merges_follow_the_scores() -> None:
    scores = {"a": -10.0, "b": -11.0, "c": -12.0, "ab": -1.0, "abc": -2.0, "bc": -3.0}
    assert merges_of(scores) == [("a", "b"), ("ab", "c"), ("a", "bc"), ("b", "c")]


def test_without_a_space_before(tmp_path: Path) -> None:
    metadata = {**sentencepiece_metadata(tiny_sentencepiece.train(TEXTS)), "tokenizer.ggml.add_space_prefix": False}
    found = recovered(metadata, tmp_path)
    ids = found.encode("the fox", add_special_tokens=False)
    assert found.backend.id_to_token(ids[0])[0] == "t"
    assert found.decode(ids) == "the fox"
