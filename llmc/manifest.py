"""Artifact manifests: what a folder is, where it came from, and the sha256 of every file in it.

Every stage writes its folder through `creating`: into a temporary folder beside the target, sealed with a manifest,
then renamed. So a folder with a manifest is whole, and an interrupted command leaves nothing behind.

A manifest holds no time, host or path: the same inputs and settings give the same bytes. Its own sha256 is the
artifact's identity, by which children name their parents.

Does not know: what any kind of artifact contains.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

import llmc
from llmc.config import Strict, parse
from llmc.errors import ConfigError, ManifestError, UserError

NAME = "manifest.json"
SCHEMA = 1
Kind = Literal["run", "checkpoint", "engine", "export"]

# What makes a folder of each kind, for the error that says where one comes from.
MADE_BY = {
    "run": "llmc train",
    "checkpoint": "llmc convert or llmc quantize",
    "engine": "llmc build-engine",
    "export": "llmc export",
}


class FileEntry(Strict):
    """One file, by its path inside the folder."""

    sha256: str
    bytes: int


class Parent(Strict):
    """What an artifact was made from.

    Attributes:
        kind: A kind of artifact, or "hf", "gguf", "text": things that llmc reads and did not make.
        sha256: Of the parent's manifest; for a source without one, of the file, or of the folder's config.
        name: Last part of its path then: a memory aid, not an identity.
    """

    kind: str
    sha256: str
    name: str


class Manifest(Strict):
    """The contents of `manifest.json`."""

    schema_version: int = Field(alias="schema", default=SCHEMA)
    kind: Kind
    tools: dict[str, str]
    settings: dict[str, Any] = {}
    parents: tuple[Parent, ...] = ()
    notes: dict[str, Any] = {}
    files: dict[str, FileEntry] = {}

    def to_json(self) -> str:
        return self.model_dump_json(by_alias=True, indent=1) + "\n"


def tools(*packages: str) -> dict[str, str]:
    """Versions of llmc, Python and the named distributions, as recorded in a manifest."""
    from importlib.metadata import version

    found = {"llmc": llmc.__version__, "python": platform.python_version()}
    return found | {name: version(name) for name in packages}


def read(folder: Path, kind: Kind | None = None) -> Manifest:
    """Read and check a folder's manifest, but not the files' hashes (see `verify`).

    Raises:
        ManifestError: There is none, it is of another schema, it is malformed, or it is not of the `kind` asked for.
    """
    path = folder / NAME
    wanted = f"{_article(kind)}" if kind else "an llmc artifact"
    hint = f"make one with {MADE_BY[kind]}" if kind else "see `llmc --help`"
    if not folder.is_dir():
        raise ManifestError(f"{folder} is not a folder; expected {wanted} ({hint})")
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise ManifestError(f"{folder} has no {NAME}, so it is not {wanted}: {hint}") from None
    try:
        found = parse(Manifest, text, where=str(path))
    except ConfigError as error:
        raise _other_schema(text, path) or ManifestError(str(error)) from None
    if found.schema_version != SCHEMA:
        raise _other_schema(text, path) or ManifestError(f"{path}: unreadable schema")
    if kind and found.kind != kind:
        raise ManifestError(f"{folder} is {_article(found.kind)}, expected {wanted}: {hint}")
    return found


def _article(kind: str | None) -> str:
    return {"run": "a training run", "engine": "an engine", "export": "an export"}.get(kind or "", f"a {kind}")


def _other_schema(text: bytes, path: Path) -> ManifestError | None:
    """The error for a manifest of another schema, whose other fields need not be readable to us."""
    import json

    try:
        met = json.loads(text).get("schema")
    except (ValueError, AttributeError):
        return None
    if met == SCHEMA:
        return None
    return ManifestError(
        f"{path} has schema {met!r}, this llmc ({llmc.__version__}) reads schema {SCHEMA}: "
        "make the folder again with this version"
    )


def verify(folder: Path, manifest: Manifest) -> None:
    """Compare every listed file with its size and sha256, several at a time.

    Raises:
        ManifestError: Naming the first file that is missing or changed, and both values.
    """
    for name, entry in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise ManifestError(f"{folder} is incomplete: {name} is missing")
        if (size := path.stat().st_size) != entry.bytes:
            raise ManifestError(f"{path} was changed: {size} bytes, the manifest says {entry.bytes}")
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        hashes = pool.map(lambda name: sha256_of(folder / name), manifest.files)
        for (name, entry), met in zip(manifest.files.items(), hashes, strict=True):
            if met != entry.sha256:
                raise ManifestError(
                    f"{folder / name} was changed: its sha256 is {met}, the manifest says {entry.sha256}"
                )


def sha256_of(path: Path) -> str:
    """Hex digest of a file, read in pieces of 4 MiB."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(1 << 22))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def parent(folder: Path) -> Parent:
    """The entry by which a child names the artifact in `folder`."""
    kind = read(folder).kind
    return Parent(kind=kind, sha256=sha256_of(folder / NAME), name=folder.resolve().name)


def seal(folder: Path, manifest: Manifest, hashes: Mapping[str, str] | None = None) -> Manifest:
    """Hash every file in `folder` and write its manifest there; returns what was written.

    Args:
        hashes: sha256 of files that were hashed while they were written, by their paths inside `folder`.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != NAME)
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
    known = dict(hashes or {})
    unknown = [name for name in sizes if name not in known]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        known |= zip(unknown, pool.map(lambda name: sha256_of(folder / name), unknown), strict=True)
    files = {name: FileEntry(sha256=known[name], bytes=size) for name, size in sizes.items()}
    sealed = manifest.model_copy(update={"files": files})
    (folder / NAME).write_text(sealed.to_json(), encoding="utf-8")
    return sealed


def check_target(target: Path, *, overwrite: bool) -> None:
    """Refuse a folder that `creating` would refuse; for long work, which should not find out at its end.

    Raises:
        UserError: `target` exists and is not to be overwritten, or is something llmc did not make.
    """
    if target.exists() and any(target.iterdir() if target.is_dir() else [target]):
        if not overwrite:
            raise UserError(f"{target} exists already: choose another folder, or pass --overwrite")
        if not (target / NAME).is_file():
            raise UserError(f"{target} exists and was not made by llmc (it has no {NAME}): it will not be overwritten")


@contextlib.contextmanager
def creating(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty temporary folder that becomes `target` when the block ends well, and is removed otherwise.

    Args:
        overwrite: Replace an existing `target`; the old one stays until the new one is complete.

    Raises:
        UserError: `target` exists and is not to be overwritten, or is something llmc did not make.
    """
    check_target(target, overwrite=overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        work.chmod(0o777 & ~_umask())
        yield work
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
            target.rename(old / target.name)
            work.rename(target)
            shutil.rmtree(old)
        else:
            work.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def lineage(manifest: Manifest) -> Sequence[str]:
    """One line a parent, for printing."""
    return [f"{item.kind} {item.name} {item.sha256[:12]}" for item in manifest.parents]
