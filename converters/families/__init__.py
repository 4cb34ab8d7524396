"""Model families, one file each: a file with a `FAMILY` in this folder is all that a new one needs."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from llmc.config import explain
from llmc.converters import own
from llmc.converters.reader import Reader
from llmc.converters.rules import Family
from llmc.errors import UnsupportedModelError
from llmc.spec import ModelSpec


@functools.cache
def load_all() -> dict[str, Family]:
    """Every family by its name."""
    modules = sorted(module.name for module in pkgutil.iter_modules(__path__))
    found: list[Family] = [importlib.import_module(f"{__name__}.{name}").FAMILY for name in modules]
    return {family.name: family for family in found}


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
    known = {architecture: family for family in fitting for architecture in family.architectures}
    names = met if isinstance(met, list) else []
    family = next((known[name] for name in names if name in known), None)
    if family is None and own.ARCHITECTURE not in names:
        raise UnsupportedModelError(
            f"{where}: 'architectures' is {met!r}, which llmc does not support; it supports {', '.join(known)}"
        )
    reader = Reader(config, str(where))
    try:
        if family is None:
            spec = own.read(reader)
            return own.form(spec), spec
        return family, family.read(reader)
    except ValidationError as error:
        raise UnsupportedModelError(f"{where}: {explain(error, ModelSpec)[0]}") from None
