"""`llmc quantize` and `llmc build-engine` where activations are rounded: what options become, and what is printed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llmc import cli
from llmc.checkpoint import Checkpoint
from llmc.errors import UserError
from llmc.quant.algorithm import check_formats
from llmc.recipe import ActivationFormat, QuantRecipe, WeightFormat


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        cli.main([*map(str, arguments)])
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


INT8 = WeightFormat(bits=8, group_size=0)
CASES: dict[str, tuple[WeightFormat, ActivationFormat | None, str]] = {
    "--algo w8a8": (INT8, ActivationFormat(), "MatMulIntegerToFloat"),
    "--algo w8a8 --activations static": (INT8, ActivationFormat(dynamic=False), "MatMulIntegerToFloat"),
    "--algo smoothquant --alpha 0.5 --shift": (INT8, ActivationFormat(dynamic=False), "MatMulIntegerToFloat"),
    "--algo fp8 --per-tensor --activations static": (
        WeightFormat(kind="fp8", bits=8, group_size=0, per_tensor=True),
        ActivationFormat(kind="fp8", dynamic=False),
        "the CPU multiplies no fp8",
    ),
    "--algo fp8 --activations none": (WeightFormat(kind="fp8", bits=8, group_size=0), None, "Gemm in float32"),
    "--algo rtn --group-size 64 --activations dynamic": (
        WeightFormat(bits=4, group_size=64, symmetric=False),
        ActivationFormat(),
        "MatMulNBits, products in int8",
    ),
    "--algo rtn --activations fp8": (
        WeightFormat(bits=4, group_size=32, symmetric=False),
        ActivationFormat(kind="fp8"),
        "MatMulNBits in float32",
    ),
}


@pytest.mark.parametrize("options", CASES)
def test_options_become_formats_and_formats_kernels(
    options: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--calibration-tokens", 64] if "static" in options or "smooth" in options else []
    arguments = [tiny_checkpoint("llama"), tmp_path / "q", "--no-evaluate", *options.split(), *more]
    status, out, err = run(capsys, "quantize", *arguments)
    assert status == 0, err
    recipe = Checkpoint(tmp_path / "q").recipe
    assert recipe is not None
    weights, activations, kernel = CASES[options]
    assert (recipe.weights, recipe.activations) == (weights, activations)
    assert ("activations" in out) == (activations is not None)
    if "smooth" in options:
        assert recipe.options == {"alpha": 0.5, "steps": 20, "shift": True, "pieces": 0}
        assert recipe.shifted
    status, out, err = run(capsys, "build-engine", tmp_path / "q", tmp_path / "engine")
    assert status == 0, err
    assert kernel in out
    eight = WeightFormat(bits=8, group_size=weights.group_size or 32)
    assert recipe.format_of("head") == eight
    assert recipe.format_of("embed") == (weights if weights.group_size else eight)
    assert recipe.inputs_of("head") is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--algo w8a8 --bits 4", "w8a8 has 8 bits and a scale for each row"),
        ("--algo smoothquant --group-size 64", "for fewer bits: --algo awq --activations dynamic"),
        ("--algo smoothquant --alpha some", "'alpha': a number from 0 to 1, or search"),
        ("--algo smoothquant --alpha 1.5", "a number from 0 to 1, or search"),
        ("--algo smoothquant --activations none", "need rounded activations"),
        ("--algo w8a8 --alpha 0.5", "--alpha, --shift and --smooth-pieces go with --algo smoothquant"),
        ("--algo rtn --activations static", "static int8 activations need weights with a scale for a whole row"),
        ("--algo w8a8 --activations fp8", "go with int8 activations"),
        ("--algo none --kv-cache int8 --activations dynamic", "activations are rounded where weights are quantized"),
    ],
)
def test_mistakes(
    options: str,
    message: str,
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    status, out, err = run(capsys, "quantize", tiny_checkpoint("llama"), tmp_path / "q", *options.split())
    assert (status, out) == (2, "")
    assert message in " ".join(err.split())
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_static_scales_need_an_algorithm_that_finds_them() -> None:
    static = ActivationFormat(kind="fp8", dynamic=False)
    with pytest.raises(UserError, match="awq finds no static scales of activations: fp8, smoothquant, w8a8 do"):
        check_formats(QuantRecipe(algorithm="awq", weights=WeightFormat(bits=4, group_size=32), activations=static))
    rows = QuantRecipe(algorithm="gptq", weights=INT8, activations=ActivationFormat())
    with pytest.raises(UserError, match="gptq needs a group size"):
        check_formats(rows)


def test_dynamic_scales_need_no_torch() -> None:
    code = "import sys, llmc.quant.quantize, llmc.quant.scaled; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# The files of PaddleNLP's llm/config that round activations -> algorithm, kind, KV cache.
PADDLENLP: dict[str, tuple[dict[str, object], tuple[str, str, str | None]]] = {
    "ptq": (
        {"smooth": True, "smooth_piecewise_search": True, "smooth_k_piece": 3, "shift": True},
        ("smoothquant", "int8", None),
    ),
    "without smoothing": ({"act_quant_method": "abs_max"}, ("w8a8", "int8", None)),
    "ptq_c8": ({"smooth": True, "quant_type": "a8w8c8"}, ("smoothquant", "int8", "int8")),
    "fp8_ptq": ({"use_fp8": "WA", "weight_quant_method": "abs_max"}, ("fp8", "fp8", None)),
}


@pytest.mark.parametrize("name", PADDLENLP)
def test_a_configuration_of_paddlenlp(
    name: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From its file to an engine, embedding and head as they were."""
    values, expected = PADDLENLP[name]
    (tmp_path / "argument.json").write_text(json.dumps({"do_ptq": True, "ptq_step": 16, **values}), encoding="utf-8")
    options = ["--config", tmp_path / "argument.json", "--calibration-tokens", 256, "--text-tokens", 100]
    status, out, err = run(capsys, "quantize", tiny_checkpoint("llama"), tmp_path / "q", *options)
    assert status == 0, err
    assert "perplexity" in out
    recipe = Checkpoint(tmp_path / "q").recipe
    assert recipe is not None
    assert recipe.activations is not None
    assert not recipe.activations.dynamic
    cache = recipe.kv_cache.kind if recipe.kv_cache else None
    assert (recipe.algorithm, recipe.activations.kind, cache) == expected
    assert recipe.format_of("embed") is recipe.format_of("head") is None
    status, out, err = run(capsys, "build-engine", tmp_path / "q", tmp_path / "engine")
    assert status == 0, err
