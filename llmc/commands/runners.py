"""Runners for whatever a folder holds. Not a command."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def open_any(folder: Path, length: int | None = None) -> tuple[str, Any]:
    """The kind of a folder, and a runner of one sequence for it: an engine, or the reference decoder of a checkpoint.

    Args:
        length: Of the longest sequence that a checkpoint will see.
    """
    from llmc import manifest as manifests

    kind = manifests.read(folder).kind
    if kind == "engine":
        from llmc.serve.runners import open_runner

        return kind, open_runner(folder, max_sequences=1)
    from llmc.need import need

    need("torch")
    from llmc.evaluate.reference import open_reference

    return kind, open_reference(folder, max_sequences=1, max_length=length)


def spec_of(folder: Path) -> Any:
    """The ModelSpec of an engine or a checkpoint."""
    from llmc import manifest as manifests
    from llmc.checkpoint import Checkpoint
    from llmc.engine import describe

    return describe(folder).spec if manifests.read(folder).kind == "engine" else Checkpoint(folder).spec
