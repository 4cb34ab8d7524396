"""The tokenizer's files of a Hugging Face folder, for a checkpoint.

`tokenizer.json` and what stands beside it travel as they are. A folder from the days of SentencePiece has only
`tokenizer.model`, from which a `tokenizer.json` is made.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmc import checkpoint
from llmc.converters import gguf_tokenizer, json_file, sentencepiece_model
from llmc.converters.gguf_tokenizer import TokenType
from llmc.errors import CheckpointError
from llmc.log import logger

GENERATION = "generation_config.json"
SENTENCEPIECE = "tokenizer.model"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_KEY = "tokenizer.ggml."


def copy(source: Path, target: Path, config: Mapping[str, Any]) -> None:
    """Copy the tokenizer, make a `tokenizer.json` of an older one, and note the end-of-text ids.

    Args:
        config: The model's config; before generation_config.json was invented it held the ids.

    Raises:
        CheckpointError: An older tokenizer is damaged, or its files contradict each other.
        UnsupportedModelError: An older tokenizer is of a kind that llmc does not know.
    """
    copied = checkpoint.copy_tokenizer(source, target)
    if "tokenizer.json" not in copied:
        if (source / SENTENCEPIECE).is_file():
            _from_sentencepiece(source, target / "tokenizer.json")
        elif (source / "vocab.json").is_file():
            raise CheckpointError(
                f"{source} has a tokenizer in vocab.json and no tokenizer.json: load it once with transformers' "
                "AutoTokenizer and save it"
            )
        else:
            logger.warning("%s has no tokenizer: an engine made from it cannot be served", source)
    ids = {key: config[key] for key in TOKEN_IDS if config.get(key) is not None}
    if GENERATION not in copied and ids:
        (target / GENERATION).write_text(json.dumps(ids, indent=2) + "\n", encoding="utf-8")


def _from_sentencepiece(source: Path, path: Path) -> None:
    metadata = sentencepiece_model.read(source / SENTENCEPIECE)
    config = json_file.read(source / "special_tokens_map.json", required=False) | json_file.read(
        source / "tokenizer_config.json", required=False
    )
    tokens, types = metadata[_KEY + "tokens"], metadata[_KEY + "token_type"]
    for number, (token, is_special) in sorted(_added(source, config).items()):
        kind = TokenType.CONTROL if is_special else TokenType.USER_DEFINED
        if number == len(tokens):
            tokens.append(token)
            types.append(int(kind))
            metadata[_KEY + "scores"].append(0.0)
        elif not (0 <= number < len(tokens) and tokens[number] == token):
            raise CheckpointError(f"{source}: the added token {token!r} has the id {number}, which does not fit")
        elif types[number] == TokenType.NORMAL:
            types[number] = int(kind)
    for name, default in (("bos_token", "<s>"), ("eos_token", "</s>")):
        value = config.get(name, default)
        value = value.get("content") if isinstance(value, dict) else value
        if value in tokens:
            metadata[f"{_KEY}{name}_id"] = tokens.index(value)
        # LlamaTokenizer's defaults, in the transformers of that time.
        metadata[f"{_KEY}add_{name}"] = bool(config.get(f"add_{name}", name == "bos_token"))
    gguf_tokenizer.build(metadata, where=source / SENTENCEPIECE).save(str(path))


def _added(source: Path, config: Mapping[str, Any]) -> dict[int, tuple[str, bool]]:
    """Tokens added after SentencePiece's own, by id: (text, whether it is special)."""
    try:
        listed = {
            int(number): str(token)
            for token, number in json_file.read(source / "added_tokens.json", required=False).items()
        }
        found = {number: (token, False) for number, token in listed.items()}
        for number, entry in (config.get("added_tokens_decoder") or {}).items():
            found[int(number)] = (str(entry["content"]), bool(entry.get("special")))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{source}: the added tokens cannot be read: {error!r}") from None
    return found
