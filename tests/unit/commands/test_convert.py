from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import tiny_gguf
from click.testing import CliRunner, Result

from llmc.checkpoint import Checkpoint
from llmc.cli import group, main
from llmc.errors import LlmcError


def llmc(*arguments: object) -> Result:
    result = CliRunner().invoke(group, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit | LlmcError):
        raise result.exception
    return result


def test_convert_and_export_say_what_they_made_and_what_comes_next(
    tiny_source: Callable[[str], Path], tmp_path: Path
) -> None:
    result = llmc("convert", tiny_source("qwen3"), tmp_path / "ckpt")
    assert result.exit_code == 0
    for said in ("qwen3, 2 layers", "float32", "320 tokens", f"llmc quantize {tmp_path / 'ckpt'}"):
        assert said in result.output
    result = llmc("export", tmp_path / "ckpt", tmp_path / "back", "--format", "hf")
    assert result.exit_code == 0
    assert "model.safetensors" in result.output
    assert str(tmp_path / "back") in result.output


def test_parameters_are_counted(tiny_source: Callable[[str], Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    count = AutoModelForCausalLM.from_pretrained(tiny_source("llama-bias")).num_parameters()
    result = llmc("convert", tiny_source("llama-bias"), tmp_path / "ckpt")
    assert f"{count / 1e6:,.1f} M in" in result.output


def test_a_gguf_file_and_another_type(tmp_path: Path) -> None:
    path = tiny_gguf.save(tiny.TINY["qwen2"], tmp_path / "m.gguf", kind="Q8_0")
    result = llmc("convert", path, tmp_path / "ckpt", "--dtype", "bfloat16")
    assert result.exit_code == 0
    assert "types       bfloat16" in result.output
    assert Checkpoint(tmp_path / "ckpt").spec.family == "qwen2"


def test_overwrite(tiny_source: Callable[[str], Path], tmp_path: Path) -> None:
    arguments = ("convert", tiny_source("llama"), tmp_path / "ckpt")
    assert llmc(*arguments).exit_code == 0
    assert isinstance(llmc(*arguments).exception, LlmcError)
    assert llmc(*arguments, "--overwrite").exit_code == 0
    export = ("export", tmp_path / "ckpt", tmp_path / "back")
    assert llmc(*export).exit_code == 0
    assert isinstance(llmc(*export).exception, LlmcError)
    assert llmc(*export, "--overwrite").exit_code == 0


def test_a_mistake_is_one_line_and_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["convert", str(tmp_path / "nowhere"), str(tmp_path / "ckpt")])
    assert caught.value.code == 2
    output = capsys.readouterr().err
    assert output == f"llmc: {tmp_path / 'nowhere'} does not exist\n"
    assert list(tmp_path.iterdir()) == []
