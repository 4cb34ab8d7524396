"""`llmc quantize --algo nvfp4|mxfp4|mxfp8`: refused without CUDA; with it, what the commands after it say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from llmc import cli
from llmc.checkpoint import Checkpoint
from llmc.quant import algorithm
from llmc.recipe import BLOCKS, WeightFormat

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """A command line -> exit status, output and errors, each in one line."""

    def runs(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()  # what the fixtures' libraries said
        with pytest.raises(SystemExit) as caught:
            cli.main([*map(str, arguments)])
        out, err = (" ".join(text.split()) for text in capsys.readouterr())
        assert "Traceback" not in err
        return int(caught.value.code or 0), out, err

    return runs


@pytest.mark.parametrize("kind", BLOCKS)
def test_refused_where_there_is_no_cuda(
    kind: str, run: Run, tiny_checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    status, out, err = run("quantize", tiny_checkpoint("llama"), tmp_path / "q", "--algo", kind)
    assert (status, out) == (2, "")
    assert f"{kind} is for CUDA, and PyTorch sees no CUDA device: ONNX Runtime has no CPU kernel that multiplies" in err
    assert "Choose w8a8 or smoothquant (int8 products), fp8" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("mxfp6", "llmc does not have mxfp6: choose mxfp8 or mxfp4 where CUDA is, else fp8"),
        ("mxint8", "llmc does not have mxint8: choose rtn with 8 bits in groups of 32"),
        ("nvfp4_awq", "llmc does not have nvfp4_awq: choose nvfp4 where CUDA is"),
        ("nvfp4 --bits 8", "nvfp4 has bits and blocks of its own and rounds weights alone: leave --bits out"),
        ("mxfp8 --group-size 64", "leave --group-size out"),
        ("mxfp4 --activations dynamic", "leave --activations out"),
        ("mxfp4 --override head=8", "leave --override out"),
    ],
)
def test_mistakes(
    options: str,
    message: str,
    run: Run,
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(algorithm, "has_cuda", lambda: True)
    status, _, err = run("quantize", tiny_checkpoint("llama"), tmp_path / "q", "--algo", *options.split())
    assert status == 2
    assert message in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", BLOCKS)
def test_with_cuda_it_is_written_and_measured_and_refused_by_what_cannot_hold_it(
    kind: str, run: Run, tiny_checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(algorithm, "has_cuda", lambda: True)
    source, made, blocks = tiny_checkpoint("llama"), tmp_path / "q", BLOCKS[kind]
    status, out, err = run("quantize", source, made, "--algo", kind, "--text-tokens", 256)
    assert status == 0, err
    assert f"14 in {kind}, groups of {blocks.size}" in out
    assert f"next: llmc export {made} FOLDER --format modelopt" in out
    recipe = Checkpoint(made).recipe
    assert recipe is not None
    assert recipe.weights == WeightFormat(kind=kind, bits=blocks.bits, group_size=blocks.size)  # type: ignore[arg-type]
    assert {recipe.format_of("head"), recipe.format_of("embed")} == {WeightFormat(bits=8, group_size=32)}

    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 20, encoding="utf-8")
    compared = ["--text", tmp_path / "text.txt", "--max-tokens", 128, "--json", tmp_path / "figures.json"]
    status, _, err = run("evaluate", source, made, *compared)
    assert status == 0, err
    _, row = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    assert 0 < row["kl"] < 1  # random weights: int4 in groups of 16 loses 0.3

    status, _, err = run("build-engine", made, tmp_path / "engine")
    assert status == 2
    assert f"has {kind} weights, which no CPU kernel of ONNX Runtime multiplies: export it for an engine on CUDA" in err
    refusals = {
        **dict.fromkeys(
            ("gptq", "awq", "compressed-tensors"), f"it has no place for {kind} weights (the format modelopt has)"
        ),
        **dict.fromkeys(("hf", "gguf", "original", "paddle"), f"is quantized ({kind})"),
    }
    for form, message in refusals.items():
        status, _, err = run("export", made, tmp_path / form, "--format", form)
        assert status == 2
        assert message in err
    assert {path.name for path in tmp_path.iterdir()} == {"q", "text.txt", "figures.json"}


def test_more_bits_where_they_are_needed_are_those_of_the_original(
    run: Run, tiny_checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(algorithm, "has_cuda", lambda: True)
    more = ["--target-bits", 18, "--text-tokens", 128, "--calibration-tokens", 128]
    status, _, err = run("quantize", tiny_checkpoint("llama"), tmp_path / "q", "--algo", "nvfp4", *more)
    assert status == 0, err
    recipe = Checkpoint(tmp_path / "q").recipe
    assert recipe is not None
    forms = [recipe.format_of(f"layers.{layer}.mlp.up") for layer in (0, 1)]
    assert None in forms
    assert {form.kind for form in forms if form} <= {"nvfp4"}
