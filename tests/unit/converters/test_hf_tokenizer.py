"""Older tokenizers: `tokenizer.model` becomes a tokenizer.json that gives SentencePiece's own ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.converters import hf_tokenizer, sentencepiece_model
from llmc.errors import CheckpointError, UnsupportedModelError
from llmc.tokenizer import Tokenizer

TEXTS = ["The quick brown fox jumps over the lazy dog 12345 times, doesn't it?", "def f(x):\n    return x ** 2  # ok"]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_sentencepiece.train(TEXTS)


def folder_of(model: Any, folder: Path, **files: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.serialized_model_proto())
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return folder


def converted(source: Path, out: Path) -> Tokenizer:
    out.mkdir()
    hf_tokenizer.copy(source, out, {"eos_token_id": 2})
    return Tokenizer.load(out)


@pytest.fixture(scope="module")
def found(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    root = tmp_path_factory.mktemp("older")
    config = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "LlamaTokenizer"}
    return converted(folder_of(model, root / "source", tokenizer_config=config), root / "out")


@given(
    text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\u2581"), min_size=1)
    | st.sampled_from(TEXTS)
)
@settings(max_examples=100, deadline=None)
def test_ids_are_sentencepiece_s(model: Any, found: Tokenizer, text: str) -> None:
    ids = found.encode(text)
    assert ids == [model.bos_id(), *model.EncodeAsIds(text)]
    assert found.decode(ids) == text


def test_what_it_knows_of_itself(found: Tokenizer, model: Any) -> None:
    assert (found.bos_token, found.eos_token, found.eos_ids) == ("<s>", "</s>", {2})
    assert found.special_ids == {0, 1, 2}
    assert found.vocab_size == model.GetPieceSize()


def test_the_vocabulary_is_what_the_package_reads(model: Any, tmp_path: Path) -> None:
    metadata = sentencepiece_model.read(folder_of(model, tmp_path) / "tokenizer.model")
    numbers = range(model.GetPieceSize())
    assert metadata["tokenizer.ggml.tokens"] == [model.IdToPiece(number) for number in numbers]
    assert metadata["tokenizer.ggml.scores"] == [model.GetScore(number) for number in numbers]
    byte = [number for number in numbers if metadata["tokenizer.ggml.token_type"][number] == 6]
    assert byte == [number for number in numbers if model.IsByte(number)]
    assert len(byte) == 256


@pytest.mark.parametrize("form", ["added_tokens", "tokenizer_config"])
def test_added_tokens(model: Any, tmp_path: Path, form: str) -> None:
    size = model.GetPieceSize()
    if form == "added_tokens":
        files: dict[str, Any] = {"added_tokens": {"<tool>": size + 1, "<pad>": size}}
    else:
        decoder = {
            str(size): {"content": "<pad>", "special": True},
            str(size + 1): {"content": "<tool>", "special": False},
        }
        files = {"tokenizer_config": {"added_tokens_decoder": {"1": {"content": "<s>", "special": True}, **decoder}}}
    found = converted(folder_of(model, tmp_path / "source", **files), tmp_path / "out")
    assert found.encode("<tool>", add_special_tokens=False) == [size + 1]
    assert (size in found.special_ids) == (form == "tokenizer_config")
    assert size + 1 not in found.special_ids


def test_what_begins_and_ends_a_text(model: Any, tmp_path: Path) -> None:
    plain = {"add_bos_token": False}
    found = converted(folder_of(model, tmp_path / "plain", tokenizer_config=plain), tmp_path / "a")
    assert found.encode("fox") == model.EncodeAsIds("fox")
    both = {"add_eos_token": True, "eos_token": {"content": "</s>"}}
    found = converted(folder_of(model, tmp_path / "both", tokenizer_config=both), tmp_path / "b")
    assert found.encode("fox") == [1, *model.EncodeAsIds("fox"), 2]


def test_without_a_space_before(tmp_path: Path) -> None:
    model = tiny_sentencepiece.train(TEXTS, add_dummy_prefix=False)
    found = converted(folder_of(model, tmp_path / "source"), tmp_path / "out")
    assert found.encode("fox jumps")[1:] == model.EncodeAsIds("fox jumps")


def test_an_added_token_that_does_not_fit_is_named(model: Any, tmp_path: Path) -> None:
    source = folder_of(model, tmp_path / "source", added_tokens={"<tool>": model.GetPieceSize() + 7})
    with pytest.raises(CheckpointError, match="'<tool>'"):
        converted(source, tmp_path / "out")
    source = folder_of(model, tmp_path / "source", added_tokens={"<tool>": "x"})
    with pytest.raises(CheckpointError, match="added tokens"):
        converted(source, tmp_path / "again")


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"model_type": "char"}, "kind 4"), ({"normalization_rule_name": "nmt_nfkc"}, "changes characters"),
     ({"remove_extra_whitespaces": True}, "changes characters")],
)  # fmt: skip
def test_kinds_that_are_not_supported(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    model = tiny_sentencepiece.train(TEXTS, **{"vocab_size": 300, **changes})
    with pytest.raises(UnsupportedModelError, match=said):
        converted(folder_of(model, tmp_path / "source"), tmp_path / "out")


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_any_damage_is_an_error_of_ours_or_does_no_harm(
    model: Any, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    whole = bytearray(model.serialized_model_proto())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.model"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    try:
        metadata = sentencepiece_model.read(path)
    except (CheckpointError, UnsupportedModelError):
        return
    assert all(isinstance(token, str) for token in metadata["tokenizer.ggml.tokens"])
