"""GGUF files (llama.cpp) into a canonical checkpoint: settings, tensors and tokenizer.

The metadata is put into the words of a Hugging Face config, so that the family's own reader decides what is
supported. Quantized tensors are dequantized to float32, a block of rows at a time; F32, F16 and BF16 stay as they are
unless another type is asked for. The experts of a layer, which lie in one tensor, are read one by one.

Does not know: the container (gguf_file.py), its types of numbers (gguf_tensors.py), its names and keys
(gguf_names.py, gguf_settings.py), the tokenizer (gguf_tokenizer.py), the families.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from llmc import checkpoint
from llmc import manifest as manifests
from llmc.checkpoint import Checkpoint
from llmc.converters import (
    cast,
    families,
    gguf_file,
    gguf_names,
    gguf_settings,
    gguf_tensors,
    gguf_tokenizer,
)
from llmc.converters.rules import Progress, Tensors, to_canonical
from llmc.errors import UnsupportedModelError
from llmc.manifest import Manifest, Parent
from llmc.tensors import Array


def convert(
    source: Path, out: Path, *, dtype: str = "keep", overwrite: bool = False, progress: Progress | None = None
) -> Checkpoint:
    """Make a canonical checkpoint of a GGUF file.

    Args:
        dtype: "keep" gives float32 for what is quantized and leaves the rest; or the type of all tensors.

    Raises:
        UserError: `out` exists, or `dtype` is not a type.
        UnsupportedModelError: The architecture, a setting, a ggml type or the tokenizer is not supported.
        CheckpointError: The file is damaged, or a tensor is missing, unknown or misshapen.
        MissingDependencyError: The gguf package is not installed.
    """
    target = cast.target_dtype(dtype)
    manifests.check_target(out, overwrite=overwrite)
    file = gguf_file.read(source)
    if (count := file.metadata.get("split.count", 1)) > 1:
        raise UnsupportedModelError(
            f"{source} is one of {count} parts: join them first (llama-gguf-split --merge FIRST_PART OUT.gguf)"
        )
    architecture = gguf_settings.architecture_of(file.metadata, source)
    file = gguf_tensors.unstacked(file)
    # The factors of the rotation among the tensors are settings, and not to be rounded.
    as_they_are = gguf_tensors.open_tensors(file, None)
    config = gguf_settings.read_config(file.metadata, as_they_are, source)
    spec = families.read_spec(config, source)[1]
    stored = gguf_tensors.open_tensors(file, target)
    if spec.norm.plus_one:
        stored = _less_one(stored, as_they_are)
    rules = gguf_names.rules(architecture, fused_qkv=gguf_names.FUSED_QKV in stored.infos)
    canonical = to_canonical(rules, spec, stored, dropped=(gguf_names.ROPE_FACTORS,), where=source)
    with manifests.creating(out, overwrite=overwrite) as work:
        gguf_tokenizer.write(file.metadata, work, where=source)
        checkpoint.write(work, spec, canonical.infos, canonical.watched("convert", progress))
        parent = Parent(kind="gguf", sha256=manifests.sha256_of(source), name=source.name)
        tools, settings = manifests.tools("gguf"), {"dtype": dtype}
        manifests.seal(work, Manifest(kind="checkpoint", tools=tools, settings=settings, parents=(parent,)))
    return Checkpoint(out)


def _less_one(stored: Tensors, as_they_are: Tensors) -> Tensors:
    """The norms as their authors have them; the one is taken away before a weight is rounded to another type."""

    def load(name: str) -> Array:
        if not gguf_names.is_norm(name):
            return stored.load(name)
        weight: Array = as_they_are.load(name) - np.float32(1)
        return weight.astype(stored.infos[name].dtype)

    return Tensors(stored.infos, load)
