from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.errors import CheckpointError
from llmc.tokenizer import Tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.save_tokenizer(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    """Ours, and transformers' of the same files."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.save_tokenizer(folder)
    return Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)


@given(text=st.text() | st.sampled_from(["<|im_start|>user\nthe fox<|im_end|>", "a<|im_end|>b<|endoftext|>"]))
@settings(max_examples=100, deadline=None)
def test_text_to_ids_and_back_as_transformers_does(both: tuple[Tokenizer, Any], text: str) -> None:
    ours, theirs = both
    ids = ours.encode(text)
    assert ids == theirs(text).input_ids
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids) == text


def test_what_it_knows_of_itself(folder: Path) -> None:
    found = Tokenizer.load(folder)
    assert found.vocab_size == tiny.VOCAB_SIZE
    assert found.chat_template == tiny.CHAT_TEMPLATE
    assert found.special_ids == {0, 1, 2}
    assert (found.bos_token, found.eos_token, found.unk_token, found.pad_token) == (
        None,
        "<|im_end|>",
        None,
        "<|endoftext|>",
    )


def test_ids_that_it_does_not_know_are_passed_over(folder: Path) -> None:
    found = Tokenizer.load(folder)
    assert found.decode([*found.encode("the fox"), 99999]) == "the fox"


def test_half_a_character_is_the_replacement_character(folder: Path) -> None:
    found = Tokenizer.load(folder)
    ids = found.encode("🎉")
    assert len(ids) > 1
    assert found.decode(ids[:-1]).startswith("\N{REPLACEMENT CHARACTER}")


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def edit(path: Path, **changes: Any) -> None:
    write(path, {**json.loads(path.read_text(encoding="utf-8")), **changes})


@pytest.mark.parametrize(("value", "expected"), [(0, {0, 2}), ([0, 1], {0, 1, 2}), (None, {2}), ([], {2})])
def test_what_ends_a_text(folder: Path, value: Any, expected: set[int]) -> None:
    write(folder / "generation_config.json", {"eos_token_id": value})
    assert Tokenizer.load(folder).eos_ids == expected


def test_no_end_at_all(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", eos_token=None)
    assert Tokenizer.load(folder).eos_ids == frozenset()


def test_an_end_that_is_no_token_is_passed_over(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", eos_token="<|nothing|>")
    assert Tokenizer.load(folder).eos_ids == frozenset()


def test_tokens_with_flags_around_them(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", eos_token={"content": "<|endoftext|>", "lstrip": False})
    found = Tokenizer.load(folder)
    assert (found.eos_token, found.eos_ids) == ("<|endoftext|>", {0})


def test_the_older_map_fills_what_the_configuration_leaves_out(folder: Path) -> None:
    write(folder / "special_tokens_map.json", {"eos_token": "<|endoftext|>", "bos_token": "<|im_start|>"})
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    del config["bos_token"]
    write(folder / "tokenizer_config.json", config)
    found = Tokenizer.load(folder)
    assert (found.bos_token, found.eos_token) == ("<|im_start|>", "<|im_end|>")


def test_where_the_chat_template_is_found(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", chat_template="old")
    assert Tokenizer.load(folder).chat_template == tiny.CHAT_TEMPLATE
    (folder / "chat_template.jinja").unlink()
    assert Tokenizer.load(folder).chat_template == "old"
    several = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    edit(folder / "tokenizer_config.json", chat_template=several)
    assert Tokenizer.load(folder).chat_template == "d"
    edit(folder / "tokenizer_config.json", chat_template=None)
    assert Tokenizer.load(folder).chat_template is None


def test_truncation_and_padding_of_whoever_saved_it_are_undone(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder).backend
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(folder / "tokenizer.json"))
    text = "the quick brown fox jumps over"
    found = Tokenizer.load(folder)
    assert found.decode(found.encode(text), skip_special_tokens=False) == text


def test_a_tokenizer_json_alone_is_enough(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name != "tokenizer.json":
            path.unlink()
    found = Tokenizer.load(folder)
    assert (found.chat_template, found.eos_token, found.eos_ids) == (None, None, frozenset())
    assert found.decode(found.encode("the fox")) == "the fox"


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("tokenizer.json", "{", "tokenizer.json"),
        ("tokenizer.json", '{"model": 1}', "tokenizer.json"),
        ("tokenizer_config.json", "{", "tokenizer_config.json"),
        ("tokenizer_config.json", "[]", "list"),
        ("tokenizer_config.json", '{"eos_token": 3}', "eos_token"),
        ("tokenizer_config.json", '{"chat_template": 3}', "chat_template"),
        ("special_tokens_map.json", "?", "special_tokens_map.json"),
        ("generation_config.json", '{"eos_token_id": "x"}', "eos_token_id"),
        ("generation_config.json", '{"eos_token_id": [true]}', "eos_token_id"),
        ("generation_config.json", "[" * 100000, "generation_config.json"),
    ],
)
def test_a_malformed_file_is_named(folder: Path, name: str, text: str, said: str) -> None:
    if said == "chat_template":
        (folder / "chat_template.jinja").unlink()
    (folder / name).write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=said):
        Tokenizer.load(folder)


def test_a_template_that_is_not_text_is_named(folder: Path) -> None:
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja"):
        Tokenizer.load(folder)


def test_no_tokenizer_at_all(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_every_artifact_carries_the_tokenizer(tiny_checkpoint: Callable[[str], Path]) -> None:
    assert Tokenizer.load(tiny_checkpoint("qwen3")).eos_ids == {0, 2}
