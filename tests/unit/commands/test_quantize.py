"""`llmc quantize`: what it prints, and that a mistake is one line."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from llmc import cli
from llmc.checkpoint import Checkpoint
from llmc.recipe import KVCacheFormat, WeightFormat


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(["quantize", *map(str, arguments)])
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def test_default_is_int4(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tiny_checkpoint("llama")
    capsys.readouterr()  # transformers' own words, when the model was made just now
    status, out, err = run(capsys, source, tmp_path / "q")
    assert (status, err) == (0, "")
    recipe = Checkpoint(tmp_path / "q").recipe
    assert recipe is not None
    assert recipe.weights == WeightFormat(bits=4, group_size=32, symmetric=False)
    assert "15 in 4 bits, groups of 32 with zero points, 1 in 8 bits, groups of 32; kept 0" in " ".join(out.split())
    assert recipe.overrides == {"head": WeightFormat(bits=8, group_size=32)}
    assert "on average" in out
    assert f"next: llmc build-engine {tmp_path / 'q'}" in out


def test_every_option(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox " * 30, encoding="utf-8")
    options = "--algo rtn --bits 8 --group-size 64 --asymmetric --keep embed --keep *.down --kv-cache int8"
    status, out, _ = run(
        capsys, tiny_checkpoint("llama"), tmp_path / "q", *options.split(), "--calibration", text, "--overwrite"
    )
    assert status == 0
    recipe = Checkpoint(tmp_path / "q").recipe
    assert recipe is not None
    assert recipe.weights == WeightFormat(bits=8, group_size=64, symmetric=False)
    assert recipe.keep == ("embed", "*.down")
    assert recipe.kv_cache == KVCacheFormat()
    assert "kept 3" in out
    assert re.search(r"KV cache +int8", out)
    assert re.search(r"perplexity +[0-9.]+ -> [0-9.]+ \([+-]", out)


def test_a_gate_that_cannot_be_met_is_exit_3(
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("llmc.evaluate.quality.Quality.increase", property(lambda _: 0.5))
    status, out, err = run(
        capsys, tiny_checkpoint("llama"), tmp_path / "q", "--text-tokens", 100, "--max-ppl-increase", "1.5%"
    )
    assert (status, out) == (3, "")
    assert "perplexity rises by 50.00% with 8 bits everywhere, 1.50% is allowed: nothing was written" in err
    assert list(tmp_path.iterdir()) == []


def test_options_reach_the_recipe(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = "--algo gptq --option act_order=false --option damping=0.05 --override head=8 --no-evaluate"
    status, out, _ = run(capsys, tiny_checkpoint("llama"), tmp_path / "q", *options.split())
    assert status == 0
    recipe = Checkpoint(tmp_path / "q").recipe
    assert recipe is not None
    assert recipe.options == {"act_order": False, "damping": 0.05, "search": True}
    assert recipe.overrides == {"head": WeightFormat(bits=8, group_size=32, symmetric=False)}
    assert "15 in 4 bits, groups of 32 with zero points, 1 in 8 bits" in " ".join(out.split())
    assert re.search(r"perplexity +not measured", out)
    assert "calibration half" in " ".join(out.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--option", "act_order"], "'act_order' is not of the form NAME=VALUE"),
        (["--algo", "gptq", "--option", "damping=7"], "'damping'"),
        (["--override", "head=5"], "'overrides.head.bits'"),
        (["--max-ppl-increase", "some"], "'some' is not a percentage"),
        (["--max-ppl-increase", "-1"], "not zero or more"),
        (["--no-evaluate", "--max-ppl-increase", "1"], "contradicts"),
        (["--calibration", "text.txt"], "nothing in this recipe is calibrated"),
        (["--keep", "hea"], "did you mean 'head'?"),
        (["--algo", "magic"], "there is no algorithm 'magic'; there are rtn, gptq, awq"),
        (["--algo", "none"], "nothing is quantized"),
        (["--bits", "5"], "'5' is not one of '4', '8'"),
    ],
)
def test_mistakes(
    options: list[str],
    message: str,
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    status, out, err = run(capsys, tiny_checkpoint("llama"), tmp_path / "q", *options)
    assert (status, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_source_must_be_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, tmp_path, tmp_path / "q")
    assert status == 4
    assert "llmc convert" in err
