"""Templates for models that came without one: what their authors' code builds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_sentencepiece
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tiny_tiktoken import RANKS, folder_of

from llmc.converters import chat_templates, hf_tokenizer
from llmc.converters.difficult import DIFFICULT
from llmc.tokenizer import Tokenizer

TALK = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Who?"},
]


def rendered(tokenizer: Tokenizer, messages: list[dict[str, str]] = TALK) -> str:
    assert tokenizer.chat_template is not None
    template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(tokenizer.chat_template)
    return template.render(messages=messages, add_generation_prompt=True)


def converted(source: Path, out: Path, **config: Any) -> Tokenizer:
    out.mkdir()
    hf_tokenizer.copy(source, out, config)
    return Tokenizer.load(out)


def pieces(folder: Path, **files: Any) -> Path:
    folder.mkdir()
    settings = {"user_defined_symbols": ["<reserved_106>", "<reserved_107>"]} if files else {}
    model = tiny_sentencepiece.train(list(DIFFICULT[:5]), **settings)
    (folder / "tokenizer.model").write_bytes(model.serialized_model_proto())
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def test_qwen_chat(tmp_path: Path) -> None:
    """make_context of qwen_generation_utils.py, in the format "chatml"."""
    count = len(RANKS)
    generation = {"chat_format": "chatml", "eos_token_id": count}
    source = folder_of("qwen", tmp_path / "s", generation_config=generation)
    found = converted(source, tmp_path / "o", model_type="qwen")
    assert rendered(found) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert found.eos_ids == {count, count + 2}
    own = [{"role": "system", "content": "Be brief."}, *TALK[:1]]
    assert rendered(found, own).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n")


def test_a_base_model_gets_none(tmp_path: Path) -> None:
    found = converted(folder_of("qwen", tmp_path / "s"), tmp_path / "o", model_type="qwen")
    assert found.chat_template is None


def test_a_template_of_its_own_stays(tmp_path: Path) -> None:
    files = {"generation_config": {"chat_format": "chatml"}, "tokenizer_config": {"chat_template": "mine"}}
    found = converted(folder_of("qwen", tmp_path / "s", **files), tmp_path / "o", model_type="qwen")
    assert found.chat_template == "mine"


def test_baichuan_chat(tmp_path: Path) -> None:
    """build_chat_input of generation_utils.py: a role is a token of its own, whose id the generation config gives."""
    ids = {"user_token_id": 3, "assistant_token_id": 4}
    found = converted(pieces(tmp_path / "s", generation_config=ids), tmp_path / "o", model_type="baichuan")
    user, assistant = (found.backend.id_to_token(number) for number in ids.values())
    assert (user, assistant) == ("<reserved_106>", "<reserved_107>")
    system = [{"role": "system", "content": "Be brief."}]
    assert rendered(found, system + TALK) == f"Be brief.{user}Hi{assistant}Hello.{user}Who?{assistant}"


@pytest.mark.parametrize("name", ["chatglm2-6b", "chatglm3-6b"])
def test_chatglm(name: str, tmp_path: Path) -> None:
    source = pieces(tmp_path / "s")
    found = converted(source, tmp_path / "o", model_type="chatglm", _name_or_path=f"THUDM/{name}", eos_token_id=2)
    first = found.backend.token_to_id("[MASK]")
    text = rendered(found)
    if name == "chatglm2-6b":
        assert text == "[gMASK]sop[Round 1]\n\n问：Hi\n\n答：Hello.\n\n[Round 2]\n\n问：Who?\n\n答："  # noqa: RUF001
        assert found.eos_ids == {2}
        assert found.vocab_size == first + 5
    else:
        assert text == "[gMASK]sop<|user|>\n Hi<|assistant|>\n Hello.<|user|>\n Who?<|assistant|>"
        assert found.eos_ids == {2, first + 6, first + 8}
        assert found.vocab_size == first + 9
    ids = found.encode(text, add_special_tokens=False)
    assert ids[:2] == [first + 1, first + 3]
    assert found.encode("fox")[:2] == [first + 1, first + 3]
    # The token "sop" is not one inside a word.
    assert first + 3 not in found.encode("philosophy sophist", add_special_tokens=False)


def test_chatglm_6b(tmp_path: Path) -> None:
    """build_prompt of modeling_chatglm.py's `chat`; the two tokens are what its tokenizer adds."""
    folder = tmp_path / "s"
    folder.mkdir()
    model = tiny_sentencepiece.train(list(DIFFICULT[:5]), model_type="unigram", user_defined_symbols=["<n>"])
    (folder / "ice_text.model").write_bytes(model.serialized_model_proto())
    config = {"model_type": "chatglm", "_name_or_path": "THUDM/chatglm-6b", "position_encoding_2d": True}
    found = converted(folder, tmp_path / "o", **config, eos_token_id=20005)
    assert found.eos_ids == {20005}
    text = rendered(found)
    assert text == "[Round 0]\n问：Hi\n答：Hello.\n[Round 1]\n问：Who?\n答：[gMASK]<sop>"  # noqa: RUF001
    assert rendered(found, TALK[:1]) == "Hi[gMASK]<sop>"
    for prompt in (text, "Hi[gMASK]<sop>"):
        plain = prompt.removesuffix("[gMASK]<sop>")
        assert found.encode(prompt, add_special_tokens=False) == found.encode(plain)


def test_every_row_is_found_by_its_own_words() -> None:
    for row in chat_templates.TEMPLATES:
        config = {"model_type": row.model_type, "_name_or_path": row.name}
        assert chat_templates.find(config, {row.sign: 1}) is row
    assert chat_templates.find({"model_type": "llama"}, {}) is None
