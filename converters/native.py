"""Hugging Face's format for transformers: a model that it has no class for, as the family that it has one for.

Qwen 1 is a Qwen2, ChatGLM2 and ChatGLM3 are a GLM-4, Baichuan-7B is a LLaMA, once their tensors are renamed and cut:
the canonical checkpoint is the same. Where no class computes the model (Baichuan-13B's positions, Baichuan2's head),
and where transformers has the authors' own, this is the authors' form (hf.py).

Knows: when one family can say another's model. Does not know: any family.
"""

from __future__ import annotations

from pathlib import Path

from llmc.checkpoint import Checkpoint
from llmc.converters import families, hf
from llmc.converters.reader import Reader
from llmc.converters.rules import Family, Progress
from llmc.errors import UnsupportedModelError
from llmc.log import logger
from llmc.manifest import Manifest
from llmc.spec import ModelSpec


def export(folder: Path, out: Path, *, overwrite: bool = False, progress: Progress | None = None) -> Manifest:
    """Write a checkpoint as a folder that transformers loads, the tensors unchanged but for their names.

    Raises:
        ManifestError: `folder` is not a checkpoint.
        UserError: It is quantized, or `out` exists.
    """
    found = hf.open_checkpoint(folder)
    family, spec = form(found)
    return hf.write(found, family, spec, out, overwrite=overwrite, progress=progress)


def form(found: Checkpoint) -> tuple[Family, ModelSpec]:
    """The family under whose names transformers loads a model, and the spec with its name; else the model's own."""
    own = families.by_name(found.spec.family)
    if not own.native:
        return own, found.spec
    native = families.by_name(own.native)
    spec = found.spec.model_copy(update={"family": native.name})
    if not _can_say(native, spec):
        logger.warning(f"transformers has no class for this {own.name}: written as its authors publish it")
        return own, found.spec
    return native, spec


def _can_say(family: Family, spec: ModelSpec) -> bool:
    """Whether a family's config holds all of a model."""
    try:
        return family.read(Reader(family.write(spec), family.name)) == spec
    except (UnsupportedModelError, ValueError):
        return False
