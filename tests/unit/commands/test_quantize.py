"""`llmc quantize`: what it prints, and that a mistake is one line."""

from __future__ import annotations

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
    status, out, err = run(capsys, tiny_checkpoint("llama"), tmp_path / "q")
    assert (status, err) == (0, "")
    recipe = Checkpoint(tmp_path / "q").recipe
    assert recipe is not None
    assert recipe.weights == WeightFormat(bits=4, group_size=32)
    assert "16 in 4 bits, groups of 32; kept 0" in out
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
    assert "KV cache   int8" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kv-cache", "int8"], "pass --calibration FILE"),
        (["--calibration", "text.txt"], "nothing in this recipe is calibrated"),
        (["--keep", "hea"], "did you mean 'head'?"),
        (["--algo", "magic"], "there is no algorithm 'magic'; there are rtn"),
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
