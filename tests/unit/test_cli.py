"""The command line as a user meets it: in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import llmc
from llmc import cli, errors

HEAVY = (
    "torch", "onnx", "onnx_ir", "onnxruntime", "flask", "transformers", "numpy", "pydantic", "rich", "tokenizers",
    "accelerate", "matplotlib", "modelopt", "jinja2",
)  # fmt: skip


def child(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return child("from llmc.cli import main; main()", *arguments)


def commands(group: click.Command, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every command and sub-command by the words that call it."""
    found = [path]
    if isinstance(group, click.Group):
        context = click.Context(group)
        for name in group.list_commands(context):
            command = group.get_command(context, name)
            assert command is not None, name
            found += commands(command, (*path, name))
    return found


def test_help_imports_nothing_heavy() -> None:
    code = f"""
import sys
from llmc.cli import main
try:
    main(["--help"])
except SystemExit as end:
    import json
    met = [name for name in {HEAVY!r} if name in sys.modules]
    print(json.dumps([end.code, len(sys.modules), met]), file=sys.stderr)
"""
    done = child(code)
    status, count, met = json.loads(done.stderr)
    assert status == 0
    assert met == []
    assert count < 350
    for name in cli.COMMANDS:
        assert f"  {name} " in done.stdout


def test_the_help_of_every_command_imports_no_backend() -> None:
    code = f"""
import sys
from click.testing import CliRunner
from llmc import cli
for path in {commands(cli.group)!r}:
    result = CliRunner().invoke(cli.group, [*path, "--help"])
    assert result.exit_code == 0, (path, result.output)
    assert "Usage: " in result.output
print([name for name in {HEAVY!r} if name in sys.modules and name not in ("pydantic",)])
"""
    done = child(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_every_command_of_the_table_is_there_and_documented() -> None:
    found = commands(cli.group)
    assert {path[0] for path in found if path} == cli.COMMANDS.keys()
    assert ("train", "pretrain") in found
    for path in found:
        result = CliRunner().invoke(cli.group, [*path, "--help"])
        assert result.exit_code == 0, path
        assert len(result.output.splitlines()) >= 6, path
    for name, (module, text) in cli.COMMANDS.items():
        assert text.endswith("."), name
        source = Path(cli.__file__).parent / "commands" / f"{module}.py"
        assert len(source.read_text(encoding="utf-8").splitlines()) <= 80, f"{module}.py is over 80 lines"


def test_every_command_that_writes_a_folder_takes_overwrite() -> None:
    for path in [("train", "pretrain"), ("convert",), ("export",), ("quantize",), ("build-engine",)]:
        assert "--overwrite" in CliRunner().invoke(cli.group, [*path, "--help"]).output, path


def test_version() -> None:
    assert run("--version").stdout == f"llmc, version {llmc.__version__}\n"


@pytest.mark.parametrize(
    ("typed", "words"),
    [("qantize", "Did you mean 'quantize'?"), ("build", "build-engine"), ("xyzzy", "There is no command 'xyzzy'.")],
)
def test_an_unknown_command_suggests_one(typed: str, words: str) -> None:
    done = run(typed)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_option_suggests_one() -> None:
    done = run("convert", "--overwrit", "a", "b")
    assert done.returncode == 2
    assert "--overwrite" in done.stderr


CLASSES = [item for item in vars(errors).values() if isinstance(item, type) and issubclass(item, errors.LlmcError)]


@pytest.mark.parametrize("error", CLASSES, ids=lambda item: item.__name__)
def test_an_error_is_one_line_and_its_exit_status(
    error: type[errors.LlmcError], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error("what was met, and where")

    monkeypatch.setattr(cli.group, "main", fail)
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as end:
        cli.main([])
    assert end.value.code == error.exit_code
    assert capsys.readouterr().err == "llmc: what was met, and where\n"


def test_a_missing_file_is_a_users_mistake_not_a_traceback(tmp_path: Path) -> None:
    done = run("train", "pretrain", str(tmp_path / "no.toml"))
    assert done.returncode == 2
    assert done.stderr.startswith("llmc: cannot read the configuration")
    assert "Traceback" not in done.stderr


def test_a_run_without_an_output_is_told_where_to_say_it(tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text(
        '[data]\npaths = ["x"]\n[tokenizer]\nvocab_size = 300\n[model]\nhidden_size = 8\nnum_layers = 1\n'
        "num_heads = 1\nintermediate_size = 8\nmax_positions = 8\n",
        encoding="utf-8",
    )
    done = run("train", "pretrain", str(config))
    assert done.returncode == 2
    assert "--output" in done.stderr


def test_output_into_a_closed_pipe_is_quiet() -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-c", "from llmc.cli import main; main(['--help'])"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def test_a_signal_before_training_ends_with_its_status(tmp_path: Path) -> None:
    code = """
import os, signal, sys
from llmc import cli
cli.group.main = lambda *a, **k: os.kill(os.getpid(), signal.SIGTERM)
cli.main([])
"""
    assert child(code).returncode == 128 + 15
