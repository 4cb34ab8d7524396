"""A model as some project left it, opened but not read, and how it becomes a canonical checkpoint.

Every format that has a model's config and its authors' tensor names ends here; what differs is how the files are
found and read (hf.py, peft.py, zero.py, paddle.py).

Knows: rules, and what a checkpoint holds. Does not know: any file of a source.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmc import checkpoint
from llmc import manifest as manifests
from llmc.checkpoint import Checkpoint
from llmc.converters import cast, packed_import
from llmc.converters.packed_import import Packing
from llmc.converters.rules import Family, Progress, Tensors, bind, source_names, to_canonical
from llmc.manifest import Manifest, Parent
from llmc.recipe import QuantRecipe
from llmc.spec import ModelSpec
from llmc.tensors import TensorInfo


@dataclass(frozen=True, slots=True)
class Source:
    """A model under its authors' names.

    Attributes:
        where: For errors.
        tensors: The type they are wanted in (None: each in its own) -> the tensors, under the authors' names.
        copy: Puts the tokenizer, and what the authors said of the model (source/), into a checkpoint.
        packages: What read it, besides llmc itself.
        packed: Its tensors and how they are packed, where they are: `tensors` refuses them then.
    """

    where: Path
    family: Family
    spec: ModelSpec
    tensors: Callable[[np.dtype[Any] | None], Tensors]
    copy: Callable[[Path], None]
    parents: tuple[Parent, ...]
    packages: tuple[str, ...] = ()
    packed: tuple[Packing, Mapping[str, TensorInfo]] | None = None

    @property
    def head(self) -> str:
        """The authors' name of the head, which a tied model may hold as well."""
        return source_names(self.family.rules, self.spec.model_copy(update={"tied": False}))["head.weight"]

    @property
    def embedding(self) -> str:
        """The authors' name of the embedding."""
        return source_names(self.family.rules, self.spec)["embed.weight"]


def write(
    source: Source, out: Path, *, dtype: str = "keep", overwrite: bool = False, progress: Progress | None = None
) -> Checkpoint:
    """Make a canonical checkpoint, one tensor in memory at a time.

    Args:
        dtype: "keep" leaves each tensor in the type that it has; else "float32", "float16" or "bfloat16" for all.

    Raises:
        UserError: `out` exists, or `dtype` is not a type.
        CheckpointError: A tensor is missing, unknown, misshapen or damaged.
    """
    recipe, canonical = _canonical(source, cast.target_dtype(dtype))
    with manifests.creating(out, overwrite=overwrite) as work:
        load = canonical.watched("convert", progress)
        hashes = checkpoint.write(work, source.spec, canonical.infos, load, recipe=recipe)
        source.copy(work)
        manifest = Manifest(
            kind="checkpoint",
            tools=manifests.tools(*source.packages),
            settings={"dtype": dtype},
            parents=source.parents,
        )
        manifests.seal(work, manifest, hashes)
    return Checkpoint(out)


def _canonical(source: Source, dtype: np.dtype[Any] | None) -> tuple[QuantRecipe | None, Tensors]:
    """The source's tensors as a checkpoint's, and how they are quantized."""
    rules, spec = source.family.rules, source.spec
    dropped = source.family.dropped + ((source.head,) if spec.tied else ())
    if source.packed is None:
        return None, to_canonical(rules, spec, source.tensors(dtype), dropped=dropped, where=source.where)
    packing, infos = source.packed
    return packed_import.to_canonical(
        packing, bind(rules, spec), spec, infos, dtype=dtype, dropped=dropped, where=source.where
    )
