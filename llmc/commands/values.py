"""Kinds of values that options have. Not a command."""

from __future__ import annotations

import json
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
