"""`llmc evaluate`: engines and checkpoints in one table."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from llmc import cli, manifest
from llmc.builders import ort
from llmc.quant.quantize import quantize
from llmc.recipe import QuantRecipe, WeightFormat


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(["evaluate", *map(str, arguments)])
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog and there the user. " * 20, encoding="utf-8")
    return path


def test_side_by_side(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, packed, engine = tiny_checkpoint("llama"), tmp_path / "q", tmp_path / "engine"
    quantize(source, packed, QuantRecipe(algorithm="rtn", weights=WeightFormat(bits=8, group_size=32)))
    ort.build(source, engine)
    figures = tmp_path / "figures.json"
    status, out, _ = run(
        capsys, source, packed, engine, "--text", text, "--window", 64, "--max-tokens", 200, "--json", figures
    )
    assert status == 0
    assert "perplexity" in out
    first, rounded, built = json.loads(figures.read_text(encoding="utf-8"))
    assert [row["kind"] for row in (first, rounded, built)] == ["checkpoint", "checkpoint", "engine"]
    assert {row["tokens"] for row in (first, rounded, built)} == {200 - 4}
    assert (first["kl"], first["top1"]) == (0.0, 1.0)
    assert built["perplexity"] == pytest.approx(first["perplexity"], rel=1e-4)
    assert built["kl"] < 1e-6
    assert rounded["perplexity"] == pytest.approx(first["perplexity"], rel=0.1)
    assert 1e-6 < rounded["kl"] < 0.1
    for row, folder in ((first, source), (rounded, packed), (built, engine)):
        listed = manifest.read(folder).files.values()
        unlisted = [folder / manifest.NAME, *folder.glob("report.*")]
        assert row["bytes"] == sum(entry.bytes for entry in listed) + sum(path.stat().st_size for path in unlisted)


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--window", "512"], 2, "choose a smaller --window"),
        (["--window", "2"], 2, "2 is not in the range"),
    ],
)
def test_mistakes(
    options: list[str],
    status: int,
    message: str,
    tiny_checkpoint: Callable[[str], Path],
    text: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    met, _, err = run(capsys, tiny_checkpoint("llama"), "--text", text, *options)
    assert met == status
    assert message in err
    assert "Traceback" not in err


def test_folder_that_does_not_run(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, tmp_path / "none", "--text", text)
    assert status == 4
    assert "is not a folder" in err
