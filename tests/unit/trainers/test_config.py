"""The pretraining configuration: what it refuses, and how it says so."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from llmc.config import Strict
from llmc.errors import ConfigError
from llmc.trainers import config

GOOD = """
output = "run"
[data]
paths = ["text", "/absolute/*.md"]
[tokenizer]
vocab_size = 512
[model]
hidden_size = 64
num_layers = 2
num_heads = 4
intermediate_size = 128
max_positions = 128
[training]
steps = 10
"""


def load(folder: Path, text: str) -> config.Pretrain:
    path = folder / "pretrain.toml"
    path.write_text(text, encoding="utf-8")
    return config.load(path)


def test_relative_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    found = load(tmp_path, GOOD)
    assert found.data.paths == (str(tmp_path / "text"), "/absolute/*.md")
    assert found.output == str(tmp_path / "run")
    assert found.sequence_length == 128


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("num_layers", "num_layer", ["model.num_layer", "did you mean 'num_layers'"]),
        ("steps = 10", "step = 10", ["training.step", "did you mean 'steps'"]),
        ("[training]", "[trainng]", ["'trainng'", "did you mean 'training'"]),
        ("hidden_size = 64\n", "", ["'model.hidden_size' is required"]),
        ("steps = 10", 'steps = "10"', ["training.steps", "'10'"]),
        ("steps = 10", "steps = 0", ["training.steps"]),
        ("steps = 10", "steps = 10\ntokens = 5", ["steps and tokens", "keep one"]),
        ("num_heads = 4", "num_heads = 5", ["hidden_size 64 over num_heads 5"]),
        ("num_heads = 4", "num_heads = 4\nnum_kv_heads = 3", ["num_heads 4 is not a multiple of num_kv_heads 3"]),
        ("vocab_size = 512", "", ["give either vocab_size", "folder"]),
        ("vocab_size = 512", 'vocab_size = 512\nfolder = "x"', ["give either vocab_size", "folder"]),
        ("vocab_size = 512", "vocab_size = 100", ["tokenizer.vocab_size"]),
        ("steps = 10", "sequence_length = 256", ["sequence_length 256", "max_positions 128"]),
        ('paths = ["text", "/absolute/*.md"]', "paths = []", ["data.paths"]),
        ("steps = 10", 'precision = "fp16"', ["training.precision", "fp16"]),
        ("[model]", "[model", ["not valid TOML"]),
    ],
)
def test_a_wrong_field_is_named(tmp_path: Path, old: str, new: str, words: list[str]) -> None:
    assert old in GOOD
    with pytest.raises(ConfigError) as error:
        load(tmp_path, GOOD.replace(old, new))
    for word in ["pretrain.toml", *words]:
        assert word in str(error.value)


def test_every_field_is_described() -> None:
    seen = 0
    for model in vars(config).values():
        if inspect.isclass(model) and issubclass(model, Strict) and model is not Strict:
            described = inspect.getdoc(model) or ""
            for name, field in model.model_fields.items():
                nested = inspect.isclass(field.annotation) and issubclass(field.annotation, Strict)
                assert nested or f"{name}:" in described or f"{name}," in described, f"{model.__name__}.{name}"
                seen += 1
    assert seen >= 35
