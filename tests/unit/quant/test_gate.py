"""The gate: more bits for the parts that cost most, until it is met, or nothing at all."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmc import manifest as manifests
from llmc import names
from llmc.checkpoint import Checkpoint
from llmc.errors import GateError
from llmc.evaluate.quality import TextJudge, sensitivity
from llmc.model import load
from llmc.quant import gate
from llmc.quant.corpus import Calibration
from llmc.quant.gate import Probe
from llmc.quant.quantize import quantize
from llmc.recipe import QuantRecipe, WeightFormat
from llmc.runtime import Tokens

INT4 = WeightFormat(bits=4, group_size=32)
INT8 = WeightFormat(bits=8, group_size=32)
RTN = QuantRecipe(algorithm="rtn", weights=INT4)
PARTS = {"front": 0.1, "layers.0": 0.4, "layers.1": 0.2, "tail": 0.3}


@dataclass
class Fixed:
    """A verdict that was made up."""

    increase: float

    def figures(self) -> dict[str, Any]:
        return {"increase": self.increase}


def judge_of(increases: list[float]) -> Callable[..., Fixed]:
    def judge(original: Checkpoint, result: Checkpoint) -> Fixed:
        load(result)  # what is judged is whole
        return Fixed(increases.pop(0))

    return judge


def probe_of(calls: list[int]) -> Probe:
    def probe(original: Checkpoint, result: Checkpoint, windows: Sequence[Tokens]) -> Mapping[str, float]:
        load(result)
        calls.append(sum(map(len, windows)))
        return PARTS

    return probe


def test_more_bits_until_it_is_met(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    calls: list[int] = []
    judge, probe = judge_of([0.5, 0.3, 0.01]), probe_of(calls)
    figures = quantize(tiny_checkpoint("llama"), tmp_path / "q", RTN, judge=judge, probe=probe, max_increase=0.21)
    assert calls == [512]  # what costs most is looked for once, on a part of the calibration text
    found = Checkpoint(tmp_path / "q")
    assert found.recipe == figures.recipe
    assert found.recipe is not None
    # By the first measurement 0.42 of 1.0 nats may be left, by the second 0.7 of what is.
    assert found.recipe.overrides == {"head": INT8, "layers.0.*": INT8, "layers.1.*": INT8}
    assert found.manifest.notes["quality"] == {"increase": 0.01}
    assert found.manifest.notes["sensitivity"] == PARTS
    manifests.verify(found.folder, found.manifest)
    report = json.loads((tmp_path / "q" / "report.json").read_text(encoding="utf-8"))
    assert report["quality"] == {"increase": 0.01}
    assert report["sensitivity"] == PARTS
    assert report["bits_by_part"] == {"front": [4], "layers.0": [8], "layers.1": [8], "tail": [8]}
    assert report["seconds"] > 0
    assert report["peak_bytes"] > 10e6
    assert report["bytes_after"] == sum(info.nbytes for info in found.infos.values())
    assert (tmp_path / "q" / "report.png").read_bytes().startswith(b"\x89PNG")
    assert not {"report.json", "report.png"} & set(found.manifest.files)


def test_nothing_is_written_when_it_cannot_be_met(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    increases = [0.5] * 9
    with pytest.raises(GateError, match=r"rises by 50\.00%, 2\.00% is allowed, .*: nothing was written"):
        quantize(
            tiny_checkpoint("llama"),
            tmp_path / "q",
            RTN,
            judge=judge_of(increases),
            probe=probe_of([]),
            max_increase=0.02,
        )
    assert 2 <= 9 - len(increases) <= 5
    assert list(tmp_path.iterdir()) == []


def test_without_a_limit_it_only_reports(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    calls: list[int] = []
    figures = quantize(tiny_checkpoint("llama"), tmp_path / "q", RTN, judge=judge_of([9.0]), probe=probe_of(calls))
    assert (calls, figures.recipe) == ([], RTN)


def test_probes_are_spread_over_the_text() -> None:
    windows = [np.full(200, index) for index in range(11)]
    assert [(window[0], len(window)) for window in gate.probes(windows)] == [(0, 128), (2, 128), (4, 128), (6, 128)]
    assert [len(window) for window in gate.probes(windows[:1])] == [128]


@pytest.mark.parametrize("algo", ["gptq", "awq"])
def test_real_measurements_on_calibrated_weights(
    algo: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """A limit that 4 bits do not meet, met with more bits for some parts; twice the same."""
    judge = TextJudge("the quick brown fox jumps over the lazy dog. " * 40, "dogs", tokens=400)
    recipe = RTN.model_copy(update={"algorithm": algo})
    text = tmp_path / "text"
    text.write_text("a fox and a dog and there the user " * 60, encoding="utf-8")
    results = [
        quantize(
            tiny_checkpoint("llama-bias"),
            tmp_path / name,
            recipe,
            calibration=Calibration(path=text),
            judge=judge,
            probe=sensitivity,
            max_increase=0.004,
        )
        for name in ("one", "two")
    ]
    assert results[0].verdict is not None
    assert results[0].verdict.increase <= 0.004
    one, two = (manifests.read(tmp_path / name) for name in ("one", "two"))
    assert one == two
    assert one.notes["quality"]["increase"] == pytest.approx(results[0].verdict.increase, abs=1e-5)
    assert set(results[0].report()["worst"]) <= set(names.matrices(Checkpoint(tmp_path / "one").spec))
