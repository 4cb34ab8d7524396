"""Every algorithm on one model of every family: it ends, and what it makes is near what it was made from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from llmc import model
from llmc.checkpoint import Checkpoint
from llmc.quant.algorithm import ALGORITHMS
from llmc.quant.algorithm import algorithm as module_of
from llmc.quant.corpus import Calibration
from llmc.quant.quantize import quantize
from llmc.recipe import BLOCKS, ActivationFormat, QuantRecipe, WeightFormat

GROUPS, ROWS = WeightFormat(bits=8, group_size=32), WeightFormat(bits=8, group_size=0)
FP8 = WeightFormat(kind="fp8", bits=8, group_size=0)
FORMATS: dict[str, dict[str, Any]] = {
    "w8a8": {"weights": ROWS, "outside": GROUPS, "activations": ActivationFormat()},
    "smoothquant": {"weights": ROWS, "outside": GROUPS, "activations": ActivationFormat(), "options": {"steps": 2}},
    "fp8": {"weights": FP8, "outside": GROUPS, "activations": ActivationFormat(kind="fp8")},
    **{
        kind: {"weights": WeightFormat(kind=kind, bits=each.bits, group_size=each.size), "outside": GROUPS}  # type: ignore[arg-type]
        for kind, each in BLOCKS.items()
    },
}
# Three bits of mantissa are off by 1/16 of every value, one by 1/4, and change what a router chooses now and then.
ALLOWED = {"fp8": 0.5, "mxfp8": 0.5, "nvfp4": 0.85, "mxfp4": 0.85}
ONE_OF_EACH = {case.model_type: name for name, case in tiny.TINY.items()}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("name", ONE_OF_EACH.values())
def test_the_result_is_near(
    name: str,
    algorithm: str,
    tmp_path: Path,
    tiny_checkpoint: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("llmc.quant.algorithm.has_cuda", lambda: True)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog and there the other user was " * 20, encoding="utf-8")
    recipe = QuantRecipe(algorithm=algorithm, **FORMATS.get(algorithm, {"weights": GROUPS}))
    calibration = Calibration(path=text, tokens=512) if module_of(algorithm).CALIBRATES else None
    quantize(tiny_checkpoint(name), tmp_path / "out", recipe, calibration=calibration)
    tokens = torch.tensor([tiny.tokens(30)])
    with torch.no_grad():
        expected = model.load(Checkpoint(tiny_checkpoint(name)))(tokens)
        got = model.load(Checkpoint(tmp_path / "out"))(tokens)
    # A code of 8 bits is off by 1/254 of its group's largest weight at most; a wrongly folded scale by half and more.
    assert 0 < (got - expected).norm() < ALLOWED.get(algorithm, 0.15) * expected.norm()
