"""A real SentencePiece BPE, trained here in a moment, with LLaMA's settings."""

from __future__ import annotations

import io
from typing import Any


def train(texts: list[str], **settings: Any) -> Any:
    """The sentencepiece package's processor; its `serialized_model_proto()` is a `tokenizer.model`."""
    import sentencepiece

    model = io.BytesIO()
    chosen = {
        "vocab_size": 460,
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_digits": True,
        "character_coverage": 0.98,
        "user_defined_symbols": ["<extra>"],
        "allow_whitespace_only_pieces": True,
        "hard_vocab_limit": False,
        "minloglevel": 3,
        **settings,
    }
    lines = [line for text in texts for line in text.splitlines()] * 20
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **chosen)
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
