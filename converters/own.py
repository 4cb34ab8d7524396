"""llmc's own class in transformers (llmc/modeling.py): a config with the spec, and canonical names under `decoder.`.

Knows: that form, both ways. Does not know: transformers, nor any family; a spec says which one it came from.
"""

from __future__ import annotations

import json
from typing import Any

from llmc import names
from llmc.converters.reader import Reader
from llmc.converters.rules import Family, Rule
from llmc.spec import ModelSpec

ARCHITECTURE, MODEL_TYPE = "LlmcForCausalLM", "llmc"
PREFIX = "decoder."


def form(spec: ModelSpec) -> Family:
    """The family of one model: whichever it came from, in this form."""
    untied = spec.model_copy(update={"tied": False})  # a rule for the head does no harm where there is none
    rules = tuple(Rule(name, PREFIX + name) for name in names.tensors(untied))
    return Family(spec.family, (ARCHITECTURE,), read, write, rules)


def read(reader: Reader) -> ModelSpec:
    """The spec that a config holds.

    Raises:
        UnsupportedModelError: It holds none.
        pydantic.ValidationError: It is not one that this llmc knows.
    """
    return ModelSpec.model_validate_json(json.dumps(reader.mapping("spec")))


def write(spec: ModelSpec) -> dict[str, Any]:
    """A config that holds a spec."""
    return {"architectures": [ARCHITECTURE], "model_type": MODEL_TYPE, "spec": spec.model_dump(mode="json")}
