"""Kinds of values that options have. Not a command."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import click


class Assignment(click.ParamType[tuple[str, Any]]):
    """NAME=VALUE, the value being JSON where it can be read so, else a string."""

    name = "NAME=VALUE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Any]:
        name, found, text = value.partition("=")
        if not found or not name:
            self.fail(f"'{value}' is not of the form NAME=VALUE", param, ctx)
        try:
            return name, json.loads(text)
        except ValueError:
            return name, text


def kv_cache(choices: Mapping[str, Any]) -> dict[str, str] | None:
    """A recipe's KV cache, from the options --kv-cache, --kv-scale and --kv-observer."""
    more = {key: value for key in ("scale", "observer") if (value := choices[f"kv_{key}"])}
    if choices["kv_cache"] is None:
        if more:
            raise click.UsageError("--kv-scale and --kv-observer say how a KV cache is quantized: add --kv-cache int8")
        return None
    return {"kind": choices["kv_cache"], **more}


class Percent(click.ParamType[float]):
    """`1.5%` or `1.5`, as a share: 0.015."""

    name = "PERCENT"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            share = float(value.removesuffix("%")) / 100
        except ValueError:
            self.fail(f"'{value}' is not a percentage", param, ctx)
        if not 0 <= share < float("inf"):
            self.fail(f"'{value}' is not zero or more", param, ctx)
        return share
