"""What a recipe gets where the user said nothing.

Knows: models and recipes. Does not know: why somebody quantizes.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

from llmc.checkpoint import Checkpoint
from llmc.recipe import QuantRecipe


def with_head(recipe: QuantRecipe, folder: Path, bits: int) -> QuantRecipe:
    """Give the head `bits` without zero points, unless it has more or the recipe says something of it already.

    Every token's logits go through the head, and nothing behind it can make up for what it loses: rounded to 4 bits it
    costs as much as some layers do together (docs/quantization.md). A tied head is the embedding.

    Args:
        folder: Of the checkpoint.

    Raises:
        ArtifactError: It is none.
    """
    head = "embed" if Checkpoint(folder).spec.tied else "head"
    told = any(fnmatchcase(head, glob) for glob in (*recipe.keep, *recipe.overrides))
    if recipe.weights is None or (recipe.outside or recipe.weights).bits >= bits or told:
        return recipe
    form = recipe.weights.model_copy(update={"bits": bits, "symmetric": True})
    return recipe.model_copy(update={"overrides": {**recipe.overrides, head: form}})
