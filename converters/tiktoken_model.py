"""tiktoken's files (`qwen.tiktoken`, Llama 3's and GLM-4's `tokenizer.model`) as byte-level BPE with merges.

A file is a line for each token: its bytes in base64, and its rank. How text is cut into words beforehand, and which
tokens follow the ranked ones, stands in the authors' code; here in the table below. tiktoken joins the two neighbours
whose joint bytes have the lowest rank, and takes a word that is a token as it is; so every cut of a token into two
tokens is a merge of its rank.
"""

from __future__ import annotations

import base64
import binascii
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from llmc.converters.gguf_tokenizer import PRE_TOKENIZERS, PreTokenizer
from llmc.errors import CheckpointError, UnsupportedModelError

_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\s*")


@dataclass(frozen=True, slots=True)
class Kind:
    """What a model's tokenizer has beside the ranks.

    Attributes:
        pre: How text is cut.
        special: Tokens after the ranked ones, in order.
        before: Stands before every text.
        eos: Ends a text.
    """

    pre: PreTokenizer
    special: tuple[str, ...]
    before: tuple[str, ...] = ()
    eos: str = "<|endoftext|>"


def _reserved(first: int, last: int) -> tuple[str, ...]:
    return tuple(f"<|reserved_special_token_{number}|>" for number in range(first, last))


# `model_type` of the config -> what its authors' code says (tokenization_qwen.py, llama3/tokenizer.py,
# tokenization_chatglm.py of GLM-4).
KINDS = {
    "qwen": Kind(
        PRE_TOKENIZERS["qwen2"],
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{number}|>" for number in range(205))),
    ),
    "llama": Kind(
        PRE_TOKENIZERS["llama-bpe"],
        (
            *("<|begin_of_text|>", "<|end_of_text|>", *_reserved(0, 4), "<|start_header_id|>", "<|end_header_id|>"),
            *(*_reserved(4, 5), "<|eot_id|>", *_reserved(5, 251)),
        ),
        before=("<|begin_of_text|>",),
        eos="<|end_of_text|>",
    ),
    "chatglm": Kind(
        PRE_TOKENIZERS["glm4"],
        (
            *("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"),
            *("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
            *("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"),
        ),
        before=("[gMASK]", "<sop>"),
    ),
}


def is_tiktoken(path: Path) -> bool:
    """Whether a file looks like one of tiktoken's, as `tokenizer.model` may."""
    with path.open("rb") as file:
        return _LINE.fullmatch(file.readline(4096)) is not None


def kind_of(config: Mapping[str, Any], path: Path) -> Kind:
    """The row of the table for a model.

    Raises:
        UnsupportedModelError: There is none.
    """
    name = config.get("model_type")
    if name not in KINDS:
        raise UnsupportedModelError(
            f"{path} is a tiktoken file of a model of type {name!r}, and does not say how text is cut: llmc knows "
            f"{', '.join(KINDS)}. Load the tokenizer with transformers, save it, and convert that folder"
        )
    return KINDS[name]


def read(path: Path) -> list[bytes]:
    """The tokens by rank.

    Raises:
        CheckpointError: The file is damaged: a line is not one, or ranks or tokens are missing or there twice.
    """
    found: dict[int, bytes] = {}
    try:
        for line in path.read_bytes().splitlines():
            if line.strip():
                token, rank = line.split()
                found[int(rank)] = base64.b64decode(token, validate=True)
    except (OSError, ValueError, binascii.Error) as error:
        raise CheckpointError(f"{path} is not a tiktoken file: {error}") from None
    tokens = [found.get(rank, b"") for rank in range(len(found))]
    if not all(tokens) or len(set(tokens)) != len(tokens) or len(found) < 256:
        raise CheckpointError(f"{path} is damaged: its ranks are not those of 0 to {len(found) - 1}, each a new token")
    if missing := [byte for byte in range(256) if bytes([byte]) not in set(tokens)]:
        raise CheckpointError(f"{path} is damaged: the byte {missing[0]} is no token")
    return tokens


def build(ranked: Sequence[bytes], kind: Kind, added: Mapping[int, tuple[str, bool]], path: Path) -> Tokenizer:
    """The tokenizer, without what stands before a text.

    Args:
        ranked: From `read`.
        added: The folder's own word on tokens after the ranked ones, by id: (text, whether it is special). It wins
            over the table.

    Raises:
        CheckpointError: An added token's id lies among the ranked ones, or leaves a gap.
    """
    letters = _letters()
    texts = ["".join(letters[byte] for byte in token) for token in ranked]
    rank = {token: number for number, token in enumerate(ranked)}
    merges = []
    for token in ranked:
        cuts = [(rank.get(token[:at]), rank.get(token[at:])) for at in range(1, len(token))]
        # Among cuts of one token the longer left part goes first, as for SentencePiece (gguf_tokenizer.merges_of).
        merges += [
            (texts[left], texts[right]) for left, right in reversed(cuts) if left is not None and right is not None
        ]
    vocabulary = {text: number for number, text in enumerate(texts)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    kind.pre.install(tokenizer)
    special = dict(enumerate(((text, True) for text in kind.special), start=len(ranked)))
    if added:
        special = {number: token for number, token in added.items() if number >= len(ranked)}
    for number, (text, is_special) in sorted(special.items()):
        if number != tokenizer.get_vocab_size():
            raise CheckpointError(f"{path}: the added token {text!r} has the id {number}, which does not fit")
        tokenizer.add_tokens([AddedToken(text, special=is_special, normalized=False)])
    return tokenizer


def _letters() -> list[str]:
    """The letter that stands for each byte in byte-level BPE (GPT-2's): itself where it can be seen."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    letters = [chr(byte if byte in seen else next(others)) for byte in range(256)]
    if set(letters) != set(pre_tokenizers.ByteLevel.alphabet()):
        raise RuntimeError("the tokenizers package has another alphabet of bytes")
    return letters


def original(ranked: Sequence[bytes], kind: Kind, special: Mapping[str, int]) -> Callable[[str], list[int]] | None:
    """tiktoken's own way from text to ids, None where the package is not installed.

    Returns:
        A function of a text.
    """
    try:
        import tiktoken
    except ImportError:
        return None
    ranks = {token: rank for rank, token in enumerate(ranked)}
    pattern = kind.pre.pattern or ""
    encoding = tiktoken.Encoding("check", pat_str=pattern, mergeable_ranks=ranks, special_tokens=dict(special))

    def encode(text: str) -> list[int]:
        normal = unicodedata.normalize("NFC", text) if kind.pre.nfc else text
        return list(encoding.encode(normal, allowed_special="all"))

    return encode
