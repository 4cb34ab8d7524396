"""From a configuration's text to token rows on disk: find, split, train or take a tokenizer, encode, store.

Done once a run; a resumed run finds it done.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from llmc import checkpoint
from llmc.errors import UserError
from llmc.tokenizer import Tokenizer
from llmc.trainers.config import Pretrain
from llmc.trainers.data import indexed, text, vocabulary
from llmc.trainers.data.text import TextFile

HELD_OUT = "held_out.txt"
_BATCH = 64  # documents encoded at a time, in parallel


@dataclass(frozen=True, slots=True)
class Corpus:
    """What a run learns from.

    Attributes:
        trained, held_out: Documents, disjoint.
        sha256: Of all of them.
    """

    trained: Sequence[TextFile]
    held_out: Sequence[TextFile]
    sha256: str


@dataclass(frozen=True, slots=True)
class Prepared:
    """Tokens and tokenizer, on disk.

    Attributes:
        folder: Holds the tokenizer's files and held_out.txt.
        train, held_out: Tokens of each part.
        end_of_text: Ends every document.
        vocab_size: Words of the tokenizer.
    """

    folder: Path
    train: indexed.Tokens
    held_out: indexed.Tokens
    end_of_text: int
    vocab_size: int


def find(config: Pretrain) -> Corpus:
    """Find and divide the text.

    Raises:
        UserError: A path or a file is not usable; see `llmc.trainers.data.text`.
    """
    files = text.find(config.data)
    trained, held_out = text.split(files, config.data.held_out_fraction, config.training.seed)
    return Corpus(trained, held_out, text.digest(files))


def prepare(config: Pretrain, corpus: Corpus, work: Path, say: Callable[[str], None]) -> Prepared:
    """Tokenizer and tokens of `corpus`, in `work/data`, made there unless an earlier process did.

    Raises:
        UserError: The tokenizer given has no end-of-text token, or the text makes less than one row.
    """
    folder = work / "data"
    if not folder.exists():
        partial = work / "data.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        _write(config, corpus, partial, say)
        partial.rename(folder)
    tokenizer = Tokenizer.load(folder)
    prepared = Prepared(
        folder,
        indexed.Tokens(folder / "train"),
        indexed.Tokens(folder / "held_out"),
        _end_of_text(tokenizer, folder),
        tokenizer.vocab_size,
    )
    if len(prepared.train) < config.sequence_length:
        raise UserError(
            f"the text makes {len(prepared.train)} tokens, less than one row of {config.sequence_length}: "
            "add text, or set training.sequence_length lower"
        )
    return prepared


def _write(config: Pretrain, corpus: Corpus, folder: Path, say: Callable[[str], None]) -> None:
    given = config.tokenizer.folder
    if given:
        if not checkpoint.copy_tokenizer(Path(given), folder):
            raise UserError(f"tokenizer.folder: {given} has no tokenizer.json")
    else:
        size = config.tokenizer.vocab_size or 0
        say(f"training a tokenizer of {size:,} words on {_megabytes(corpus.trained)}")
        made = vocabulary.train((file.read() for file in corpus.trained), size)
        vocabulary.save(made, folder, max_positions=config.model.max_positions)
    tokenizer = Tokenizer.load(folder)
    end = _end_of_text(tokenizer, folder)
    for name, files in (("train", corpus.trained), ("held_out", corpus.held_out)):
        count = indexed.write(folder / name, _encoded(tokenizer, files, end), vocab_size=tokenizer.vocab_size)
        say(f"{name}: {len(files):,} files, {_megabytes(files)}, {count:,} tokens")
    with (folder / HELD_OUT).open("w", encoding="utf-8", newline="") as out:
        out.writelines(file.read() + "\n" for file in corpus.held_out)


def _encoded(tokenizer: Tokenizer, files: Sequence[TextFile], end: int) -> Iterator[list[int]]:
    stream = iter(files)
    while batch := list(islice(stream, _BATCH)):
        encodings = tokenizer.backend.encode_batch([file.read() for file in batch], add_special_tokens=False)
        for encoding in encodings:
            yield [*encoding.ids, end]


def _end_of_text(tokenizer: Tokenizer, folder: Path) -> int:
    found = tokenizer.backend.token_to_id(tokenizer.eos_token) if tokenizer.eos_token else None
    if found is None:
        raise UserError(f"the tokenizer in {folder} has no eos_token, which has to end every document")
    return int(found)


def _megabytes(files: Sequence[TextFile]) -> str:
    return f"{sum(file.size for file in files) / 1e6:.1f} MB"
