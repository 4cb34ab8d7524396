"""How `llmc quantize` measures what it made. Not a command."""

from __future__ import annotations

import functools
from typing import Any

import click


def chosen(choices: dict[str, Any], progress: Any) -> Any:
    """What measures a result: on the user's text, on sample text where PyTorch is installed, else nothing.

    Args:
        choices: The values of `llmc quantize`'s options.
    """
    wanted = choices["text"] or choices["max_ppl_increase"] is not None
    if choices["no_evaluate"]:
        if wanted:
            raise click.UsageError("--no-evaluate contradicts --text and --max-ppl-increase")
        return None
    from llmc import sample_text, text
    from llmc.need import installed, need

    if not wanted and not installed("torch"):
        return None
    need("torch")
    from llmc.evaluate.quality import TextJudge

    content = text.read(choices["text"]) if choices["text"] else sample_text.read("held-out")
    source = str(choices["text"] or sample_text.describe("held-out"))
    return TextJudge(content, source, tokens=choices["text_tokens"], progress=progress)


def probe(choices: dict[str, Any], progress: Any) -> Any:
    """What measures each part's share of the cost, where an option chooses bits by it."""
    if choices["target_bits"] is None and choices["max_ppl_increase"] is None:
        return None
    from llmc.need import need

    need("torch")
    from llmc.evaluate.quality import sensitivity

    return functools.partial(sensitivity, progress=functools.partial(progress, "probing"))
