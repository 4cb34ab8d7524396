"""`llmc quantize`: what it prints, and that a mistake is one line."""

from __future__ import annotations

import json
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
    assert (
        "perplexity rises by 50.00%, 1.50% is allowed, and with more bits nothing would be left that is quantized"
        in err
    )
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


def test_bits_that_are_aimed_at(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = run(capsys, tiny_checkpoint("llama"), tmp_path / "q", "--target-bits", 7, "--text-tokens", 100)
    assert status == 0
    bits = re.search(r"bits +([0-9.]+) for each parameter, scales and what is kept included", out)
    assert bits
    assert 6 < float(bits[1]) <= 7
    assert re.search(r"bits by part +(4|8): .*; (4|8): ", out)
    report = json.loads((tmp_path / "q" / "report.json").read_text(encoding="utf-8"))
    assert report["bits_per_parameter"] == pytest.approx(float(bits[1]), abs=0.006)
    assert report["sensitivity"].keys() == report["bits_by_part"].keys() == {"front", "layers.0", "layers.1", "tail"}


def test_a_configuration_of_paddlenlp(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its data, through the model's template; what is typed goes before it."""
    (tmp_path / "data").mkdir()
    rows = [{"src": "the quick fox?", "tgt": "over the dog"}] * 20
    (tmp_path / "data" / "train.json").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    values = {"do_gptq": True, "gptq_step": 8, "dataset_name_or_path": "./data", "output_dir": "./checkpoints"}
    (tmp_path / "gptq_argument.json").write_text(json.dumps(values), encoding="utf-8")
    arguments = ["--config", tmp_path / "gptq_argument.json", "--group-size", 64, "--text-tokens", 100]
    status, out, err = run(capsys, tiny_checkpoint("llama"), tmp_path / "q", *arguments)
    assert status == 0
    assert "gptq_argument.json: gptq_step: how much is read: --calibration-tokens" in err
    recipe = Checkpoint(tmp_path / "q").recipe
    assert recipe is not None
    assert (recipe.algorithm, recipe.keep) == ("gptq", ("[!l]*",))
    assert recipe.weights == WeightFormat(bits=4, group_size=64, symmetric=False)
    assert recipe.options == {"act_order": True, "damping": 0.1, "search": True}
    assert "20 rows of src/tgt, through the model's chat template" in " ".join(out.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target-bits", "3"], "3 bits a parameter are not enough"),
        (["--target-bits", "6", "--max-ppl-increase", "1"], "both choose the bits: give one"),
        (["--target-bits", "6", "--algo", "none", "--kv-cache", "int8"], "choose the bits of weights: name an --algo"),
        (["--kv-scale", "head"], "add --kv-cache int8"),
        (["--kv-cache", "int8", "--kv-scale", "dynamic", "--kv-observer", "max", "--calib", "a.txt"], "is calibrated"),
        (["--kv-cache", "int8", "--kv-scale", "dynamic", "--kv-observer", "average"], "no text is observed"),
        (["--algo", "gptq", "--calib", "none.jsonl"], "cannot read the calibration file none.jsonl"),
        (["--config", "none.json"], "cannot read the configuration none.json"),
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
