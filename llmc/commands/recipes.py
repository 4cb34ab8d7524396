"""What `llmc quantize`'s options say about the recipe. Not a command."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from llmc.config import parse
from llmc.recipe import QuantRecipe


def chosen(choices: Mapping[str, Any]) -> QuantRecipe:
    """The recipe.

    Args:
        choices: The values of the options.

    Raises:
        UserError: They do not fit together.
    """
    from llmc.quant.quantize import NONE

    weights = {"bits": int(choices["bits"]), "group_size": int(choices["group_size"])}
    weights["symmetric"] = not choices["asymmetric"]
    values = {
        "algorithm": choices["algo"],
        "weights": None if choices["algo"] == NONE else weights,
        "keep": choices["keep"],
        "overrides": {glob: {**weights, "bits": bits} for glob, bits in choices["override"]},
        "kv_cache": _kv_cache(choices),
        "options": dict(choices["option"]),
    }
    return parse(QuantRecipe, values, where="quantize")


def _kv_cache(choices: Mapping[str, Any]) -> dict[str, str] | None:
    more = {key: value for key in ("scale", "observer") if (value := choices[f"kv_{key}"])}
    if choices["kv_cache"] is None:
        if more:
            raise click.UsageError("--kv-scale and --kv-observer say how a KV cache is quantized: add --kv-cache int8")
        return None
    return {"kind": choices["kv_cache"], **more}
