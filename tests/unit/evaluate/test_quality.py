"""llmc.evaluate.quality: walking side by side gives what whole models give."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny

from llmc.checkpoint import Checkpoint
from llmc.evaluate.agreement import Subject, compare
from llmc.evaluate.quality import Quality, TextJudge, quality, sensitivity
from llmc.evaluate.reference import open_reference
from llmc.names import parts
from llmc.quant.quantize import quantize
from llmc.recipe import QuantRecipe, WeightFormat


def windows() -> list[np.ndarray]:
    return [np.array(tiny.tokens(length, length)) for length in (40, 17, 60)]


def made(source: Path, target: Path, *keep: str) -> Checkpoint:
    quantize(source, target, QuantRecipe(algorithm="rtn", weights=WeightFormat(bits=4, group_size=32), keep=keep))
    return Checkpoint(target)


@pytest.mark.parametrize("name", ["llama-bias", "llama-tied", "qwen2-window"])
def test_is_what_whole_models_give(name: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    original = Checkpoint(tiny_checkpoint(name))
    result = made(original.folder, tmp_path / "q")
    found = quality(original, result, windows())
    subjects = [
        Subject(str(item.folder), "checkpoint", windows(), open_reference(item.folder)) for item in (original, result)
    ]
    first, second = compare(subjects)
    assert second.agreement is not None
    assert found.tokens == first.score.tokens == 114
    assert found.original == pytest.approx(first.score.perplexity, rel=1e-5)
    assert found.result == pytest.approx(second.score.perplexity, rel=1e-5)
    assert found.kl == pytest.approx(second.agreement.kl, rel=1e-3)
    assert found.top1 == pytest.approx(second.agreement.top1, abs=0.02)
    assert found.kl > 0.01
    assert found.increase == pytest.approx(second.score.perplexity / first.score.perplexity - 1, abs=1e-5)


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_sensitivity_is_that_of_the_part_alone(
    name: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """Each part's lane equals a checkpoint of which only this part was quantized."""
    original = Checkpoint(tiny_checkpoint(name))
    found = sensitivity(original, made(original.folder, tmp_path / "q"), windows()[:2])
    others = {
        "front": ["layers.*", "head"],
        "layers.0": ["embed", "layers.1.*", "head"],
        "layers.1": ["embed", "layers.0.*", "head"],
    }
    others["tail"] = ["embed", "layers.*"]
    if original.spec.tied:
        del others["tail"]
        others = {part: [glob for glob in keep if glob != "head"] for part, keep in others.items()}
    assert list(found) == list(others)
    assert set(found) <= set(parts(original.spec))
    for part, keep in others.items():
        alone = quality(original, made(original.folder, tmp_path / part, *keep), windows()[:2])
        assert found[part] == pytest.approx(alone.kl, rel=1e-4)
        assert alone.kl > 1e-4


def test_the_same_checkpoint_costs_nothing(tiny_checkpoint: Callable[[str], Path]) -> None:
    checkpoint = Checkpoint(tiny_checkpoint("llama"))
    found = quality(checkpoint, checkpoint, windows())
    assert (found.increase, found.top1) == (0, 1)
    assert set(sensitivity(checkpoint, checkpoint, windows()).values()) == {0.0}


def test_judge_reads_a_text(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    original = Checkpoint(tiny_checkpoint("llama"))
    result = made(original.folder, tmp_path / "q")
    calls: list[tuple[str, int, int]] = []
    judge = TextJudge(
        "the quick brown fox " * 60, "a fox", tokens=200, window=64, progress=lambda *call: calls.append(call)
    )
    found = judge(original, result)
    assert isinstance(found, Quality)
    assert (found.source, found.tokens) == ("a fox", 196)
    assert calls == [("judging", done, 3) for done in (1, 2, 3)]
