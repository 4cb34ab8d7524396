"""Hugging Face's format for transformers: as the family that it has a class for, else as llmc's own class.

Qwen 1 is a Qwen2, ChatGLM2 and ChatGLM3 are a GLM-4, Baichuan-7B is a LLaMA, once their tensors are renamed and cut:
the canonical checkpoint is the same. Where no class computes the model (Baichuan-13B's positions, Baichuan2's head), it
is written for the class that llmc registers (llmc/modeling.py). Where transformers has the authors' own class, this is
the authors' form (hf.py).

Knows: when one family can say another's model. Does not know: any family.
"""

from __future__ import annotations

from pathlib import Path

from llmc.checkpoint import Checkpoint
from llmc.converters import families, hf, own
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


def form(found: Checkpoint, *, ours: bool = True) -> tuple[Family, ModelSpec]:
    """The family under whose names transformers loads a model, and the spec with its name.

    Args:
        ours: Where transformers has no class, write for llmc's own; else under the authors' names.

    Raises:
        UnsupportedModelError: Nobody has a class for it.
    """
    family = families.by_name(found.spec.family)
    if family.native == "":
        return family, found.spec
    if family.native is not None:
        native = families.by_name(family.native)
        spec = found.spec.model_copy(update={"family": native.name})
        if can_say(native, spec):
            return native, spec
    if not ours:
        logger.warning(f"transformers has no class for this {family.name}: written as its authors publish it")
        return family, found.spec
    if found.spec.score is not None:
        raise UnsupportedModelError(f"neither transformers nor llmc has a class for {family.name} with a scoring head")
    logger.warning(
        f"transformers has no class for this {family.name}: written for llmc's own, {own.ARCHITECTURE}; "
        "`import llmc.modeling` before AutoModelForCausalLM.from_pretrained"
    )
    return own.form(found.spec), found.spec


def can_say(family: Family, spec: ModelSpec) -> bool:
    """Whether a family's config holds all of a model."""
    try:
        return family.read(Reader(family.write(spec), family.name)) == spec
    except (UnsupportedModelError, ValueError):
        return False
