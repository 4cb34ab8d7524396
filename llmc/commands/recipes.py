"""What `llmc quantize`'s options say about the recipe. Not a command."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmc.errors import UserError

if TYPE_CHECKING:
    from llmc.recipe import QuantRecipe


def chosen(choices: Mapping[str, Any], checkpoint: Path) -> QuantRecipe:
    """The recipe.

    Args:
        choices: The values of the options.
        checkpoint: What it is for.

    Raises:
        UserError: They do not fit together.
    """
    from llmc.commands import formats
    from llmc.config import parse
    from llmc.quant.defaults import with_head
    from llmc.recipe import QuantRecipe

    values = {
        "algorithm": choices["algo"],
        **formats.fields(choices),
        "keep": choices["keep"],
        "kv_cache": _kv_cache(choices),
    }
    recipe = parse(QuantRecipe, values, where="quantize")
    return with_head(recipe, checkpoint, int(choices["head_bits"]))


def _kv_cache(choices: Mapping[str, Any]) -> dict[str, str] | None:
    more = {key: value for key in ("scale", "observer") if (value := choices[f"kv_{key}"])}
    if choices["kv_cache"] is None:
        if more:
            raise click.UsageError("--kv-scale and --kv-observer say how a KV cache is quantized: add --kv-cache int8")
        return None
    return {"kind": choices["kv_cache"], **more}


def _configured(context: click.Context, _: click.Parameter, path: Path | None) -> Path | None:
    """Take the options' defaults from a configuration of PaddleNLP: what is typed goes before it."""
    if path is None:
        return None
    from llmc.quant import paddlenlp

    found = paddlenlp.read(path)
    known = {parameter.name for parameter in context.command.params}
    if missing := [name for name in found.options if name not in known]:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in missing)
        raise UserError(f"{path} needs {names}, which this version of llmc does not have", param="config")
    for note in found.notes:
        click.echo(f"{path.name}: {note}", err=True)
    context.default_map = {**(context.default_map or {}), **found.options}
    return path


CONFIG = click.option(
    "--config",
    metavar="FILE",
    type=click.Path(path_type=Path),
    is_eager=True,
    expose_value=False,
    callback=_configured,
    help="A quantization configuration of PaddleNLP, JSON; options that are typed go before it.",
)
CALIBRATION = click.option(
    "--calib",
    "--calibration",
    "calibration",
    metavar="FILE",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Text, or JSON lines of a training format. Repeatable. [default: Python's own texts]",
)
