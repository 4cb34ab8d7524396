"""Plain text files: which there are, what they say, and which of them are held out.

A file is a document. Empty files and exact copies of an earlier file are left out, so that no held-out text is also
trained on. Knows no tokens.
"""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmc.errors import UserError
from llmc.trainers.config import Data


@dataclass(frozen=True, slots=True)
class TextFile:
    """A file that can be read as UTF-8.

    Attributes:
        sha256: Of its bytes.
        size: Bytes.
    """

    path: Path
    sha256: str
    size: int

    def read(self) -> str:
        """Its text, line ends as they are."""
        return decode(self.path)


def decode(path: Path) -> str:
    """Read a UTF-8 file.

    Raises:
        UserError: Naming the file, when it cannot be read or is not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text (byte {error.start}: {error.reason}); "
            'exclude it, or set data.undecodable = "skip"'
        ) from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None


def find(data: Data) -> list[TextFile]:
    """Every document that the configuration names, in a stable order.

    Raises:
        UserError: A path leads to nothing, a file is not UTF-8 (unless such are skipped), or no text is left.
    """
    seen: set[str] = set()
    found = []
    for path in _paths(data):
        try:
            content = decode(path).encode("utf-8")
        except UserError:
            if data.undecodable == "skip":
                continue
            raise
        digest = hashlib.sha256(content).hexdigest()
        if content and digest not in seen:
            seen.add(digest)
            found.append(TextFile(path, digest, len(content)))
    if not found:
        raise UserError(f"there is no text in {', '.join(data.paths)}: every file is empty or not UTF-8")
    return found


def _paths(data: Data) -> Iterator[Path]:
    for entry in data.paths:
        path = Path(entry)
        if path.is_file():
            yield path
            continue
        root = path if path.is_dir() else Path()
        pattern = str(path / "**") if path.is_dir() else entry
        candidates = map(Path, glob.iglob(pattern, recursive=True))  # noqa: PTH207  any root, one call
        chosen = sorted(item for item in candidates if _wanted(item, root, data))
        if not chosen:
            kinds = f" with a suffix of {', '.join(data.suffixes)}" if data.suffixes else ""
            what = f"the folder {entry} has no file" if path.is_dir() else f"'{entry}' leads to no file"
            raise UserError(f"data.paths: {what}{kinds}")
        yield from chosen


def _wanted(path: Path, root: Path, data: Data) -> bool:
    if data.suffixes and path.suffix not in data.suffixes:
        return False
    parts = path.relative_to(root).parts if root in path.parents else path.parts
    if any(fnmatch.fnmatchcase(part, pattern) for part in parts for pattern in data.exclude):
        return False
    return path.is_file()


def split(files: Sequence[TextFile], fraction: float, seed: int) -> tuple[list[TextFile], list[TextFile]]:
    """Divide files into (trained, held out), both in the order given.

    The held-out ones are drawn at random and come to at least `fraction` of the bytes.

    Raises:
        UserError: There are too few files to hold one out.
    """
    if not fraction:
        return list(files), []
    if len(files) < 2:
        raise UserError(
            f"{files[0].path} is the only file, so none can be held out: add files, cut it up, "
            "or set data.held_out_fraction = 0"
        )
    drawn = sorted(files, key=lambda file: file.sha256)
    random.Random(seed).shuffle(drawn)  # noqa: S311  a draw that repeats, not a secret
    wanted = fraction * sum(file.size for file in files)
    held: set[str] = set()
    size = 0
    for file in drawn[:-1]:
        held.add(file.sha256)
        size += file.size
        if size >= wanted:
            break
    return [file for file in files if file.sha256 not in held], [file for file in files if file.sha256 in held]


def digest(files: Iterable[TextFile]) -> str:
    """One sha256 for all the text: of the files' own digests, one a line."""
    return hashlib.sha256("".join(f"{file.sha256}\n" for file in files).encode()).hexdigest()
