"""The tokenizer's files of a Hugging Face folder, for a checkpoint.

`tokenizer.json` and what stands beside it travel as they are. An older folder has only SentencePiece's or tiktoken's
file, from which a `tokenizer.json` is made, and compared with the original package where that is installed. A chat
model without a template gets its authors' (chat_templates.py).
"""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from llmc import checkpoint, json_file
from llmc.converters import (
    chat_templates,
    chatglm_tokens,
    difficult,
    gguf_tokenizer,
    sentencepiece_model,
    tiktoken_model,
)
from llmc.converters.gguf_tokenizer import TokenType
from llmc.errors import CheckpointError
from llmc.log import logger

GENERATION, TEMPLATE, CONFIG = "generation_config.json", "chat_template.jinja", "tokenizer_config.json"
SENTENCEPIECE = "tokenizer.model"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_KEY = "tokenizer.ggml."


def copy(source: Path, target: Path, config: Mapping[str, Any]) -> None:
    """Copy the tokenizer, make a `tokenizer.json` of an older one, and note the end-of-text ids.

    Args:
        config: The model's config; before generation_config.json was invented it held the ids.

    Raises:
        CheckpointError: The tokenizer is damaged, or an older one's files contradict each other.
        UnsupportedModelError: An older tokenizer is of a kind that llmc does not know, or gives other ids.
    """
    copied = checkpoint.copy_tokenizer(source, target)
    if "tokenizer.json" in copied:
        _check(source / "tokenizer.json")
    else:
        _make(source, target, config)
    ids = {key: config[key] for key in TOKEN_IDS if config.get(key) is not None}
    if GENERATION not in copied and ids:
        _write(target / GENERATION, ids)
    if TEMPLATE not in copied and (target / "tokenizer.json").is_file():
        _add_template(target, config)


def _check(path: Path) -> None:
    try:
        Tokenizer.from_file(str(path))
    except Exception as error:
        # The package raises plain Exception for whatever is wrong in the file.
        raise CheckpointError(f"{path} is not a tokenizer: {error}") from None


def _make(source: Path, target: Path, config: Mapping[str, Any]) -> None:
    models = sorted([*source.glob("*.tiktoken"), *source.glob("*.model")], key=lambda path: path.name != SENTENCEPIECE)
    if models and tiktoken_model.is_tiktoken(models[0]):
        _from_tiktoken(models[0], target, config)
    elif models:
        _from_sentencepiece(models[0], target / "tokenizer.json", config)
    elif (source / "vocab.json").is_file():
        raise CheckpointError(
            f"{source} has a tokenizer in vocab.json and no tokenizer.json: load it once with transformers' "
            "AutoTokenizer and save it"
        )
    else:
        logger.warning("%s has no tokenizer: an engine made from it cannot be served", source)


def _words(source: Path) -> dict[str, Any]:
    return json_file.read(source / "special_tokens_map.json", required=False) | json_file.read(
        source / CONFIG, required=False
    )


def _from_tiktoken(model: Path, target: Path, config: Mapping[str, Any]) -> None:
    kind, ranked, words = tiktoken_model.kind_of(config, model), tiktoken_model.read(model), _words(model.parent)
    tokenizer = tiktoken_model.build(ranked, kind, _added(model.parent, words), model)
    special = {token.content: number for number, token in tokenizer.get_added_tokens_decoder().items()}
    if theirs := tiktoken_model.original(ranked, kind, special):
        _compare(tokenizer, theirs, model)
    gguf_tokenizer.surround(tokenizer, kind.before)
    tokenizer.save(str(target / "tokenizer.json"))
    if not words.get("eos_token"):
        _write(target / CONFIG, json_file.read(target / CONFIG, required=False) | {"eos_token": kind.eos})


def _from_sentencepiece(model: Path, path: Path, config: Mapping[str, Any]) -> None:
    source = model.parent
    metadata, words = sentencepiece_model.read(model), _words(source)
    tokens, types = metadata[_KEY + "tokens"], metadata[_KEY + "token_type"]
    more = chatglm_tokens.of(config, words, tokens)
    more.apply(metadata)
    added = _added(source, words)
    if not added:
        added = {number: (token, True) for number, token in enumerate(more.added, start=len(tokens))}
    for number, (token, is_special) in sorted(added.items()):
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
        value = words.get(name, default)
        value = value.get("content") if isinstance(value, dict) else value
        if value in tokens:
            metadata[f"{_KEY}{name}_id"] = tokens.index(value)
        # LlamaTokenizer's defaults, in the transformers of that time.
        metadata[f"{_KEY}add_{name}"] = bool(words.get(f"add_{name}", name == "bos_token"))
    tokenizer = gguf_tokenizer.build(metadata, where=model)
    if theirs := sentencepiece_model.original(model, more.pieces):
        _compare(tokenizer, more.around(theirs), model, alike=sentencepiece_model.as_likely(metadata))
    if more.before or more.after:
        gguf_tokenizer.surround(tokenizer, more.before, more.after)
    tokenizer.save(str(path))


def _compare(
    tokenizer: Tokenizer, theirs: Callable[[str], list[int]], model: Path, *, alike: difficult.Alike = operator.eq
) -> None:
    """Compare with the original on difficult texts; not on those that hold what only one of them knows as a token."""
    known = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    # SentencePiece has this character for a space, and ends a text at the other.
    skipped = [text for text in difficult.DIFFICULT if any(part in text for part in (*known, "\u2581", "\0"))]
    difficult.check(
        lambda text: [] if text in skipped else tokenizer.encode(text, add_special_tokens=False).ids,
        lambda text: [] if text in skipped else theirs(text),
        what=str(model),
        alike=alike,
    )


def _add_template(target: Path, config: Mapping[str, Any]) -> None:
    """Store a template of the table, and the tokens that end an answer with it."""
    words, generation = (json_file.read(target / name, required=False) for name in (CONFIG, GENERATION))
    row = chat_templates.find(config, generation)
    if row is None or words.get("chat_template"):
        return
    tokenizer, text = Tokenizer.from_file(str(target / "tokenizer.json")), row.text
    for role in ("user", "assistant"):
        number = generation.get(f"{role}_token_id")
        token = tokenizer.id_to_token(number) if isinstance(number, int) else None
        text = text.replace(f"{{{role}}}", token or "")
    (target / TEMPLATE).write_text(text, encoding="utf-8")
    stated = generation.get("eos_token_id")
    ends = stated if isinstance(stated, list) else [] if stated is None else [stated]
    ends += [number for token in row.ends if (number := tokenizer.token_to_id(token)) is not None]
    if row.ends:
        _write(target / GENERATION, generation | {"eos_token_id": list(dict.fromkeys(ends))})
    logger.warning("%s came without a chat template: that of %s is stored", target.name, row.source)


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


def _write(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
