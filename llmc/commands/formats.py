"""What `llmc quantize` is told of formats, as fields of a recipe: each algorithm has its own defaults."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

from llmc.errors import UserError

Command = TypeVar("Command", bound=Callable[..., Any])

# Those that have 8 bits, a scale for each row, and rounded activations of some kind.
_ROWS = {"w8a8": "int8", "smoothquant": "int8", "fp8": "fp8"}

# Of embedding and head beside them: no activation meets the one, and the other is worth its bits.
_OUTSIDE = {"bits": 8, "group_size": 32}


_OPTIONS = (
    click.option("--bits", type=click.Choice(["4", "8"]), help="Of a weight. [default: 4]"),
    click.option(
        "--group-size",
        type=click.Choice(["16", "32", "64", "128", "256"]),
        help="Consecutive weights of a row that share a scale. [default: 32]",
    ),
    click.option(
        "--activations",
        type=click.Choice(["none", "dynamic", "static", "fp8"]),
        help="Of inputs: a scale for each token, for all, or fp8. [default: w8a8, fp8 dynamic, smoothquant static]",
    ),
    click.option("--alpha", metavar="A", help="Of smoothquant: 0 to 1, or search, layer by layer. [default: search]"),
    click.option("--shift", is_flag=True, help="Of smoothquant: centre each channel first."),
    click.option("--smooth-pieces", metavar="K", type=int, help="Of smoothquant: K pieces of channels, each searched."),
    click.option("--per-tensor", is_flag=True, help="Of fp8: one scale for a matrix, not one for each row."),
    click.option(
        "--asymmetric/--symmetric",
        default=None,
        help="Groups with a zero point, or without. [default: with, in 4 bits]",
    ),
    click.option(
        "--head-bits", type=click.Choice(["4", "8"]), default="8", show_default=True, help="Of the head, at least."
    ),
)


def options(function: Command) -> Command:
    """Give a command the options whose values `fields` reads."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def fields(choices: Mapping[str, Any]) -> dict[str, Any]:
    """weights, outside, activations, overrides and options of a recipe.

    Raises:
        UserError: An option does not go with the algorithm.
    """
    from llmc.recipe import BLOCKS

    algorithm = choices["algo"]
    if algorithm in _ROWS:
        found = _rows(algorithm, choices)
    elif algorithm in BLOCKS:
        found = _blocks(algorithm, choices)
    else:
        weights: dict[str, Any] = {"bits": int(choices["bits"] or 4), "group_size": int(choices["group_size"] or 32)}
        asymmetric = choices["asymmetric"]
        weights["symmetric"] = weights["bits"] == 8 if asymmetric is None else not asymmetric
        found = {
            "weights": None if algorithm == "none" else weights,
            "overrides": {glob: {**weights, "bits": bits} for glob, bits in choices["override"]},
            "activations": _activations("int8", choices["activations"] or "none"),
        }
    smoothing = {
        "alpha": _number(choices["alpha"]),
        "pieces": choices["smooth_pieces"],
        "shift": choices["shift"] or None,
    }
    given = {name: value for name, value in smoothing.items() if value is not None}
    if given and algorithm != "smoothquant":
        raise UserError("--alpha, --shift and --smooth-pieces go with --algo smoothquant", param="algo")
    return {**found, "options": {**dict(choices["option"]), **given}}


def _rows(algorithm: str, choices: Mapping[str, Any]) -> dict[str, Any]:
    if choices["bits"] == "4" or choices["group_size"] or choices["asymmetric"] or choices["override"]:
        raise UserError(
            f"{algorithm} has 8 bits and a scale for each row; for fewer bits: --algo awq --activations dynamic",
            param="algo",
        )
    kind = _ROWS[algorithm]
    weights: dict[str, Any] = {"kind": "fp8" if kind == "fp8" else "int", "bits": 8, "group_size": 0}
    if kind == "fp8":
        weights["per_tensor"] = choices["per_tensor"]
    activations = choices["activations"] or ("static" if algorithm == "smoothquant" else "dynamic")
    return {"weights": weights, "outside": _OUTSIDE, "activations": _activations(kind, activations)}


def _blocks(algorithm: str, choices: Mapping[str, Any]) -> dict[str, Any]:
    from llmc.recipe import BLOCKS

    names = ("bits", "group_size", "asymmetric", "override", "activations")
    for name in names:
        if choices[name] not in (None, (), "none"):
            option = name.replace("_", "-")
            raise UserError(
                f"{algorithm} has bits and blocks of its own and rounds weights alone: leave --{option} out", param=name
            )
    blocks = BLOCKS[algorithm]
    return {"weights": {"kind": algorithm, "bits": blocks.bits, "group_size": blocks.size}, "outside": _OUTSIDE}


def _activations(kind: str, choice: str) -> dict[str, Any] | None:
    if choice == "none":
        return None
    return {"kind": "fp8" if choice == "fp8" else kind, "dynamic": choice != "static"}


def _number(text: str | None) -> float | str | None:
    try:
        return text if text is None else float(text)
    except ValueError:
        return text
