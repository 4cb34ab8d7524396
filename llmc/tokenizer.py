"""A model's tokenizer, from the files that travel with every artifact, with the `tokenizers` package alone.

Text to ids and back as transformers' fast tokenizers do it: the same library on the same tokenizer.json. Which ids
end a text comes from generation_config.json and from the tokenizer's own end-of-text token, together.

Does not know: chat templates beyond carrying their text (llmc/prompt.py renders them), nor streaming.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from llmc import json_file
from llmc.errors import CheckpointError

# Characters from which on a text takes long enough for other threads to notice.
LONG = 10_000


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """A tokenizer, ready to use.

    Attributes:
        backend: The tokenizer itself.
        chat_template: Jinja source, None when the model has none.
        eos_ids: Ids that end a generated text.
        special_ids: Ids that are control tokens, not text.
        bos_token, eos_token, unk_token, pad_token: Their texts, None where the model has none.
    """

    backend: tokenizers.Tokenizer
    chat_template: str | None = None
    eos_ids: frozenset[int] = frozenset()
    special_ids: frozenset[int] = frozenset()
    bos_token: str | None = None
    eos_token: str | None = None
    unk_token: str | None = None
    pad_token: str | None = None

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read the tokenizer of a checkpoint, an engine, or a Hugging Face folder.

        Raises:
            CheckpointError: There is no tokenizer.json, or one of the files is malformed; names it.
        """
        backend = _read_backend(folder / "tokenizer.json")
        # The older special_tokens_map.json repeats what tokenizer_config.json says, which therefore wins.
        config = {
            **json_file.read(folder / "special_tokens_map.json", required=False),
            **json_file.read(folder / "tokenizer_config.json", required=False),
        }
        path = folder / "tokenizer_config.json"
        tokens = {name: _token(config, name, path) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
        ends = _eos_ids(folder / "generation_config.json")
        if tokens["eos_token"] is not None and (own := backend.token_to_id(tokens["eos_token"])) is not None:
            ends |= {own}
        special = (number for number, token in backend.get_added_tokens_decoder().items() if token.special)
        return cls(backend, _chat_template(folder, config), ends, frozenset(special), **tokens)

    @property
    def vocab_size(self) -> int:
        """Tokens that it knows, added ones with them; a model's embedding may have more rows."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Text to ids.

        Args:
            add_special_tokens: Add what the tokenizer puts around a whole text, such as a begin-of-text token. False
                for text from a chat template, which has them already.
        """
        if len(text) < LONG:
            return list(self.backend.encode(text, add_special_tokens=add_special_tokens).ids)
        # Other than `encode`, this lets go of Python's lock, which a megabyte would hold for half a second.
        return list(self.backend.encode_batch([text], add_special_tokens=add_special_tokens)[0].ids)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Ids to text; ids that it does not know are passed over, half a character becomes U+FFFD."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise CheckpointError(f"{path.parent} has no {path.name}, so it cannot turn text into tokens")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:
        # The package raises plain Exception for whatever is wrong in the file.
        raise CheckpointError(f"{path} is not a tokenizer: {error}") from None
    # Settings of whoever saved it: they would cut a long prompt in silence, or fill up a short one.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _token(config: dict[str, Any], name: str, path: Path) -> str | None:
    """A token's text; older files have an object with its flags around it."""
    value = config.get(name)
    value = value.get("content") if isinstance(value, dict) else value
    if value is not None and not isinstance(value, str):
        raise CheckpointError(f"{path}: '{name}' is {value!r}, expected a string")
    return value


def _eos_ids(path: Path) -> frozenset[int]:
    value = json_file.read(path, required=False).get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(number, int) and not isinstance(number, bool) for number in ids):
        raise CheckpointError(f"{path}: 'eos_token_id' is {value!r}, expected a number or a list of them")
    return frozenset(ids)


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """The template: a file of its own, or a text in the configuration, or there one of several by name."""
    path = folder / "chat_template.jinja"
    try:
        if path.is_file():
            return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None
    found = config.get("chat_template")
    if isinstance(found, list):
        named = {item.get("name"): item.get("template") for item in found if isinstance(item, dict)}
        found = named.get("default")
    if found is not None and not isinstance(found, str):
        raise CheckpointError(
            f"{folder / 'tokenizer_config.json'}: 'chat_template' is neither a text nor a list of them"
        )
    return found
