"""`--max-ppl-increase` where activations are rounded: it is met by keeping parts, or nothing is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmc import cli
from llmc.checkpoint import Checkpoint

RECIPES = {
    "w8a8": "--algo w8a8",
    "w8a8, static": "--algo w8a8 --activations static",
    "smoothquant": "--algo smoothquant --alpha 0.5",
    "fp8": "--algo fp8",
    "w4a8": "--algo rtn --group-size 32 --activations dynamic",
}


@pytest.fixture(autouse=True)
def increase_is_kl(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model of random weights perplexity may fall when it is quantized; its KL is measured, and never does."""
    monkeypatch.setattr("llmc.evaluate.quality.Quality.increase", property(lambda found: found.kl))


def quantized(capsys: pytest.CaptureFixture[str], source: Path, out: Path, *options: object) -> tuple[int, str]:
    # Short texts: Python's own take longer to read than all the rest.
    text, looks = out.parents[1] / "words.txt", {"static", "smoothquant"} & set(options)
    text.write_text("the quick brown fox jumps over the other user there 0123 [over] " * 40, encoding="utf-8")
    tokens = ["--text", text, "--text-tokens", 100, *(["--calib", text, "--calibration-tokens", 128] if looks else [])]
    with pytest.raises(SystemExit) as caught:
        cli.main([*map(str, ["quantize", source, out, *tokens, *options])])
    return int(caught.value.code or 0), capsys.readouterr().err


def report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("case", RECIPES)
def test_met_or_nothing(
    case: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    source, options = tiny_checkpoint("llama"), RECIPES[case].split()
    status, err = quantized(capsys, source, folder / "all", *options)
    assert status == 0, err
    everything = report(folder / "all")
    limit = everything["quality"]["kl"] / 2
    assert limit > 0
    status, err = quantized(capsys, source, folder / "some", *options, "--max-ppl-increase", f"{100 * limit}%")
    assert status == 0, err
    some, first, found = report(folder / "some"), Checkpoint(folder / "all").recipe, Checkpoint(folder / "some")
    assert 0 < some["quality"]["kl"] <= limit
    assert everything["bits_per_parameter"] < some["bits_per_parameter"] < 32
    assert first is not None
    assert found.recipe is not None
    assert (found.recipe.activations, found.recipe.weights) == (first.activations, first.weights)
    assert (found.recipe.keep, found.recipe.overrides) != (first.keep, first.overrides)

    status, err = quantized(capsys, source, folder / "none", *options, "--max-ppl-increase", "0.0000001%")
    assert status == 3
    assert "nothing was written" in err
    assert sorted(path.name for path in folder.iterdir()) == ["all", "some"]
