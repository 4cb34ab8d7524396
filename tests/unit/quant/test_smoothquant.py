"""SmoothQuant, shift and PieceWiseSearch: they leave the function as it was, and find what their formulas say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from llmc import rounding
from llmc.checkpoint import Checkpoint
from llmc.model import load
from llmc.quant import inputs, piecewise, smoothquant
from llmc.quant.by_layer import ByLayer
from llmc.quant.inputs import ByInputs
from llmc.recipe import ActivationFormat, QuantRecipe, WeightFormat
from llmc.rounding import Rounding

ROWS = WeightFormat(bits=8, group_size=0)
ONE_OF_EACH = {case.model_type: name for name, case in tiny.TINY.items()}


class Unrounded(ByInputs):
    """Smooths, and rounds nothing."""

    kept: dict[str, dict[str, torch.Tensor]]

    def _rounded(self, part: Any, values: Any, treated: Any, leaders: Any, seen: Any) -> Iterator[tuple[str, Any]]:
        reaches = {matrix: self._reach(matrix, treated, leaders, seen) for matrix in leaders}
        for name, x in values.items():
            matrix = name.removesuffix(".weight")
            if matrix in part.formats and name.endswith(".weight"):
                entry = treated.get(matrix) or inputs._Treated(torch.zeros(x.shape[1]), torch.ones(x.shape[1]))
                self.kept[matrix] = self._inputs(matrix, x, entry, reaches)
            yield name, x.numpy()

    def head(self, matrix: str, weight: Any, states: Any, form: Any) -> Any:
        return weight.numpy()


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("name", ONE_OF_EACH.values())
@torch.inference_mode()
def test_the_function_stays_as_it_was(
    name: str, shift: bool, tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every family, with random scales, before anything is rounded."""
    monkeypatch.setattr(rounding, "rounded", lambda x, scale, form: x)
    checkpoint, generator = Checkpoint(tiny_checkpoint(name)), torch.Generator().manual_seed(0)
    recipe = QuantRecipe(
        algorithm="smoothquant", weights=ROWS, outside=WeightFormat(bits=8, group_size=32),
        activations=ActivationFormat(dynamic=False), options={"shift": shift},
    )  # fmt: skip
    recipe = smoothquant.complete(checkpoint, recipe)
    windows = [np.array(tiny.tokens(64, seed)) for seed in range(4)]
    scales: list[torch.Tensor] = []

    def choose(trial: inputs.Trial) -> torch.Tensor:
        scales.append(torch.exp2(4 * torch.rand(len(trial.reach), generator=generator) - 2))
        return scales[-1]

    method = Unrounded(checkpoint, recipe, windows, choose, centred=shift)
    method.kept = {}
    transform = ByLayer(checkpoint, recipe, windows, method)
    state = {each: torch.tensor(np.asarray(transform(each, checkpoint[each], None))) for each in checkpoint}
    decoder = load(checkpoint)
    expected = decoder(torch.tensor([tiny.tokens(60, 9)]))
    decoder.load_state_dict({each: value.float() for each, value in state.items()}, assign=True)
    kinds = {"scale": "input_scale", "shift": "input_shift", "multiply": "input_multiply", "bias": "input_bias"}
    for matrix, stored in method.kept.items():
        fields = {field: stored[kind] for field, kind in kinds.items() if kind in stored}
        decoder.round_inputs({matrix: Rounding(ActivationFormat(dynamic=False), 0, **fields)})
    met = decoder(torch.tensor([tiny.tokens(60, 9)]))
    print(name, shift, float((met - expected).abs().max() / expected.abs().max()), len(scales))
    assert float((met - expected).abs().max() / expected.abs().max()) < 1e-5
    assert len(scales) >= 4 * checkpoint.spec.num_layers
