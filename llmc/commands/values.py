"""Kinds of values that options have. Not a command."""

from __future__ import annotations

import json
from pathlib import Path
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


def numbers(_: click.Context, option: click.Parameter, value: str) -> list[int]:
    """`1,4,16`"""
    try:
        found = [int(each) for each in value.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise click.BadParameter(f"'{value}' is not a list of numbers like 1,4,16", param=option)
    return found


def span(_: click.Context, option: click.Parameter, value: str) -> tuple[int, int]:
    """`128`, or `32-512`: the fewest and the most."""
    fewest, most = (value.split("-", 1) * 2)[:2]
    if not (fewest.isdecimal() and most.isdecimal() and 1 <= int(fewest) <= int(most)):
        raise click.BadParameter(f"'{value}' is neither a number nor a range like 32-512", param=option)
    return int(fewest), int(most)


class OutputFile(click.Path):
    """A file to be written when the work is done: that it can be is looked at before the work begins."""

    name = "FILE"

    def __init__(self) -> None:
        super().__init__(dir_okay=False, writable=True, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = super().convert(value, param, ctx)
        if not (folder := Path(value).parent).is_dir():
            self.fail(f"there is no folder '{folder}'", param, ctx)
        return path
