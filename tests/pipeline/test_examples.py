"""The examples are real: the commands of their READMEs are run as they stand, with fewer and smaller steps."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llmc import manifest
from llmc.trainers import config as configs

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

# What makes a configuration small: enough to go through every command, not to learn.
SMALLER = {"steps": "6", "evaluate_every": "3", "vocab_size": "320", "num_layers": "1"}


def shell_lines(readme: Path) -> list[str]:
    """Every line of the README's sh blocks."""
    blocks = re.findall(r"```sh\n(.*?)```", readme.read_text(encoding="utf-8"), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def run(line: str, folder: Path) -> str:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, shell=True, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"$ {line}\n{done.stdout}{done.stderr}"
    return done.stdout


def test_every_configuration_is_valid() -> None:
    found = sorted(EXAMPLES.glob("*/config.toml"))
    assert [path.parent.name for path in found] == ["01_pretrain"]
    for path in found:
        assert configs.load(path).output == str(path.parent / "run")


def test_pretrain_readme(tmp_path: Path) -> None:
    copy = tmp_path / "examples" / "01_pretrain"
    shutil.copytree(
        EXAMPLES / "01_pretrain", copy, ignore=shutil.ignore_patterns("text", "run*", "checkpoint", "engine")
    )
    config = (copy / "config.toml").read_text(encoding="utf-8")
    for name, value in SMALLER.items():
        config, count = re.subn(rf"(?m)^{name} = \S+", f"{name} = {value}", config)
        assert count == 1, name
    (copy / "config.toml").write_text(config, encoding="utf-8")

    lines = shell_lines(copy / "README.md")
    assert [line.split()[1] for line in lines if line.startswith("llmc ")] == [
        "train",
        "convert",
        "build-engine",
        "evaluate",
        "generate",
    ]
    for line in lines:
        run(line, tmp_path)
    parents = {name: manifest.read(copy / name).parents for name in ("run", "checkpoint", "engine")}
    assert parents["checkpoint"][0] == manifest.parent(copy / "run")
    assert parents["engine"][0] == manifest.parent(copy / "checkpoint")
    assert json.loads((copy / "run" / "config.json").read_text(encoding="utf-8"))["training"]["steps"] == 6


@pytest.mark.slow
def test_demo(tmp_path: Path) -> None:
    """All of it, with less training; twice, as a user will."""
    for _ in range(2):
        out = run(f"{sys.executable} {EXAMPLES / 'demo.py'} {tmp_path / 'out'} --steps 20", tmp_path)
        assert "What the demo made" in out
        assert "ended with exit status 0" in out
        assert re.search(r"8 concurrent streams, \d{3,} tokens in", out)
    figures = json.loads((tmp_path / "out" / "evaluation.json").read_text(encoding="utf-8"))
    assert [Path(row["folder"]).name for row in figures] == ["engine", "engine-int4"]


def test_the_demo_does_not_empty_a_folder_of_somebody_else(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work", encoding="utf-8")
    done = subprocess.run([sys.executable, EXAMPLES / "demo.py", tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "was not made by the demo" in done.stderr
    assert (tmp_path / "thesis.txt").exists()
