"""A checkpoint's tokenizer in GGUF's metadata: the inverse of gguf_tokenizer.py.

Byte-level BPE is written with its merges and the name of the way in which it cuts words, which must be one that
llama.cpp knows. SentencePiece BPE is written with scores, which a tokenizer.json no longer has: any that fall from
merge to merge give the same merges again. What was written is read back, and compared on difficult texts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models

from llmc.converters import difficult, gguf_tokenizer
from llmc.converters.gguf_tokenizer import PRE_TOKENIZERS, PreTokenizer, TokenType
from llmc.errors import UnsupportedModelError
from llmc.log import logger
from llmc.tokenizer import Tokenizer

_KEY = "tokenizer.ggml."
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def write(folder: Path, vocab_size: int) -> dict[str, Any]:
    """The metadata of the tokenizer in a folder.

    Args:
        vocab_size: Rows of the embedding: llama.cpp wants a token for each.

    Raises:
        CheckpointError: There is no tokenizer, or a file of it is malformed.
        UnsupportedModelError: It is of a kind, or cuts words in a way, that GGUF has no name for.
    """
    tokenizer = Tokenizer.load(folder)
    values = json.loads(tokenizer.backend.to_str())
    tokens, types = _tokens(values, vocab_size, folder)
    found = {_KEY + "tokens": tokens, _KEY + "token_type": types, **_named(tokenizer), **_around(tokenizer, folder)}
    if tokenizer.chat_template is not None:
        found["tokenizer.chat_template"] = tokenizer.chat_template
    model = values["model"]
    if model["type"] != "BPE" or model.get("dropout") or model.get("continuing_subword_prefix"):
        raise UnsupportedModelError(f"{folder / 'tokenizer.json'} is a {model['type']} tokenizer; GGUF gets BPE alone")
    forms = _sentencepiece(values, tokens, types, folder) if model["byte_fallback"] else _byte_level(values, folder)
    lost = None
    for form in forms:
        whole = {**form, **found}
        read = gguf_tokenizer.build(whole, where="the GGUF file")
        if not (lost := _difference(tokenizer.backend, read)):
            return whole
    raise UnsupportedModelError(f"{folder}: the tokenizer cannot be written as GGUF exactly: {lost}")


def _difference(original: tokenizers.Tokenizer, read: tokenizers.Tokenizer) -> str | None:
    added = [token.content for token in original.get_added_tokens_decoder().values()]
    texts = [f"a {token} b{token}\n{token}1" for token in added[:300]]
    return difficult.difference(
        lambda text: read.encode(text, add_special_tokens=False).ids,
        lambda text: original.encode(text, add_special_tokens=False).ids,
        texts,
    )


def _tokens(values: Mapping[str, Any], vocab_size: int, folder: Path) -> tuple[list[str], list[int]]:
    """A text and a type for each row of the embedding."""
    vocabulary = {number: (token, TokenType.NORMAL) for token, number in values["model"]["vocab"].items()}
    if values["model"].get("byte_fallback"):
        vocabulary = {
            number: (token, TokenType.BYTE if _BYTE.fullmatch(token) else kind)
            for number, (token, kind) in vocabulary.items()
        }
    for entry in values["added_tokens"]:
        kind = TokenType.CONTROL if entry["special"] else TokenType.USER_DEFINED
        kind = TokenType.UNKNOWN if entry["content"] == values["model"].get("unk_token") else kind
        vocabulary[entry["id"]] = (entry["content"], kind)
    if max(vocabulary) >= vocab_size:
        raise UnsupportedModelError(
            f"{folder}: the tokenizer has the id {max(vocabulary)}, and the embedding {vocab_size} rows"
        )
    filled = [vocabulary.get(number, (f"[PAD{number}]", TokenType.UNUSED)) for number in range(vocab_size)]
    return [token for token, _ in filled], [int(kind) for _, kind in filled]


def _named(tokenizer: Tokenizer) -> dict[str, int]:
    """The ids of tokens that mean something; beside the end of text up to two more ends are known to GGUF."""
    named = {
        "bos_token_id": tokenizer.bos_token,
        "eos_token_id": tokenizer.eos_token,
        "unknown_token_id": tokenizer.unk_token,
        "padding_token_id": tokenizer.pad_token,
    }
    ids = {key: tokenizer.backend.token_to_id(token) for key, token in named.items() if token is not None}
    found = {key: number for key, number in ids.items() if number is not None}
    ends = sorted(tokenizer.eos_ids - {found.get("eos_token_id")})
    keys = ["eot_token_id", "eom_token_id"] if "eos_token_id" in found else ["eos_token_id", "eot_token_id"]
    found |= dict(zip(keys, ends, strict=False))
    return {_KEY + key: number for key, number in found.items()}


def _around(tokenizer: Tokenizer, folder: Path) -> dict[str, bool]:
    """Whether texts begin and end with the tokens for that."""
    alone, whole = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
    at = next((at for at in range(len(whole)) if whole[at : at + len(alone)] == alone), 0)
    before, after = whole[:at], whole[at + len(alone) :]
    ids = {token: tokenizer.backend.token_to_id(token) for token in (tokenizer.bos_token, tokenizer.eos_token) if token}
    first, last = ids.get(tokenizer.bos_token or ""), ids.get(tokenizer.eos_token or "")
    if before not in ([], [first]) or after not in ([], [last]):
        logger.warning(
            "%s: the tokenizer puts %s before and %s after a text; GGUF can only say the begin- and end-of-text token",
            folder, before, after,
        )  # fmt: skip
    return {_KEY + "add_bos_token": before == [first], _KEY + "add_eos_token": after == [last]}


def _byte_level(values: Mapping[str, Any], folder: Path) -> list[dict[str, Any]]:
    model = values["model"]
    met = [name for name, pre in PRE_TOKENIZERS.items() if _cuts(pre) == _steps(values) and name != "default"]
    # A word that is a token is taken as it is: without saying so, where the merges lead there anyhow.
    exact = [name for name in met if PRE_TOKENIZERS[name].whole_words == model["ignore_merges"]]
    if not exact and met and _merges_reach_all(model):
        exact = met
    if not exact:
        raise UnsupportedModelError(
            f"{folder / 'tokenizer.json'} cuts words in a way that GGUF has no name for, or none that llmc knows "
            f"({', '.join(PRE_TOKENIZERS)})"
        )
    merges = [" ".join(pair) for pair in model["merges"]]
    return [{_KEY + "model": "gpt2", _KEY + "pre": name, _KEY + "merges": merges} for name in exact[:1]]


def _cuts(pre: PreTokenizer) -> list[Any]:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    pre.install(tokenizer)
    return _steps(json.loads(tokenizer.to_str()))


def _steps(values: Mapping[str, Any]) -> list[Any]:
    """What happens to a text before the merges, in order, without what changes no ids."""
    found = []
    for step in _flat(values["normalizer"], "normalizers") + _flat(values["pre_tokenizer"], "pretokenizers"):
        found.append({"use_regex": True, **step} if step["type"] == "ByteLevel" else dict(step))
        found[-1].pop("trim_offsets", None)
    return found


def _flat(step: Mapping[str, Any] | None, inside: str) -> list[Mapping[str, Any]]:
    if step is None:
        return []
    return [part for item in step[inside] for part in _flat(item, inside)] if step["type"] == "Sequence" else [step]


def _merges_reach_all(model: Mapping[str, Any]) -> bool:
    plain = models.BPE(model["vocab"], [tuple(pair) for pair in model["merges"]])
    return all(len(plain.tokenize(token)) == 1 for token in model["vocab"])


def _sentencepiece(
    values: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], folder: Path
) -> list[dict[str, Any]]:
    joined = list(dict.fromkeys(left + right for left, right in values["model"]["merges"]))
    rank = {piece: number for number, piece in enumerate(joined)}
    # Single characters are never the outcome of a merge; any score will do.
    scores = [-float(rank.get(token, len(rank) + number)) for number, token in enumerate(tokens)]
    pieces = {
        token: score for token, score, kind in zip(tokens, scores, types, strict=True) if kind == TokenType.NORMAL
    }
    again = gguf_tokenizer.merges_of(pieces)
    own = [(rank[left + right], left, right) for left, right in values["model"]["merges"]]
    # In the order of the pieces; which cut of one piece goes first is not asked.
    if sorted(own, key=lambda item: item[0]) != own or {pair[1:] for pair in own} != set(again):
        raise UnsupportedModelError(f"{folder / 'tokenizer.json'}: its merges do not follow from scores of its pieces")
    form = {_KEY + "model": "llama", _KEY + "pre": "default", _KEY + "scores": scores}
    return [{**form, _KEY + "add_space_prefix": has_space} for has_space in (True, False)]
