"""Values of options that several commands take."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from llmc.cli import group

COMMANDS = {
    "evaluate": ["model"],
    "verify": ["a", "b"],
    "score": ["model", "texts.jsonl"],
    "bench": ["engine"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_where_figures_cannot_go_is_said_before_the_work(command: str, tmp_path: Path) -> None:
    """None of the models exists: that would be said next."""
    target = tmp_path / "missing" / "figures.json"
    result = CliRunner().invoke(group, [command, *COMMANDS[command], "--json", str(target)])
    assert result.exit_code == 2
    assert f"there is no folder '{target.parent}'" in result.stderr


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    result = CliRunner().invoke(group, ["evaluate", "model", "--json", str(tmp_path)])
    assert result.exit_code == 2
    assert "is a directory" in result.stderr
