"""SentencePiece unigram models become a tokenizer.json with the same ids; ChatGLM-6B's with what its code adds."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tiny_sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers

from llmc import text as texts
from llmc.converters import hf_tokenizer, sentencepiece_model
from llmc.converters.difficult import DIFFICULT
from llmc.errors import CheckpointError, UnsupportedModelError
from llmc.serve.stream import Vocabulary
from llmc.tokenizer import Tokenizer

TRAINED_ON = list(DIFFICULT[:7])
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "without bytes": {"byte_fallback": False},
    "nmt_nfkc": {"normalization_rule_name": "nmt_nfkc"},
    "nmt_nfkc, no extra spaces": {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
    "no extra spaces": {"remove_extra_whitespaces": True},
    "no space before": {"add_dummy_prefix": False},
}
CHATGLM = {"model_type": "chatglm", "position_encoding_2d": True, "_name_or_path": "THUDM/chatglm-6b"}
SPECIAL = ["[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>"]
BLANKS = ["<|tab|>", *(f"<|blank_{count}|>" for count in range(2, 81))]

# SentencePiece ends a text at a NUL, and takes its own space for one.
any_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\u2581<"), min_size=1)
spaced = st.lists(st.sampled_from(["a", "fox ", " ", "\t", "\n", "  " * 21, "我们", "1", "}"]), min_size=1).map("".join)


def simple(text: str) -> str:
    """ASCII, Chinese, and the wide forms of ASCII, which NFKC makes narrow."""
    return re.sub(r"[^\x01-\x7f\u3001-\u3029\u4e00-\u9fff\uff01-\uff5e]", "\uff0c", text)


def train(**changes: Any) -> Any:
    return tiny_sentencepiece.train(TRAINED_ON, model_type="unigram", **{"vocab_size": 500, **changes})


def converted(model: bytes, folder: Path, config: dict[str, Any], **words: Any) -> Tokenizer:
    (folder / "source").mkdir()
    (folder / "source/ice_text.model").write_bytes(model)
    (folder / "source/tokenizer_config.json").write_text(json.dumps(words), encoding="utf-8")
    (folder / "out").mkdir()
    hf_tokenizer.copy(folder / "source", folder / "out", {"eos_token_id": 2, **config})
    return Tokenizer.load(folder / "out")


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Tokenizer, str]:
    model = train(**KINDS[request.param])
    folder = tmp_path_factory.mktemp("unigram")
    return model, converted(model.serialized_model_proto(), folder, {}, add_bos_token=False), request.param


@given(text=any_text | spaced | st.sampled_from(TRAINED_ON))
@settings(max_examples=100, deadline=None)
def test_ids_are_sentencepiece_s(pair: tuple[Any, Tokenizer, str], text: str) -> None:
    model, found, kind = pair
    if "nfkc" in kind:
        # The package looks up what belongs together as one; of characters alone it knows as much as SentencePiece.
        text = simple(text)
    ids = model.EncodeAsIds(text)
    assert alike(model, found.encode(text), ids)
    if kind == "plain":
        assert found.decode(ids) == text


def test_a_token_that_was_asked_for_is_taken(pair: tuple[Any, Tokenizer, str]) -> None:
    model, found, _kind = pair
    for text in ("<extra>", "fox<extra>fox <extra><extra>", "<extra"):
        assert found.encode(text) == model.EncodeAsIds(text)
    assert model.PieceToId("<extra>") in found.encode("fox<extra>fox")


def test_what_is_no_text_is_not_found_in_it(pair: tuple[Any, Tokenizer, str]) -> None:
    model, found, _kind = pair
    for text in ("<0x11>", "<0x12> <0x21>"):
        assert found.encode(text) == model.EncodeAsIds(text)


def alike(model: Any, met: list[int], expected: list[int]) -> bool:
    """The same, or another cut into pieces that is as likely: which of them it takes is a matter of rounding."""
    if met == expected:
        return True
    pieces = ["".join(map(model.IdToPiece, ids)) for ids in (met, expected)]
    scores = [sum(map(model.GetScore, ids)) for ids in (met, expected)]
    return pieces[0] == pieces[1] and scores[0] == pytest.approx(scores[1], rel=1e-5)


def first_release() -> bytes:
    """The authors put most of their tokens into the model when they load it."""
    model: bytes = train(byte_fallback=False, user_defined_symbols=["<n>"]).serialized_model_proto()
    return model


def last_release() -> bytes:
    model: bytes = train(
        vocab_size=640, user_defined_symbols=["<n>", *SPECIAL, *BLANKS], normalization_rule_name="nmt_nfkc",
        remove_extra_whitespaces=True,
    ).serialized_model_proto()  # fmt: skip
    return model


def authors_way(model: bytes, *, images: int, adds: bool) -> tuple[Callable[[str], list[int]], Any]:
    """SPTokenizer of tokenization_chatglm.py, with sentencepiece's own reading of the model."""
    if adds:
        from sentencepiece import sentencepiece_model_pb2

        proto = sentencepiece_model_pb2.ModelProto()
        proto.ParseFromString(model)
        names = [(token, 3) for token in SPECIAL] + [(token, 4) for token in BLANKS]
        for token, kind in [*names, *((f"<0x{byte:02X}>", 6) for byte in range(256))]:
            proto.pieces.append(proto.SentencePiece(piece=token, score=0.0, type=kind))
        proto.trainer_spec.byte_fallback = True
        model = proto.SerializeToString()
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)

    def encode(text: str) -> list[int]:
        text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
        for count in range(80, 1, -1):
            text = text.replace(" " * count, f"<|blank_{count}|>")
        ids = [images + number for number in processor.EncodeAsIds(text)]
        return [*ids, *(images + processor.PieceToId(token) for token in ("[gMASK]", "<sop>"))]

    return encode, processor


@pytest.fixture(scope="module", params=["first", "last"])
def chatglm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Tokenizer]:
    """(the authors' way, their processor, ours)."""
    is_first = request.param == "first"
    model = first_release() if is_first else last_release()
    words = {"bos_token": "<sop>", "eos_token": "<eop>"} | ({} if is_first else {"num_image_tokens": 0})
    encode, processor = authors_way(model, images=20000 if is_first else 0, adds=is_first)
    return encode, processor, converted(model, tmp_path_factory.mktemp("chatglm"), CHATGLM, **words)


@given(text=any_text | spaced | st.sampled_from(TRAINED_ON))
@settings(max_examples=100, deadline=None)
def test_chatglm_6b_s_ids_are_its_authors(chatglm: tuple[Any, Any, Tokenizer], text: str) -> None:
    encode, processor, found = chatglm
    text = simple(text)
    met, expected = found.encode(text), encode(text)
    offset = found.vocab_size - processor.GetPieceSize()
    assert met[-2:] == expected[-2:]
    assert alike(processor, [number - offset for number in met], [number - offset for number in expected])


def test_chatglm_6b_s_words(chatglm: tuple[Any, Any, Tokenizer]) -> None:
    encode, processor, found = chatglm
    code = "def f(x):\n\treturn   x" + " " * 85 + "我们"
    ids = found.encode(code)
    assert ids == encode(code)
    assert found.decode(ids) == code
    special = {found.backend.token_to_id(token) for token in SPECIAL}
    assert special <= found.special_ids
    assert found.eos_token == "<eop>"
    assert found.vocab_size == processor.GetPieceSize() + (20000 if ids[0] >= 20000 else 0)
    assert found.chat_template is not None
    stream = Vocabulary(found).detokenizer()
    assert "".join([*map(stream.push, ids), stream.flush()]) == code
    assert Vocabulary(found).longest_piece >= 80
    # What a text is measured on begins as an answer does.
    (window,) = texts.windows("fox jumps", found, 64)
    assert window.tolist() == [*ids[-2:], *found.encode("fox jumps", add_special_tokens=False)]


def test_a_model_that_cannot_be_converted_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were a text cut in another way, it would be noticed."""
    monkeypatch.setattr(normalizers, "Prepend", lambda _: normalizers.Lowercase())
    with pytest.raises(UnsupportedModelError, match="cannot be converted exactly"):
        converted(train().serialized_model_proto(), tmp_path, {})


def test_cuts_that_are_as_likely(tmp_path: Path) -> None:
    """A run of one character: pieces of two and of one, in any order."""
    model = train(vocab_size=520)
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model.serialized_model_proto())
    is_alike = sentencepiece_model.as_likely(sentencepiece_model.read(path))
    two = next(number for number in range(model.GetPieceSize()) if len(model.IdToPiece(number)) == 2)
    one, other = map(model.PieceToId, model.IdToPiece(two))
    assert is_alike([two, one], [two, one])
    assert is_alike([one, two, one], [one, one, two]) == (one == other)
    assert not is_alike([two], [one, other])


def test_damage_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"ice_text\.model"):
        converted(first_release()[:-7], tmp_path, CHATGLM)
