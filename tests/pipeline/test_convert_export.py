"""A folder that transformers saved, converted and exported: what comes back is what went in."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

from llmc import json_file
from llmc.checkpoint import SOURCE
from llmc.converters import hf

Folder = Callable[[str], Path]


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = tiny.load(folder)(torch.tensor([tiny.tokens(40)])).logits
    return found


def raw(folder: Path) -> dict[str, tuple[torch.dtype, torch.Size, bytes]]:
    return {
        name: (value.dtype, value.shape, value.view(torch.uint8).numpy().tobytes())
        for name, value in load_file(folder / "model.safetensors").items()
    }


@pytest.mark.parametrize("name", tiny.TINY)
def test_tensors_are_equal_to_the_bit_and_the_config_to_the_byte(name: str, tmp_path: Path) -> None:
    """In a half type; test_exactness.py has the others, and shards, for each family."""
    source = tiny.save(tiny.TINY[name], tmp_path / "source", dtype="bfloat16")
    hf.convert(source, tmp_path / "ckpt")
    hf.export(tmp_path / "ckpt", tmp_path / "back")
    assert raw(tmp_path / "back") == raw(source)
    files = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    for file in files:
        assert (tmp_path / "back" / file).read_bytes() == (source / file).read_bytes(), file


@pytest.mark.parametrize("name", tiny.TINY)
def test_the_model_computes_the_same_with_a_config_written_from_the_spec(
    name: str, tiny_source: Folder, tiny_checkpoint: Folder, tmp_path: Path
) -> None:
    """As for a checkpoint that came from GGUF, which has no authors' config."""
    checkpoint = Path(shutil.copytree(tiny_checkpoint(name), tmp_path / "ckpt"))
    shutil.rmtree(checkpoint / SOURCE)
    hf.export(checkpoint, tmp_path / "back")
    written = json_file.read(tmp_path / "back/config.json")
    assert (written["eos_token_id"], written["pad_token_id"], written["dtype"]) == ([2, 0], 0, "float32")
    assert torch.equal(logits(tmp_path / "back"), logits(tiny_source(name)))


def test_transformers_loads_the_exported_tokenizer(
    tiny_checkpoint: Folder, tiny_source: Folder, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    hf.export(tiny_checkpoint("qwen3"), tmp_path / "back")
    theirs, ours = AutoTokenizer.from_pretrained(tiny_source("qwen3")), AutoTokenizer.from_pretrained(tmp_path / "back")
    messages = [{"role": "user", "content": "the quick fox"}]
    assert ours.apply_chat_template(messages, tokenize=False) == theirs.apply_chat_template(messages, tokenize=False)
    assert ours("the dog, там 🎉").input_ids == theirs("the dog, там 🎉").input_ids
