"""The tokenizer in a GGUF file's metadata, as the files of a Hugging Face tokenizer.

Three kinds exist for the families that llmc has: "gpt2", byte-level BPE with its merges, cut into words beforehand by
the expression that `tokenizer.ggml.pre` names; "llama", SentencePiece BPE, whose merges are found from the scores of
its tokens; and "t5", SentencePiece unigram, whose scores are log-probabilities. What a token is comes from its type in
the file:

    normal, byte        a piece of text                  user defined    added, found in text before all else
    control, unknown    added, special: not text         unused          nothing, at the end of the vocabulary

The expressions are those of the authors' own tokenizer.json. GGUF does not say whether an added token is special:
llama.cpp marks all that look like `<|...|>` as control, and so they are special here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from llmc.errors import CheckpointError, UnsupportedModelError
from llmc.log import logger

_KEY = "tokenizer.ggml."
_SPACE = "\u2581"  # SentencePiece's visible space
_UNIGRAM = "t5"

# Not GGUF's: text -> token that is written in its place before a text is cut.
WRITTEN = "llmc.written"

# A score that nothing is taken for: what is no text to SentencePiece.
_NEVER = -1e6

# Tokens that end a turn or a text, whatever else a file says of them. The file names one; chat models have several.
_ENDS = frozenset(
    ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|im_end|>", "<|endoftext|>", "<|end|>", "<end_of_turn>")
)


class TokenType(IntEnum):
    """`tokenizer.ggml.token_type` (llama.cpp, llama.h, llama_token_type)."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """How byte-level BPE cuts text into words.

    Attributes:
        pattern: Of a word; None is GPT-2's, which the tokenizers package has built in.
        digits: Every digit is a word, before all else.
        nfc: Text is brought into Unicode's normal form C first.
        whole_words: A word that is a token is taken as it is, whatever the merges say.
        add_bos: Texts begin with the begin-of-text token unless the file says otherwise.
    """

    pattern: str | None = None
    digits: bool = False
    nfc: bool = False
    whole_words: bool = False
    add_bos: bool = False

    def install(self, tokenizer: Tokenizer) -> None:
        """Let a tokenizer cut words so, and put its bytes together again."""
        if self.nfc:
            tokenizer.normalizer = normalizers.NFC()
        steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if self.digits else []
        if self.pattern is not None:
            steps.append(pre_tokenizers.Split(Regex(self.pattern), behavior="isolated"))
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=self.pattern is None))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
        tokenizer.decoder = decoders.ByteLevel()


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+|"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"

_GPT2 = PreTokenizer()
_LLAMA3 = PreTokenizer(_CONTRACTIONS + _WORD + r"\p{N}{1,3}|" + _TAIL, whole_words=True, add_bos=True)
_SMOLLM = PreTokenizer(digits=True)
_TEKKEN = PreTokenizer(
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    whole_words=True,
    add_bos=True,
)

# Neither a space nor one of these marks; as its authors nest the brackets, they count as marks, too.
_BLOOM = PreTokenizer(r" ?[^(\s|[.,!?…。，、।۔،])]+")  # noqa: RUF001 - its authors' own
# llama.cpp's "glm4" and "chatglm-bpe" cut as Llama 3 does, and know nothing of a begin-of-text token.
_GLM4 = PreTokenizer(_CONTRACTIONS + _WORD + r"\p{N}{1,3}|" + _TAIL)

PRE_TOKENIZERS = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "llama-bpe": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama3": _LLAMA3,
    "qwen2": PreTokenizer(_CONTRACTIONS + _WORD + r"\p{N}|" + _TAIL, nfc=True),
    "smollm": _SMOLLM,
    "starcoder": _SMOLLM,
    "tekken": _TEKKEN,
    "bloom": _BLOOM,
    "glm4": _GLM4,
    "chatglm-bpe": _GLM4,
}


def write(metadata: Mapping[str, Any], folder: Path, *, where: object) -> None:
    """Write tokenizer.json, tokenizer_config.json, generation_config.json and the chat template.

    Args:
        metadata: Of the GGUF file.
        where: The file, for errors.

    Raises:
        UnsupportedModelError: A kind of tokenizer, or a way of cutting words, that llmc does not know.
        CheckpointError: The vocabulary is missing or contradicts itself.
    """
    tokens, types = _vocabulary(metadata, where)
    named = {name: _token_of(metadata, key, tokens, where) for name, key in _NAMED.items()}
    build(metadata, where=where).save(str(folder / "tokenizer.json"))
    _write_companions(metadata, folder, tokens, types, named)


def build(metadata: Mapping[str, Any], *, where: object) -> Tokenizer:
    """The tokenizer itself; see `write`."""
    kind = metadata.get(_KEY + "model")
    if kind not in _BUILDERS:
        raise UnsupportedModelError(f"{where}: the tokenizer is {kind!r}; llmc supports {', '.join(_BUILDERS)}")
    tokens, types = _vocabulary(metadata, where)
    try:
        tokenizer, adds_bos = _BUILDERS[kind](metadata, tokens, types, where)
        added = [
            # One of letters alone, ChatGLM's "sop", is not one inside a word.
            AddedToken(
                token,
                special=token_type != TokenType.USER_DEFINED,
                normalized=False,
                single_word=token.isalpha() and token_type == TokenType.CONTROL,
            )
            for token, token_type in zip(tokens, types, strict=True)
            if token_type in (TokenType.CONTROL, TokenType.UNKNOWN)
            or (token_type == TokenType.USER_DEFINED and kind != _UNIGRAM)
        ]
        tokenizer.add_tokens(added)
    except (CheckpointError, UnsupportedModelError):
        raise
    except Exception as error:
        # The tokenizers package raises plain Exception, for merges of tokens that do not exist, say.
        raise CheckpointError(f"{where}: the tokenizer contradicts itself: {error}") from None
    first, last = (_token_of(metadata, key, tokens, where) for key in ("bos_token_id", "eos_token_id"))
    has_first = metadata.get(_KEY + "add_bos_token", adds_bos)
    has_last = metadata.get(_KEY + "add_eos_token", False)
    surround(tokenizer, [first] if has_first and first else [], [last] if has_last and last else [])
    return tokenizer


# Name in tokenizer_config.json -> key in the metadata.
_NAMED = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


def _vocabulary(metadata: Mapping[str, Any], where: object) -> tuple[list[str], list[int]]:
    """Tokens and their types, without unused ones at the end: they only fill up the embedding."""
    tokens = metadata.get(_KEY + "tokens")
    if not isinstance(tokens, list) or not tokens:
        raise CheckpointError(f"{where} has no {_KEY}tokens")
    types = metadata.get(_KEY + "token_type", [TokenType.NORMAL] * len(tokens))
    if not isinstance(types, list) or len(types) != len(tokens):
        raise CheckpointError(f"{where}: {_KEY}token_type does not have one type for each of {len(tokens)} tokens")
    count = len(tokens)
    while count and types[count - 1] == TokenType.UNUSED:
        count -= 1
    if len(set(tokens[:count])) != count:
        raise CheckpointError(f"{where}: {_KEY}tokens holds a token twice")
    return tokens[:count], types[:count]


def _token_of(metadata: Mapping[str, Any], key: str, tokens: Sequence[str], where: object) -> str | None:
    number = metadata.get(_KEY + key)
    if number is None:
        return None
    if not isinstance(number, int) or not 0 <= number < len(tokens):
        raise CheckpointError(f"{where}: {_KEY}{key} is {number!r}, and there are {len(tokens)} tokens")
    return tokens[number]


def _byte_level(
    metadata: Mapping[str, Any], tokens: Sequence[str], _types: Sequence[int], where: object
) -> tuple[Tokenizer, bool]:
    """GPT-2's kind. Returns the tokenizer, and whether texts begin with the begin-of-text token by default."""
    name = metadata.get(_KEY + "pre", "default")
    if name not in PRE_TOKENIZERS:
        raise UnsupportedModelError(
            f"{where}: {_KEY}pre is {name!r}; llmc knows {', '.join(PRE_TOKENIZERS)}. "
            "Take the model's Hugging Face folder, which has its own tokenizer"
        )
    if name == "default":
        logger.warning("%s does not say how its tokenizer cuts words; GPT-2's way is taken", where)
    pre = PRE_TOKENIZERS[name]
    merges = [_pair(merge, where) for merge in metadata.get(_KEY + "merges", [])]
    model = models.BPE(_numbered(tokens), merges, ignore_merges=pre.whole_words)
    tokenizer = Tokenizer(model)
    pre.install(tokenizer)
    return tokenizer, pre.add_bos


def _numbered(tokens: Sequence[str]) -> dict[str, int]:
    return {token: number for number, token in enumerate(tokens)}


def _pair(merge: str, where: object) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    if not left or not right or " " in right:
        raise CheckpointError(f"{where}: {_KEY}merges holds {merge!r}, which is not two tokens")
    return left, right


def _sentencepiece(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], where: object
) -> tuple[Tokenizer, bool]:
    """LLaMA 1 and 2's kind: unknown characters become bytes, spaces are visible, a space begins every text."""
    pieces = {
        token: score
        for token, score, token_type in zip(tokens, _scores(metadata, tokens, where), types, strict=False)
        if token_type in (TokenType.NORMAL, TokenType.UNUSED)
    }
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == TokenType.UNKNOWN), None)
    model = models.BPE(_numbered(tokens), merges_of(pieces), byte_fallback=True, fuse_unk=True, unk_token=unknown)
    return _with_visible_spaces(Tokenizer(model), metadata), True


def _unigram(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], where: object
) -> tuple[Tokenizer, bool]:
    """ChatGLM-6B's kind: the pieces that are likeliest together."""
    scores = _scores(metadata, tokens, where)
    best = max((score for score, kind in zip(scores, types, strict=False) if kind == TokenType.NORMAL), default=0.0)
    pieces = [
        (
            token,
            score if kind == TokenType.NORMAL else _bonus(token, best) if kind == TokenType.USER_DEFINED else _NEVER,
        )
        for token, score, kind in zip(tokens, scores, types, strict=False)
    ]
    unknown = next((number for number, kind in enumerate(types) if kind == TokenType.UNKNOWN), None)
    model = models.Unigram(pieces, unk_id=unknown, byte_fallback=TokenType.BYTE in types)
    return _with_visible_spaces(Tokenizer(model), metadata), False


def _bonus(token: str, best: float) -> float:
    """The score by which a user's own token is all but always taken (SentencePiece, unigram_model.cc)."""
    return len(token.encode()) * best - 0.1


def _scores(metadata: Mapping[str, Any], tokens: Sequence[str], where: object) -> list[float]:
    scores = metadata.get(_KEY + "scores")
    if not isinstance(scores, list) or len(scores) < len(tokens):
        raise CheckpointError(f"{where}: {_KEY}scores does not have one score for each of {len(tokens)} tokens")
    return scores


def _with_visible_spaces(tokenizer: Tokenizer, metadata: Mapping[str, Any]) -> Tokenizer:
    """Let a tokenizer treat text as SentencePiece does, before it is cut and when it is put together again."""
    written: Mapping[str, str] = metadata.get(WRITTEN, {})
    has_prefix, charsmap = metadata.get(_KEY + "add_space_prefix", True), metadata.get(_KEY + "precompiled_charsmap")
    before: list[Any] = [normalizers.Replace(plain, token) for plain, token in written.items()]
    if charsmap:
        precompiled = normalizers.Precompiled(bytes(charsmap))
        # The package takes a return before a line end for one character with it, and SentencePiece for one of its own.
        before += [normalizers.Replace("\r", precompiled.normalize_str("\r")), precompiled]
    if metadata.get(_KEY + "remove_extra_whitespaces"):
        before += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    before += [normalizers.Prepend(_SPACE)] * has_prefix
    visible = normalizers.Replace(" ", _SPACE)
    tokenizer.normalizer = normalizers.Sequence([*before, visible]) if before else visible
    steps: list[Any] = [decoders.Replace(token, plain) for plain, token in {" ": _SPACE, **written}.items()]
    steps += [decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if has_prefix else steps)
    return tokenizer


def merges_of(pieces: Mapping[str, float]) -> list[tuple[str, str]]:
    """The merges by which BPE makes SentencePiece's pieces, the best piece first.

    SentencePiece joins the two neighbours whose joint piece has the best score; so every cut of a piece into two
    pieces is a merge of its rank. Among cuts of the same piece the longer left part goes first.
    """
    found = []
    for piece, score in pieces.items():
        cuts = ((piece[:at], piece[at:]) for at in range(1, len(piece)))
        found += [(-score, -len(left), left, right) for left, right in cuts if left in pieces and right in pieces]
    # The sort is stable and the key stops before the texts: pieces of one score stay in the vocabulary's order.
    found.sort(key=lambda item: item[:2])
    return [(left, right) for _, _, left, right in found]


_BUILDERS = {"gpt2": _byte_level, "llama": _sentencepiece, _UNIGRAM: _unigram}


def surround(tokenizer: Tokenizer, before: Sequence[str], after: Sequence[str] = ()) -> None:
    """Let these tokens stand before and after every whole text."""
    if not before and not after:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
        return
    specials = {token: tokenizer.token_to_id(token) for token in (*before, *after)}
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*before, "$A:0", *after],
        pair=[*before, "$A:0", *after, *(f"{token}:1" for token in before), "$B:1", *(f"{token}:1" for token in after)],
        special_tokens=list(specials.items()),
    )


def _write_companions(
    metadata: Mapping[str, Any],
    folder: Path,
    tokens: Sequence[str],
    types: Sequence[int],
    named: Mapping[str, str | None],
) -> None:
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **named, "clean_up_tokenization_spaces": False}
    _write_json(folder / "tokenizer_config.json", config)
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    stated = [metadata.get(_KEY + key) for key in ("eos_token_id", "eot_token_id", "eom_token_id")]
    ends = [number for number in stated if isinstance(number, int) and 0 <= number < len(tokens)]
    ends += [
        number
        for number, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind == TokenType.CONTROL and token in _ENDS
    ]
    ids = {
        "bos_token_id": metadata.get(_KEY + "bos_token_id"),
        "eos_token_id": list(dict.fromkeys(ends)) or None,
        "pad_token_id": metadata.get(_KEY + "padding_token_id"),
    }
    _write_json(folder / "generation_config.json", {key: value for key, value in ids.items() if value is not None})


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
