"""A PEFT adapter for a server: read under its base's names, kept beside the base and not merged into it.

What cannot be kept beside a base (DoRA, tensors that replace the base's, embeddings, the head, experts) is refused:
`llmc convert ADAPTER OUT --base BASE` merges it. Pickles are not read.

Knows: PEFT's files (converters/peft.py), and rules. Does not know: engines.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from llmc import json_file, tensors
from llmc.adapter import Adapter, Floats, is_adaptable
from llmc.converters import families, peft
from llmc.converters.rules import bind
from llmc.errors import CheckpointError, UnsupportedModelError, UserError
from llmc.spec import ModelSpec
from llmc.tensors import read_tensor

_MERGE = "merge it: llmc convert {adapter} OUT --base BASE"


def read(name: str, adapter: Path, spec: ModelSpec) -> Adapter:
    """Read an adapter for a model.

    Args:
        spec: Of the model that it is to stand beside.

    Raises:
        UserError: `adapter` is no adapter.
        UnsupportedModelError: It is of a kind that cannot stand beside a model.
        CheckpointError: A tensor of it has no place in this model, or does not fit it.
    """
    if not peft.is_adapter(adapter):
        raise UserError(f"{adapter} is not an adapter: it has no {peft.CONFIG}", param="lora")
    merge = _MERGE.format(adapter=adapter)
    settings = peft.read_settings(json_file.read(adapter / peft.CONFIG), adapter / peft.CONFIG)
    if settings.is_dora:
        raise UnsupportedModelError(f"{adapter} is a DoRA adapter, which cannot stand beside its base: {merge}")
    if not (adapter / peft.WEIGHTS).is_file():
        raise CheckpointError(f"{adapter} has no {peft.WEIGHTS}: save it as safetensors; a server reads no pickles")
    family = families.by_name(spec.family)
    found = peft.changes(settings, family, spec, tensors.read_header(adapter / peft.WEIGHTS), adapter)
    bound = {item.theirs: item for item in bind(family.rules, spec)}
    factors: dict[str, tuple[Floats, Floats]] = {}
    for target, change in found.items():
        ours = [part.removesuffix(".weight") for part in bound[target].ours] if target in bound else [target]
        if change.a is None or change.b is None or change.whole or not all(map(is_adaptable, ours)):
            raise UnsupportedModelError(f"{adapter} changes '{target}' in a way that cannot stand beside it: {merge}")
        a = read_tensor(change.a).astype(np.float32)
        b = read_tensor(change.b).astype(np.float32) * np.float32(change.scale)
        # What a rule does to a matrix it does to its outputs alone, so it does the same to b.
        shapes = [(shape[0], len(a)) for shape in bound[target].shapes]
        parts = bound[target].rule.op.split(b.T if change.is_turned else b, shapes, spec)
        factors |= {module: (a, np.ascontiguousarray(part.T)) for module, part in zip(ours, parts, strict=True)}
    if not factors:
        raise CheckpointError(f"{adapter} has no tensors")
    return Adapter(name, factors)
