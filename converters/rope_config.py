"""Rotary embeddings as Hugging Face configs say them: `rope_theta` with `rope_scaling`, or `rope_parameters`.

Meanings and defaults are those of transformers 5.23 (modeling_rope_utils.py): what wins when both forms are there,
and how an attention factor follows from the rest. One row a scaling in the table below.

A spec's `max_positions` is what the scaling reaches: `dynamic` has the original context as `max_position_embeddings`
and goes on to `factor` times that; YaRN often leaves the original value there (as Qwen2.5's model card tells its
users to), so the larger of that and factor times original counts; the others have the reach in the config already.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from llmc.converters.reader import Reader
from llmc.errors import UnsupportedModelError
from llmc.spec import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    ModelSpec,
    Rope,
    Scaling,
    YarnScaling,
)

PLAIN = Rope()


def read_rope(reader: Reader, max_positions: int, base: Rope = PLAIN) -> tuple[Rope, int]:
    """The rotary embedding, and the positions that it reaches.

    Args:
        reader: The model's config.
        max_positions: Its `max_position_embeddings`.
        base: What holds where the config does not say. A family that turns whole heads may not say otherwise.

    Raises:
        UnsupportedModelError: A type or a setting of it that llmc does not know.
    """
    rope = _common(reader, base)
    old, new = reader.section("rope_scaling"), reader.section("rope_parameters")
    original = reader.integer("original_max_position_embeddings", 0)
    section = old or new
    if section is None:
        return rope, max_positions
    rope = _common(section, rope)
    kind = section.text("rope_type", section.text("type", "default"))
    section.text("type", "")
    if kind not in _READERS:
        raise UnsupportedModelError(
            f"{section.where}: the rotary type is {kind!r}; llmc supports {', '.join(_READERS)}"
        )
    scaling, reach = _READERS[kind](section, max_positions, original)
    section.done()
    return rope.model_copy(update={"scaling": scaling}), reach


def _common(reader: Reader, base: Rope) -> Rope:
    if base.fraction == 1:
        reader.only("partial_rotary_factor", 1.0, "the whole head is rotated")
    fraction = reader.number("partial_rotary_factor", base.fraction)
    return Rope(theta=reader.number("rope_theta", base.theta), fraction=fraction, interleaved=base.interleaved)


def _plain(_section: Reader, max_positions: int, _original: int) -> tuple[None, int]:
    return None, max_positions


def _linear(section: Reader, max_positions: int, _original: int) -> tuple[Scaling, int]:
    return LinearScaling(factor=section.number("factor")), max_positions


def _dynamic(section: Reader, max_positions: int, _original: int) -> tuple[Scaling, int]:
    factor = section.number("factor")
    return DynamicScaling(factor=factor, original_max_positions=max_positions), int(max_positions * factor)


def _original_context(section: Reader, max_positions: int, original: int) -> int:
    """The original context: beside the section (Phi-3's way), in it, or the whole."""
    inside = section.integer("original_max_position_embeddings", max_positions)
    return original or inside


def _yarn(section: Reader, max_positions: int, original: int) -> tuple[Scaling, int]:
    original = _original_context(section, max_positions, original)
    factor = section.number("factor", max_positions / original)
    attention_factor = section.optional_number("attention_factor")
    mscale, all_dim = section.number("mscale", 0), section.number("mscale_all_dim", 0)
    if attention_factor is None and mscale and all_dim:
        attention_factor = yarn_magnitude(factor, mscale) / yarn_magnitude(factor, all_dim)
    scaling = YarnScaling(
        factor=factor,
        original_max_positions=original,
        attention_factor=yarn_magnitude(factor) if attention_factor is None else attention_factor,
        beta_fast=section.number("beta_fast", 0) or 32.0,
        beta_slow=section.number("beta_slow", 0) or 1.0,
        truncate=section.flag("truncate", default=True),
    )
    return scaling, max(max_positions, int(original * factor))


def yarn_magnitude(factor: float, scale: float = 1.0) -> float:
    """YaRN's temperature as a factor of cosine and sine (Peng et al. 2023, section 3.4)."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _longrope(section: Reader, max_positions: int, original: int) -> tuple[Scaling, int]:
    original = _original_context(section, max_positions, original)
    factor = section.number("factor", max_positions / original)
    default = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    scaling = LongRopeScaling(
        original_max_positions=original,
        attention_factor=section.number("attention_factor", default),
        short_factor=section.numbers("short_factor"),
        long_factor=section.numbers("long_factor"),
    )
    return scaling, max_positions


def _llama3(section: Reader, max_positions: int, original: int) -> tuple[Scaling, int]:
    scaling = Llama3Scaling(
        factor=section.number("factor"),
        low_freq_factor=section.number("low_freq_factor"),
        high_freq_factor=section.number("high_freq_factor"),
        original_max_positions=_original_context(section, max_positions, original),
    )
    return scaling, max_positions


_READERS: dict[str, Callable[[Reader, int, int], tuple[Scaling | None, int]]] = {
    "default": _plain,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
}


def write_rope(spec: ModelSpec) -> dict[str, Any]:
    """The settings from which `read_rope` makes this spec's position and reach.

    In the older form, `rope_theta` and `rope_scaling`, which every version of transformers reads.
    """
    scaling = spec.rope.scaling
    settings: dict[str, Any] = {
        "max_position_embeddings": spec.max_positions,
        "rope_theta": spec.rope.theta,
        "rope_scaling": None,
    }
    if spec.rope.fraction != 1:
        settings["partial_rotary_factor"] = spec.rope.fraction
    if scaling is None:
        return settings
    values = scaling.model_dump(mode="json")
    section = {"rope_type": values.pop("kind"), **values}
    original = section.pop("original_max_positions", None)
    if isinstance(scaling, DynamicScaling):
        settings["max_position_embeddings"] = original
    elif original is not None:
        section["original_max_position_embeddings"] = original
    if isinstance(scaling, LongRopeScaling):
        # Without effect beside an explicit attention factor, but transformers asks for it in a warning.
        section["factor"] = spec.max_positions / scaling.original_max_positions
    return {**settings, "rope_scaling": section}
