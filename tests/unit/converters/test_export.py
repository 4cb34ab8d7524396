"""The one door out, and its command."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
from click.testing import CliRunner

from llmc.commands import export as command
from llmc.converters.convert import convert
from llmc.converters.export import FORMATS, export
from llmc.errors import UserError
from llmc.quant.quantize import quantize
from llmc.recipe import QuantRecipe, WeightFormat


def test_the_command_offers_what_the_table_has() -> None:
    assert list(FORMATS) == command.FORMATS
    assert sorted({kind for row in FORMATS.values() for kind in row.kinds}) == sorted(command.TYPES)


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_has_the_one_signature(form: str) -> None:
    settings = {"folder", "out", "overwrite", "progress"} | ({"kind"} if FORMATS[form].kinds else set())
    assert set(inspect.signature(import_module(FORMATS[form].module).export).parameters) == settings


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_is_read_again(form: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    source = tiny_checkpoint("qwen2")
    if FORMATS[form].quantized:
        quantize(
            source, tmp_path / "quantized", QuantRecipe(algorithm="rtn", weights=WeightFormat(bits=4, group_size=32))
        )
        source = tmp_path / "quantized"
    made = CliRunner().invoke(command.command, [str(source), str(tmp_path / "out"), "--format", form])
    assert made.exit_code == 0, made.output
    assert "next: " in made.output
    assert convert(tmp_path / "out", tmp_path / "back").spec.family == "qwen2"


def test_what_is_not_offered(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'onnx'"):
        export("onnx", tiny_checkpoint("llama"), tmp_path / "out")
    with pytest.raises(UserError, match="leaves tensors"):
        export("hf", tiny_checkpoint("llama"), tmp_path / "out", kind="q8_0")
    with pytest.raises(UserError, match="'q3_k'"):
        export("gguf", tiny_checkpoint("llama"), tmp_path / "out", kind="q3_k")


def test_a_folder_with_one_gguf_file_is_that_file(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    export("gguf", tiny_checkpoint("llama"), tmp_path / "out")
    (tmp_path / "out/second.gguf").write_bytes((tmp_path / "out/model.gguf").read_bytes())
    with pytest.raises(UserError, match=r"2 GGUF files.*model\.gguf"):
        convert(tmp_path / "out", tmp_path / "back")
