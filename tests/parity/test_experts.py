"""Mixtures of experts: every expert takes part in what the tables of parity compare, and which operator computes it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import tiny
import torch

from llmc.builders import ort as builder
from llmc.checkpoint import Checkpoint
from llmc.model import Mixture, load
from llmc.quant.quantize import quantize
from llmc.recipe import QuantRecipe, WeightFormat

SPARSE = [name for name, case in tiny.TINY.items() if any("experts" in key for key in case.config)]


@pytest.mark.parametrize("name", SPARSE)
@torch.inference_mode()
def test_every_expert_of_every_layer_is_chosen(name: str, tiny_checkpoint: Callable[[str], Path]) -> None:
    """By the tokens that test_reference.py and test_engine.py look at; and no token chooses all of them."""
    decoder = load(Checkpoint(tiny_checkpoint(name)))
    chosen: dict[str, set[tuple[int, ...]]] = {}

    def watch(module: str) -> Callable[..., None]:
        def hook(router: torch.nn.Module, _: Any, scores: torch.Tensor) -> None:
            chosen[module] = {tuple(row) for row in scores.topk(decoder.spec.moe.top_k).indices.tolist()}

        return hook

    mixtures = {at: module for at, module in decoder.named_modules() if isinstance(module, Mixture)}
    for at, mixture in mixtures.items():
        mixture.router.register_forward_hook(watch(at))
    decoder(torch.tensor([tiny.tokens(60)]))
    assert decoder.spec.moe is not None
    assert len(mixtures) == decoder.spec.num_layers - len(decoder.spec.moe.dense_layers)
    for at, choices in chosen.items():
        assert set().union(*choices) == set(range(decoder.spec.moe.num_experts)), at
        assert len(choices) > 1, at


def int_format(bits: Any, group_size: Any = 32) -> QuantRecipe:
    return QuantRecipe(algorithm="rtn", weights=WeightFormat(bits=bits, group_size=group_size))


@pytest.mark.parametrize(
    ("recipe", "arithmetic", "fused"),
    [
        (None, "float32", False),
        (int_format(4), "float32", True),
        (int_format(4), "int8", True),
        (int_format(8), "float32", False),
        (int_format(8), "int8", True),
        (int_format(4, 64), "int8", False),
        (QuantRecipe(algorithm="rtn", weights=int_format(4).weights, keep=("*.experts.2.up",)), "int8", False),
    ],
    ids=["float32", "int4", "int4 int8", "int8 float32", "int8", "padded", "kept"],
)
def test_one_operator_where_it_is_exact(
    recipe: QuantRecipe | None, arithmetic: Any, fused: bool, tmp_path: Path, tiny_checkpoint: Callable[[str], Path]
) -> None:
    source = tiny_checkpoint("mixtral")
    if recipe:
        quantize(source, tmp_path / "quantized", recipe)
        source = tmp_path / "quantized"
    builder.build(source, tmp_path / "engine", arithmetic=arithmetic)
    graph = onnx.load(tmp_path / "engine/model.onnx", load_external_data=False).graph
    met = Counter(node.op_type for node in graph.node)
    assert met["QMoE"] == (2 if fused else 0)
    assert met["TopK"] == (0 if fused else 2)
    # A router is never quantized: it has few weights, and another order of its scores is another expert.
    assert [node.op_type for node in graph.node if node.name.endswith("router")] == ["Gemm", "Gemm"]
