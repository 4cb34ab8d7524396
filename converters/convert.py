"""One door for every source format: what `llmc convert` calls."""

from __future__ import annotations

from pathlib import Path

from llmc.checkpoint import Checkpoint
from llmc.converters import hf, paddle, peft, zero
from llmc.converters.rules import Progress
from llmc.errors import UserError


def convert(
    source: Path,
    out: Path,
    *,
    base: Path | None = None,
    dtype: str = "keep",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Checkpoint:
    """Make a canonical checkpoint of a Hugging Face or PaddleNLP folder, a training run's, a PEFT adapter, a ZeRO
    checkpoint or a GGUF file.

    Args:
        base: What an adapter was trained on; for nothing else.

    Raises:
        UserError: `source` is none of these, or `out` exists, or a base was given or left out wrongly.
        LlmcError: See the `convert` of each module in llmc.converters.
    """
    if not source.exists():
        raise UserError(f"{source} does not exist")
    if peft.is_adapter(source):
        return peft.convert(source, out, base=base, dtype=dtype, overwrite=overwrite, progress=progress)
    if base is not None:
        raise UserError(f"{source} is not an adapter (it has no {peft.CONFIG}), so it has no --base", param="base")
    if source.is_dir() and paddle.is_folder(source):
        return paddle.convert(source, out, dtype=dtype, overwrite=overwrite, progress=progress)
    if source.is_dir() and zero.is_checkpoint(source) and not hf.has_weights(source):
        return zero.convert(source, out, dtype=dtype, overwrite=overwrite, progress=progress)
    source = _gguf_inside(source)
    if source.is_dir():
        return hf.convert(source, out, dtype=dtype, overwrite=overwrite, progress=progress)
    from llmc.converters import gguf, gguf_file

    with source.open("rb") as file:
        if file.read(4) != gguf_file.MAGIC:
            raise UserError(f"{source} is neither a folder nor a GGUF file")
    return gguf.convert(source, out, dtype=dtype, overwrite=overwrite, progress=progress)


def _gguf_inside(source: Path) -> Path:
    """The one GGUF file of a folder that holds no other model; else `source` itself."""
    if not source.is_dir() or (source / hf.CONFIG).exists() or (source / "model").is_dir():
        return source
    files = sorted(source.glob("*.gguf"))
    if len(files) > 1:
        raise UserError(f"{source} holds {len(files)} GGUF files: name one of them ({files[0].name}, ...)")
    return files[0] if files else source
