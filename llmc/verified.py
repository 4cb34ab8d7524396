"""`verified.json`: what `llmc verify --save` found of an artifact, beside its manifest and not in it.

A manifest's sha256 is the identity by which children name their parents, so nothing may be added to it later; and an
artifact stays what it is, however often it is compared. So this file is not among the manifest's files, and each entry
names the identity of the artifact that it was found of: an entry that speaks of another one means nothing.

Does not know: how anything is compared.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmc import manifest as manifests
from llmc.config import Strict, parse
from llmc.errors import ConfigError, ManifestError, UserError
from llmc.manifest import Parent

NAME = "verified.json"


class Entry(Strict):
    """One comparison.

    Attributes:
        artifact: sha256 of the manifest of the folder that this file lies in.
        against: What it was compared with; a source without a manifest by the sha256 of its config, a server by its
            address alone.
        figures: See `llmc.evaluate.parity.Parity.figures`.
    """

    artifact: str
    against: Parent
    figures: dict[str, Any]


class Verified(Strict):
    """The contents of `verified.json`: the last comparison with each other thing."""

    entries: tuple[Entry, ...] = ()


def read(folder: Path) -> list[Entry]:
    """What was found of the artifact in `folder`; entries of what lay there before are left out.

    Raises:
        ManifestError: The file cannot be understood.
    """
    path = folder / NAME
    if not path.is_file():
        return []
    try:
        entries = parse(Verified, path.read_bytes(), where=str(path)).entries
    except (OSError, ConfigError) as error:
        raise ManifestError(str(error)) from None
    identity = manifests.sha256_of(folder / manifests.NAME)
    return [entry for entry in entries if entry.artifact == identity]


def check_target(folder: Path) -> None:
    """Refuse a folder that `save` would refuse; for long work, which should not find out at its end.

    Raises:
        UserError: `folder` is not an artifact of llmc.
    """
    if not (folder / manifests.NAME).is_file():
        raise UserError(f"{folder} has no {manifests.NAME}: a result is kept beside what llmc has made only")


def save(folder: Path, against: Parent, figures: dict[str, Any]) -> None:
    """Note a comparison, in place of an earlier one with the same thing.

    Raises:
        UserError: `folder` is not an artifact of llmc.
    """
    check_target(folder)
    kept = [entry for entry in read(folder) if entry.against != against]
    entry = Entry(artifact=manifests.sha256_of(folder / manifests.NAME), against=against, figures=figures)
    work = folder / f".{NAME}.tmp"
    work.write_text(Verified(entries=(*kept, entry)).model_dump_json(indent=1) + "\n", encoding="utf-8")
    work.replace(folder / NAME)


def line(entry: Entry) -> str:
    """An entry for people."""
    figures, against = entry.figures, entry.against
    return (
        f"{'within' if figures['within'] else 'BEYOND'} {figures['tolerance']:g} of {against.kind} {against.name} "
        f"{against.sha256[:12]}".rstrip()
    )
