"""`llmc families`: the table has every family, and says of each what its tiny models show."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from click.testing import CliRunner

import llmc.converters.families
from llmc.cli import group
from llmc.commands.families import command
from llmc.converters import families, native, paddle
from llmc.converters.overview import Overview, overview
from llmc.errors import UnsupportedModelError

FILES = sorted(path.stem for path in Path(llmc.converters.families.__file__).parent.glob("*.py"))
NAMES = [name for name in FILES if name != "__init__"]


def run(*arguments: str) -> str:
    result = CliRunner().invoke(group, ["families", *arguments], env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    return result.output


def test_the_table_has_a_whole_row_for_every_file_in_80_columns() -> None:
    title, header, *rows, hint = (line.rstrip() for line in run().splitlines())
    assert title == f"{len(NAMES)} model families"
    assert hint == "The names of their classes: llmc families NAME"
    assert [row.split()[0] for row in rows] == NAMES
    for row, family in zip(rows, overview(), strict=True):
        cells = re.split("  +", row)
        assert len(cells) == len(header.split())
        assert cells[1] == ", ".join(family.positions)
        for class_ in family.hf:
            assert class_.startswith(cells[4].split(", ")[family.hf.index(class_)])
        assert cells[-1] == (family.gguf or "-")


@pytest.mark.parametrize("family", overview(), ids=lambda family: family.name)
def test_one_family_with_its_classes(family: Overview) -> None:
    said = dict(re.split("  +", line, maxsplit=1) for line in run(family.name).splitlines())
    assert said["original"].split(", ") == list(family.architectures)
    assert said["hf"].split(", ") == list(family.hf)
    assert (said["paddle"], said["gguf"]) == (family.paddle or "-", family.gguf or "-")
    assert json.loads(run(family.name, "--json")) == json.loads(json.dumps(dataclasses.asdict(family)))


def test_a_family_that_there_is_not() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'llama5' .* there are .*llama, mistral"):
        CliRunner().invoke(command, ["llama5"], catch_exceptions=False)


def test_the_document_has_the_same_table() -> None:
    text = (Path(__file__).resolve().parents[3] / "docs/families.md").read_text(encoding="utf-8")
    for family in overview():
        cells = [family.architectures, family.hf, (family.paddle,), (family.gguf,)]
        said = [", ".join(f"`{name}`" for name in cell if name) or "-" for cell in cells]
        kinds = f"{', '.join(family.positions)} | {family.norm} | {'yes' if family.experts else ''}"
        assert f"| {family.name} | {kinds} | {' | '.join(said)} |" in text
        assert f"\n| {family.name} | {sum(case.model_type == family.name for case in tiny.TINY.values())} | " in text


def test_json() -> None:
    found = json.loads(CliRunner().invoke(group, ["families", "--json"]).output)
    assert [family["name"] for family in found] == NAMES
    by_name = {family["name"]: family for family in found}
    assert by_name["mistral"]["gguf"] == "llama"
    assert (by_name["chatglm"]["gguf"], by_name["chatglm2"]["gguf"]) == (None, "chatglm")
    assert [name for name in NAMES if by_name[name]["experts"]] == ["mixtral", "qwen2_moe", "qwen3_moe"]


def exports(checkpoint: Path, out: Path) -> bool:
    """Whether PaddleNLP's format can say a model."""
    try:
        return paddle.export(checkpoint, out).kind == "export"
    except UnsupportedModelError:
        return False


@pytest.mark.parametrize("family", overview(), ids=lambda family: family.name)
def test_what_it_says_is_what_the_tiny_models_show(
    family: Overview, tiny_source: Callable[[str], Path], tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    specs, classes = [], set()
    names = [name for name, case in tiny.TINY.items() if case.model_type == family.name]
    for name, case in tiny.TINY.items():
        if case.model_type == family.name:
            native.export(tiny_checkpoint(name), tmp_path / name)
            classes.update(json.loads((tmp_path / name / "config.json").read_text(encoding="utf-8"))["architectures"])
            config = json.loads((tiny_source(name) / "config.json").read_text(encoding="utf-8"))
            specs.append(families.read_spec(config, name)[1])
    assert {spec.position.kind for spec in specs} == set(family.positions)
    assert classes - set(family.architectures[1:]) == set(family.hf)
    assert (family.paddle is not None) == any(exports(tiny_checkpoint(name), tmp_path / "p" / name) for name in names)
    assert {spec.norm.kind for spec in specs} == {family.norm}
    assert any(spec.moe for spec in specs) == family.experts
