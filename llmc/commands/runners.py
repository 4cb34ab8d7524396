"""Runners for whatever a folder holds. Not a command."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def opened(kind: str, folder: Path, *, sequences: int = 1, longest: int | None = None) -> Any:
    """A runner (see llmc/runtime.py): an engine's, or a slow one in PyTorch for a checkpoint or a Hugging Face folder.

    Args:
        kind: "engine", "hf" or "checkpoint", as the folder's manifest or `llmc.commands.sides.locate` says.
        sequences: As many at a time.
        longest: Tokens of a sequence that PyTorch must have room for; a checkpoint can do without.
    """
    if kind == "engine":
        from llmc.serve.runners import open_runner

        return open_runner(folder, max_sequences=sequences)
    from llmc.need import need

    need("torch")
    from llmc.evaluate import reference

    opener: Any = reference.open_hugging_face if kind == "hf" else reference.open_reference
    return opener(folder, max_sequences=sequences, max_length=longest)


def spec_of(kind: str, folder: Path) -> Any:
    """The ModelSpec of an engine or a checkpoint."""
    from llmc.checkpoint import Checkpoint
    from llmc.engine import describe

    return describe(folder).spec if kind == "engine" else Checkpoint(folder).spec
