"""Model families, one file each: a file with a `FAMILY` in this folder is all that a new one needs."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from llmc.config import explain
from llmc.converters import own
from llmc.converters.reader import Reader
from llmc.converters.rules import Family, Rule
from llmc.errors import UnsupportedModelError
from llmc.spec import ModelSpec, Score

# Of a class in transformers: what its name ends with when it predicts tokens, and when it has a scoring head instead.
_HEADS, _SCORED = ("ForCausalLM", "LMHeadModel"), "ForSequenceClassification"
# Which is called the same in every family.
_SCORE = Rule("score.weight", "score.weight")


@functools.cache
def load_all() -> dict[str, Family]:
    """Every family by its name."""
    modules = sorted(module.name for module in pkgutil.iter_modules(__path__))
    found: list[Family] = [importlib.import_module(f"{__name__}.{name}").FAMILY for name in modules]
    return {family.name: replace(family, rules=(*family.rules, _SCORE)) for family in found}


def by_name(name: str) -> Family:
    """The family that a spec names.

    Raises:
        UnsupportedModelError: There is none, as after going back to an older llmc.
    """
    try:
        return load_all()[name]
    except KeyError:
        raise UnsupportedModelError(
            f"there is no model family '{name}' in this llmc; there are {', '.join(load_all())}"
        ) from None


def read_spec(config: Mapping[str, Any], where: object) -> tuple[Family, ModelSpec]:
    """Find the family of a Hugging Face config, or llmc's own form of one (own.py), and read it.

    Args:
        where: The config's path, for errors.

    Raises:
        UnsupportedModelError: No family has its architecture, or the family does not support one of its settings.
    """
    met = config.get("architectures") or []
    # Families with a sign last: they win where it is found.
    fitting = sorted(
        (family for family in load_all().values() if not family.sign or config.get(family.sign)),
        key=lambda family: family.sign,
    )
    plain = {architecture: family for family in fitting for architecture in family.architectures}
    known = plain | {_scored(family, name): family for name, family in plain.items()}
    names = met if isinstance(met, list) else []
    name = next((name for name in names if name in known), None)
    if name is None and own.ARCHITECTURE not in names:
        raise UnsupportedModelError(
            f"{where}: 'architectures' is {met!r}, which llmc does not support; it supports {', '.join(plain)}, and "
            f"what these are with a scoring head ({_SCORED})"
        )
    reader = Reader(config, str(where))
    try:
        if name is None:
            spec = own.read(reader)
            return own.form(spec), spec
        family, spec = known[name], known[name].read(reader)
        return family, _with_score(spec, Reader(config, str(where))) if name not in plain else spec
    except ValidationError as error:
        raise UnsupportedModelError(f"{where}: {explain(error, ModelSpec)[0]}") from None


def write_config(family: Family, spec: ModelSpec) -> dict[str, Any]:
    """A config from which `read_spec` makes this spec; see `Family.write`."""
    config = family.write(spec)
    if spec.score is None:
        return config
    labels = {str(label): f"LABEL_{label}" for label in range(spec.score.labels)}
    return config | {
        "architectures": [_scored(family, config["architectures"][0])],
        "id2label": labels,
        "label2id": {name: int(label) for label, name in labels.items()},
        "pad_token_id": spec.score.pad,
    }


def _scored(family: Family, architecture: str) -> str:
    """The class with a scoring head, of the one that predicts tokens; itself where there is none."""
    if family.scored:
        return family.scored
    stem = next((architecture.removesuffix(head) for head in _HEADS if architecture.endswith(head)), None)
    return architecture if stem is None else stem + _SCORED


def _with_score(spec: ModelSpec, reader: Reader) -> ModelSpec:
    """transformers counts the labels by their names, and takes two for granted (configuration_utils.py, num_labels)."""
    names = reader.section("id2label")
    labels = reader.integer("num_labels", 2) if names is None else len(names)
    pad = reader.integer("pad_token_id", -1)
    score = Score(labels=labels, pad=pad if pad >= 0 else None)
    return ModelSpec.model_validate(spec.model_dump() | {"tied": False, "score": score})
