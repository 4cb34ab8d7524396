"""`llmc evaluate`: all kinds of models in one table."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from llmc import cli, manifest
from llmc.builders import ort
from llmc.evaluate import code_tasks
from llmc.quant.quantize import quantize
from llmc.recipe import QuantRecipe, WeightFormat
from llmc.serve.local import serving


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


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_all_kinds_say_the_same(
    family: str,
    tiny_source: Callable[[str], Path],
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
    text: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """transformers' model, the checkpoint, the engine and a server of the engine, in chunks and whole."""
    source, checkpoint, engine = tiny_source(family), tiny_checkpoint(family), tmp_path / "engine"
    ort.build(checkpoint, engine)
    figures = tmp_path / "figures.json"
    options = ("--text", text, "--window", 200, "--max-tokens", 250, "--json", figures)
    with serving(engine) as url:
        status, out, _ = run(capsys, source, checkpoint, engine, url, *options)
        assert status == 0
        rows = json.loads(figures.read_text(encoding="utf-8"))
        status, alone, _ = run(capsys, url, "--text", text, "--window", 100, "--max-tokens", 150)
        assert status == 0
    assert [row["kind"] for row in rows] == ["hf", "checkpoint", "engine", "server"]
    assert {row["tokens"] for row in rows} == {250 - 2}
    for row in rows[1:]:
        assert row["perplexity"] == pytest.approx(rows[0]["perplexity"], rel=1e-4)
        assert row["top1"] > 0.98
    assert [row["kl"] is None or row["kl"] < 1e-6 for row in rows] == [True] * 4
    assert [row["kl"] for row in rows][-1] is None
    assert url.rpartition(":")[2] in out
    assert "perplexity" in alone


TASK = {
    "task_id": "t/0",
    "prompt": "def f():\n    pass\n",
    "entry_point": "f",
    "test": "def check(candidate):\n    assert candidate() is None\n",
}


def test_tasks(
    tiny_source: Callable[[str], Path],
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
    text: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a random model writes is no Python, so it solves a task only where nothing that it writes counts."""
    engine, figures, path = tmp_path / "engine", tmp_path / "figures.json", tmp_path / "tasks.jsonl"
    ort.build(tiny_checkpoint("llama"), engine)
    ignoring = {**TASK, "task_id": "t/1", "prompt": TASK["prompt"] + "#"}
    monkeypatch.setattr(code_tasks, "MAX_TOKENS", 12)
    path.write_text("".join(json.dumps(task) + "\n" for task in (TASK, ignoring)), encoding="utf-8")
    with serving(engine) as url:
        models = (tiny_source("llama"), tiny_checkpoint("llama"), engine, url)
        status, out, _ = run(capsys, *models, "--tasks", path, "--text", text, "--max-tokens", 50, "--json", figures)
    assert status == 0
    assert "pass@1" in out
    rows = json.loads(figures.read_text(encoding="utf-8"))
    written = [[task["completion"] for task in row["tasks"]] for row in rows]
    assert all(each == written[0] for each in written)
    assert "".join(written[0])
    for row in rows:
        programs = [
            code_tasks.program(code_tasks.Task(**task), text)
            for task, text in zip((TASK, ignoring), written[0], strict=True)
        ]
        assert [task["passed"] for task in row["tasks"]] == [_is_python(each) for each in programs]
    assert any(not task["passed"] for task in rows[0]["tasks"])


def _is_python(program: str) -> bool:
    try:  # a line of a dozen random tokens
        exec(compile(program, "program.py", "exec"), {})
    except Exception:
        return False
    return True


def test_nothing_to_do(tiny_checkpoint: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, tiny_checkpoint("llama"))
    assert status == 2
    assert "give --text, --tasks or both" in err


def test_what_is_no_model(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, tmp_path / "none", "--text", text)
    assert status == 2
    assert "is none of these" in err
