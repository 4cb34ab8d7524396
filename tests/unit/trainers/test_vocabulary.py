"""The trained tokenizer, judged by transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from llmc.trainers.data import vocabulary

TEXTS = ["def add(a, b):\n    return a + b\n" * 20, "The quick brown fox, 12345 times.\n" * 20]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return vocabulary.train(TEXTS, 290)


def test_it_has_the_size_asked_for_and_special_tokens_first(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == 290
    assert [tokenizer.id_to_token(index) for index in range(3)] == list(vocabulary.SPECIAL)


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    # The decoder leaves special tokens out on request only: a text may contain their names.
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_it_learned_from_the_text(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode(TEXTS[0]).ids) < len(TEXTS[0]) * 0.6


def test_transformers_reads_the_folder_and_renders_the_template(tokenizer: Tokenizer, tmp_path: Path) -> None:
    vocabulary.save(tokenizer, tmp_path, max_positions=64)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.eos_token == "<|endoftext|>"
    assert loaded.model_max_length == 64
    assert loaded("def add(a, b):").input_ids == tokenizer.encode("def add(a, b):").ids
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    text = loaded.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes?<|im_end|>\n<|im_start|>assistant\n"
    ids = loaded(text, add_special_tokens=False).input_ids
    assert ids.count(1) == 3
    assert ids.count(2) == 2
