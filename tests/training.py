"""A configuration small enough to train in a second, and text for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmc import config
from llmc.trainers.config import Pretrain

_TEXT = "the cat sat on a mat and the dog ran to it while birds sang over green hills of grass"


def write_texts(folder: Path, count: int = 6) -> Path:
    """Some text files that differ and can be learned."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = _TEXT.split()
    for number in range(count):
        words = [vocabulary[(index * (number + 2)) % len(vocabulary)] for index in range(400)]
        (folder / f"{number}.txt").write_text(" ".join(words) + f"\nend of {number}\n", encoding="utf-8")
    return folder


def tiny(texts: Path, **training: Any) -> Pretrain:
    """A tiny run over the .txt files of a folder."""
    values = {
        "data": {"paths": (str(texts),), "suffixes": (".txt",), "held_out_fraction": 0.1},
        "tokenizer": {"vocab_size": 300},
        "model": {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "num_kv_heads": 2,
            "intermediate_size": 48,
            "max_positions": 32,
        },
        "training": {
            "steps": 30,
            "batch_size": 4,
            "learning_rate": 5e-3,
            "warmup_steps": 5,
            "log_every": 5,
            "evaluate_every": 10,
            "checkpoint_every": 10,
        }
        | training,
    }
    return config.parse(Pretrain, values, where="test")
