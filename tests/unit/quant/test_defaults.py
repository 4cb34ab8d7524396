"""llmc.quant.defaults: the head has 8 bits unless something is said of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmc.quant.defaults import with_head
from llmc.recipe import KVCacheFormat, QuantRecipe, WeightFormat

INT4, INT8 = WeightFormat(bits=4, group_size=64, symmetric=False), WeightFormat(bits=8, group_size=64)


@pytest.mark.parametrize(
    ("model", "said", "expected"),
    [
        ("llama", {}, {"head": INT8}),
        ("llama-tied", {}, {"embed": INT8}),
        ("llama", {"overrides": {"layers.0.*": INT8}}, {"layers.0.*": INT8, "head": INT8}),
        ("llama", {"overrides": {"he*": INT4}}, {"he*": INT4}),
        ("llama", {"keep": ("head",)}, {}),
        ("llama-tied", {"keep": ("embed",)}, {}),
        ("llama", {"weights": INT8}, {}),
    ],
)
def test_gives_the_head_eight_bits(
    model: str, said: dict[str, Any], expected: dict[str, Any], tiny_checkpoint: Callable[[str], Path]
) -> None:
    recipe = QuantRecipe(**{"algorithm": "rtn", "weights": INT4, **said})
    assert with_head(recipe, tiny_checkpoint(model), 8).overrides == expected
    assert with_head(recipe, tiny_checkpoint(model), 4) == recipe


def test_leaves_alone_what_has_no_weights(tiny_checkpoint: Callable[[str], Path]) -> None:
    recipe = QuantRecipe(algorithm="none", kv_cache=KVCacheFormat())
    assert with_head(recipe, tiny_checkpoint("llama"), 8) == recipe
