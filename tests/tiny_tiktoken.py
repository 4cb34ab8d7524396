"""A tiktoken file as Qwen 1, Llama 3 and GLM-4 have it, learned here in a moment."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import tokenizers

from llmc.converters.difficult import DIFFICULT

FILES = {"qwen": "qwen.tiktoken", "llama": "tokenizer.model", "chatglm": "tokenizer.model"}


def trained() -> dict[bytes, int]:
    """Ranks of a BPE of bytes, learned from the difficult texts."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    model.train_from_iterator(DIFFICULT, trainer)
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    byte_of = {chr(byte): byte for byte in visible} | {chr(256 + at): byte for at, byte in enumerate(hidden)}
    return {bytes(byte_of[letter] for letter in token): rank for token, rank in model.get_vocab().items()}


RANKS = trained()


def folder_of(model_type: str, folder: Path, ranks: dict[bytes, int] = RANKS, **files: Any) -> Path:
    folder.mkdir(exist_ok=True)
    lines = [f"{base64.b64encode(token).decode()} {rank}" for token, rank in sorted(ranks.items(), key=lambda i: i[1])]
    (folder / FILES[model_type]).write_text("\n".join(lines) + "\n")
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return folder
