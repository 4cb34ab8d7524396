"""What the documents name is there: links, files, commands and their options, make's targets."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from llmc import cli

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted(
    [ROOT / "README.md", ROOT / "CHANGELOG.md", *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/README.md")]
)

# Folders that a reader meets, whose files the documents name.
TREES = ("llmc", "converters", "builders", "trainers", "serve", "tests", "examples", "docs", "scripts", "bench")


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def code(path: Path) -> list[str]:
    """Inline code, and the lines of shell blocks with their continuations joined."""
    text = text_of(path)
    blocks = [block for _, block in re.findall(r"```(sh|console)\n(.*?)```", text, re.DOTALL)]
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return [item for item in lines + inline if item]


def options(command: click.Command) -> set[str]:
    return {name for parameter in command.params for name in parameter.opts + parameter.secondary_opts} | {"--help"}


def find_command(words: list[str]) -> click.Command:
    """The command that `llmc WORDS` calls."""
    command: click.Command = cli.group
    for word in words:
        if not isinstance(command, click.Group):
            break
        found = command.get_command(click.Context(command), word)
        if word.startswith("-") or found is None:
            assert word.startswith("-") or word.isupper() or word == "...", f"there is no command '{word}'"
            break
        command = found
    return command


def test_the_documents_are_there() -> None:
    names = {path.relative_to(ROOT).as_posix() for path in DOCUMENTS}
    wanted = "design adding-a-family adding-an-algorithm adding-a-backend checkpoint-format serving"
    assert {f"docs/{name}.md" for name in wanted.split()} | {"README.md", "examples/01_pretrain/README.md"} <= names


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(path)):
        if not target.startswith(("http://", "https://", "#")):
            assert (path.parent / target.partition("#")[0]).exists(), target


def test_files_that_are_named_exist() -> None:
    seen = 0
    for path in DOCUMENTS:
        for name in code(path):
            if re.fullmatch(rf"({'|'.join(TREES)})/[\w./-]+\.(py|md|sh|toml)", name) and "NAME" not in name:
                assert (ROOT / name).exists(), f"{path.name}: {name}"
                seen += 1
    assert seen >= 20


def test_commands_and_options_that_are_named_exist() -> None:
    seen = 0
    for path in DOCUMENTS:
        for line in code(path):
            if not re.match(r"llmc [a-z-]", line):
                continue
            words = shlex.split(line.partition(" #")[0], comments=False)[1:]
            command = find_command(words)
            for word in words:
                if word.startswith("-") and word not in {"-", "--"}:
                    name = word.partition("=")[0]
                    assert name in options(command) | options(cli.group), f"{path.name}: {line}"
            seen += 1
    assert seen >= 25


def test_the_table_of_commands_is_complete() -> None:
    rows = re.findall(r"^\| `llmc ([a-z-]+)", text_of(ROOT / "README.md"), re.MULTILINE)
    assert list(dict.fromkeys(rows)) == list(cli.COMMANDS)


def test_make_targets_that_are_named_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", text_of(ROOT / "Makefile"), re.MULTILINE))
    seen = 0
    for path in DOCUMENTS:
        for line in code(path):
            if match := re.match(r"(?:[A-Z_]+=\S+ )*make ([a-z-]+)", line):
                assert match[1] in targets, f"{path.name}: {line}"
                seen += 1
    assert seen >= 4


def test_exit_statuses_in_the_readme_are_those_of_the_errors() -> None:
    from llmc import errors

    (sentence,) = re.findall(r"Exit status: (.*?)\n\n", text_of(ROOT / "README.md"), re.DOTALL)
    named = {int(number) for number in re.findall(r"\b(\d+) ", sentence.replace("\n", " "))}
    classes = [item for item in vars(errors).values() if isinstance(item, type) and issubclass(item, errors.LlmcError)]
    assert {item.exit_code for item in classes} | {0, 130} == named
