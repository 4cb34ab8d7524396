"""The gate: more bits for the parts that cost most, until it is met, or nothing at all."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from llmc import manifest as manifests
from llmc import names
from llmc.checkpoint import Checkpoint
from llmc.errors import GateError
from llmc.evaluate.quality import TextJudge
from llmc.model import load
from llmc.quant import gate
from llmc.quant.corpus import Calibration
from llmc.quant.quantize import quantize
from llmc.recipe import QuantRecipe, WeightFormat

INT4 = WeightFormat(bits=4, group_size=32)
INT8 = WeightFormat(bits=8, group_size=32)
RTN = QuantRecipe(algorithm="rtn", weights=INT4)
INSIDE = {"front": ["embed"], "layers.0": ["layers.0.a", "layers.0.b"], "layers.1": ["layers.1.a"], "tail": ["head"]}


@dataclass
class Fixed:
    """A verdict that was made up."""

    increase: float
    sensitivity: Mapping[str, float] = field(default_factory=dict)

    def figures(self) -> dict[str, Any]:
        return {"increase": self.increase}


def test_the_costliest_first_then_twice_as_many() -> None:
    sensitivity = {"front": 0.1, "layers.0": 0.4, "layers.1": 0.2, "tail": 0.3}
    raised, recipe = [], RTN
    for _ in range(3):
        recipe = gate.refine(recipe, INSIDE, sensitivity, Fixed(1.0), 0.01)
        raised.append([name for inside in INSIDE.values() for name in inside if recipe.format_of(name) == INT8])
    assert raised == [
        ["layers.0.a", "layers.0.b"],
        ["layers.0.a", "layers.0.b", "head"],
        ["embed", "layers.0.a", "layers.0.b", "layers.1.a", "head"],
    ]
    assert set(recipe.overrides) == {"layers.0.*", "head", "layers.1.*", "embed"}
    with pytest.raises(
        GateError, match=r"rises by 100\.00% with 8 bits everywhere, 1\.00% is allowed: nothing was written"
    ):
        gate.refine(recipe, INSIDE, sensitivity, Fixed(1.0), 0.01)


def test_what_the_user_chose_stays() -> None:
    own = WeightFormat(bits=8, group_size=16)
    recipe = RTN.model_copy(update={"keep": ("embed",), "overrides": {"layers.0.a": own}})
    sensitivity = {"front": 0.5, "layers.0": 0.4, "layers.1": 0.1, "tail": 0.1}
    found = gate.refine(recipe, INSIDE, sensitivity, Fixed(1.0), 0.01)
    assert [found.format_of(name) for name in ("embed", "layers.0.a", "layers.0.b", "layers.1.a")] == [
        None,
        own,
        INT8,
        INT4,
    ]


def test_parts_have_all_matrices(tiny_checkpoint: Callable[[str], Path]) -> None:
    spec = Checkpoint(tiny_checkpoint("llama")).spec
    found = gate.matrices_by_part(spec, names.matrices(spec))
    assert [name for inside in found.values() for name in inside] == names.matrices(spec)
    assert found["front"] == ["embed"]
    assert found["tail"] == ["head"]


def judge_of(increases: list[float], calls: list[bool]) -> Callable[..., Fixed]:
    def judge(original: Checkpoint, result: Checkpoint, sensitivity: bool) -> Fixed:
        load(result)  # what is judged is whole
        calls.append(sensitivity)
        parts = {"front": 0.1, "layers.0": 0.4, "layers.1": 0.2, "tail": 0.3}
        return Fixed(increases.pop(0), parts if sensitivity else {})

    return judge


def test_more_bits_until_it_is_met(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    calls: list[bool] = []
    figures = quantize(
        tiny_checkpoint("llama"), tmp_path / "q", RTN, judge=judge_of([0.5, 0.1, 0.01], calls), max_increase=0.02
    )
    assert calls == [True, False, False]  # what costs most is looked for once
    found = Checkpoint(tmp_path / "q")
    assert found.recipe == figures.recipe
    assert found.recipe is not None
    assert found.recipe.overrides == {"head": INT8, "layers.0.*": INT8}
    assert found.manifest.notes["quality"] == {"increase": 0.01}
    manifests.verify(found.folder, found.manifest)
    report = json.loads((tmp_path / "q" / "report.json").read_text(encoding="utf-8"))
    assert report["quality"] == {"increase": 0.01}
    assert report["seconds"] > 0
    assert report["peak_bytes"] > 10e6
    assert report["bytes_after"] == sum(info.nbytes for info in found.infos.values())
    assert (tmp_path / "q" / "report.png").read_bytes().startswith(b"\x89PNG")
    assert not {"report.json", "report.png"} & set(found.manifest.files)


def test_nothing_is_written_when_it_cannot_be_met(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    calls: list[bool] = []
    with pytest.raises(GateError, match="nothing was written"):
        quantize(tiny_checkpoint("llama"), tmp_path / "q", RTN, judge=judge_of([0.5] * 9, calls), max_increase=0.02)
    assert len(calls) == 4
    assert list(tmp_path.iterdir()) == []


def test_without_a_limit_it_only_reports(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    calls: list[bool] = []
    figures = quantize(tiny_checkpoint("llama"), tmp_path / "q", RTN, judge=judge_of([9.0], calls))
    assert calls == [False]
    assert figures.recipe == RTN


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
