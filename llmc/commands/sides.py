"""What `llmc verify` may compare, found by what the user names and opened. Not a command."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmc import manifest as manifests
from llmc.errors import UserError
from llmc.manifest import Parent


@contextmanager
def opened(*given: str) -> Iterator[list[Any]]:
    """The sides (see `llmc.evaluate.parity.Side`) that the user named, open for as long as the block runs.

    Raises:
        UserError: One is nothing that can be compared.
    """
    found = [(name, *locate(name)) for name in given]
    # Rotary frequencies that depend on the context's length are fixed when an engine is built.
    lengths = [_engine_length(folder) for _, kind, folder in found if kind == "engine"]
    sides: list[Any] = []
    try:
        for name, kind, folder in found:
            sides.append(_OPEN[kind](name, folder, min(lengths, default=None)))
        yield _with_words(sides)
    finally:
        for side in sides:
            side.close()


def locate(name: str) -> tuple[str, Path]:
    """The kind of what a user named, and the folder to open."""
    if name.startswith(("http://", "https://")):
        return "server", Path(name)
    folder = Path(name)
    if (folder / manifests.NAME).is_file():
        kind = manifests.read(folder).kind
        inside = {"run": folder / "model", "export": folder}
        return (_kind_of_source(inside[kind]), inside[kind]) if kind in inside else (kind, folder)
    if folder.is_file() or (folder / "config.json").is_file() or any(folder.glob("*.gguf")):
        return _kind_of_source(folder), folder
    raise UserError(
        f"{name} is none of these: a Hugging Face folder or another source that llmc convert reads, a checkpoint, an "
        "engine, the http:// address of a server"
    )


def _kind_of_source(path: Path) -> str:
    """ "hf" where transformers itself can compute, else "source"."""
    from llmc import json_file
    from llmc.converters import families, hf, paddle

    if not (path / hf.CONFIG).is_file() or not hf.has_weights(path) or paddle.is_folder(path):
        return "source"
    met = json_file.read(path / hf.CONFIG).get("architectures") or []
    of_others = {
        name for family in families.load_all().values() if family.native != "" for name in family.architectures
    }
    return "source" if of_others.intersection(map(str, met)) else "hf"


def identity(name: str) -> Parent:
    """How a result says what was compared with."""
    kind, folder = locate(name)
    if kind == "server":
        return Parent(kind=kind, sha256="", name=name)
    if (Path(name) / manifests.NAME).is_file():
        return manifests.parent(Path(name))
    config = folder / "config.json"
    said = folder if folder.is_file() else config if config.is_file() else sorted(folder.glob("*.gguf"))[0]
    return Parent(kind=kind, sha256=manifests.sha256_of(said), name=folder.resolve().name)


def _engine_length(folder: Path) -> int:
    from llmc.engine import describe

    return describe(folder).max_length


def _open_server(name: str, _folder: Path, _context: int | None) -> Any:
    from llmc.evaluate.remote import open_server

    return open_server(name)


def _open_hugging_face(name: str, folder: Path, _context: int | None) -> Any:
    from llmc.need import need

    need("torch")
    from llmc.evaluate.modules import open_hugging_face

    return open_hugging_face(folder, name=name, tokenizer=_tokenizer(folder))


def _open_checkpoint(name: str, folder: Path, context: int | None) -> Any:
    from llmc.need import need

    need("torch")
    from llmc.evaluate.modules import open_checkpoint

    return open_checkpoint(folder, context=context, name=name, tokenizer=_tokenizer(folder))


def _open_source(name: str, path: Path, context: int | None) -> Any:
    """What `llmc convert` makes of it, which is gone again once it is in memory."""
    from dataclasses import replace
    from tempfile import TemporaryDirectory

    from llmc.converters.convert import convert

    with TemporaryDirectory(prefix="llmc-verify-") as work:
        convert(path, Path(work) / "checkpoint")
        return replace(_open_checkpoint(name, Path(work) / "checkpoint", context), kind="source")


def _open_engine(name: str, folder: Path, _context: int | None) -> Any:
    from llmc.evaluate.parity import Reading, Side, read_with
    from llmc.serve.runners import open_runner

    runner = open_runner(folder, max_sequences=1)
    made: list[Callable[[Any], Any]] = []

    def read(tokens: Any, with_states: bool) -> Reading:
        if with_states and not made:
            made.append(_states_of(folder))
        return Reading(read_with(runner, tokens), made[0](tokens) if with_states else ())

    limits, tokenizer = runner.limits, _tokenizer(folder)
    return Side(
        name, "engine", runner.close, limits.vocab_size, limits.max_length, tokenizer, read=read, has_states=True
    )


def _states_of(folder: Path) -> Callable[[Any], Any]:
    from llmc.builders.onnx_layers import with_states
    from llmc.engine import describe
    from llmc.serve.runners.ort_states import open_states

    engine = describe(folder)  # whose bytes were compared when its runner was opened
    return open_states(folder, engine, *with_states(folder, engine.spec.num_layers, engine.compute))


_OPEN: dict[str, Callable[[str, Path, int | None], Any]] = {
    "server": _open_server,
    "hf": _open_hugging_face,
    "source": _open_source,
    "checkpoint": _open_checkpoint,
    "engine": _open_engine,
}


def _tokenizer(folder: Path) -> Any:
    from llmc.tokenizer import Tokenizer

    return Tokenizer.load(folder) if (folder / "tokenizer.json").is_file() else None


def _with_words(sides: list[Any]) -> list[Any]:
    """Let both write tokens as a server does, where a tokenizer says how."""
    from dataclasses import replace

    tokenizer = next((side.tokenizer for side in sides if side.tokenizer), None)
    if tokenizer is None or all(side.kind != "server" for side in sides):
        return sides
    from llmc.serve.stream import Vocabulary

    return [replace(side, word=Vocabulary(tokenizer).text) for side in sides]
