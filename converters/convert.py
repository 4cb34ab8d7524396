"""One door for every source format: what `llmc convert` calls."""

from __future__ import annotations

from pathlib import Path

from llmc.checkpoint import Checkpoint
from llmc.converters import hf
from llmc.converters.rules import Progress
from llmc.errors import UserError


def convert(
    source: Path, out: Path, *, dtype: str = "keep", overwrite: bool = False, progress: Progress | None = None
) -> Checkpoint:
    """Make a canonical checkpoint of a Hugging Face folder, a training run's folder, or a GGUF file.

    Raises:
        UserError: `source` is none of these, or `out` exists.
        LlmcError: See `llmc.converters.hf.convert` and `llmc.converters.gguf.convert`.
    """
    if not source.exists():
        raise UserError(f"{source} does not exist")
    if source.is_dir():
        return hf.convert(source, out, dtype=dtype, overwrite=overwrite, progress=progress)
    from llmc.converters import gguf, gguf_file

    with source.open("rb") as file:
        if file.read(4) != gguf_file.MAGIC:
            raise UserError(f"{source} is neither a folder nor a GGUF file")
    return gguf.convert(source, out, dtype=dtype, overwrite=overwrite, progress=progress)
