"""What each model family supports, from the families themselves."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from llmc.converters import export, families, gguf_settings, own
from llmc.converters.layouts import Grid, Linear
from llmc.converters.paddle_layouts import LAYOUTS
from llmc.converters.rules import Family
from llmc.errors import UnsupportedModelError


@dataclass(frozen=True, slots=True)
class Overview:
    """One family.

    Attributes:
        architectures: What `architectures` says in its configs.
        positions, norm: Kinds, as in llmc/spec.py.
        experts: Some of its models have mixtures of experts.
        hf: The classes of transformers for which its models are exported; llmc's own where there is none.
        paddle: PaddleNLP's class for it, None where llmc knows no layout.
        gguf: As which architecture llama.cpp has it, None if not at all.
        packed: The formats in which quantized checkpoints are exported.
    """

    name: str
    architectures: tuple[str, ...]
    positions: tuple[str, ...]
    norm: str
    experts: bool
    hf: tuple[str, ...]
    paddle: str | None
    gguf: str | None
    packed: tuple[str, ...]


def overview() -> list[Overview]:
    """Every family, by name."""
    return [of(name) for name in sorted(families.load_all())]


def of(name: str) -> Overview:
    """One family.

    Raises:
        UnsupportedModelError: There is none of this name.
    """
    family = families.by_name(name)
    ours = {part for rule in family.rules for part in rule.parts}
    try:
        gguf = gguf_settings.architecture_for(family.name)
    except UnsupportedModelError:
        gguf = None
    return Overview(
        name=family.name,
        architectures=family.architectures,
        positions=family.positions,
        norm="layer" if "layers.{layer}.attn_norm.bias" in ours else "rms",
        experts="layers.{layer}.moe.router.weight" in ours,
        hf=_classes(family),
        paddle=LAYOUTS[family.name].architectures[0] if family.name in LAYOUTS else None,
        gguf=gguf,
        packed=tuple(_packed(family)),
    )


def _classes(family: Family) -> tuple[str, ...]:
    """See converters/native.py."""
    if family.native is None:
        return (own.ARCHITECTURE,)
    native = families.by_name(family.native or family.name)
    is_enough = set(family.positions) <= set(native.positions)
    return (native.architectures[0],) if is_enough else (native.architectures[0], own.ARCHITECTURE)


def _packed(family: Family) -> list[str]:
    """The formats of packed weights that have a place for the family's linears."""
    turned = any(rule.op.rows for rule in family.rules)
    usual = Linear(128, 128, Grid(4, 128), turned)
    rows = {name: importlib.import_module(row.module) for name, row in export.FORMATS.items() if row.quantized}
    return [name for name, module in rows.items() if not all(layout.lacks(usual) for layout in module.LAYOUTS)]
