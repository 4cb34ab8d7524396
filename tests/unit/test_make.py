"""The Makefile and the script that makes the environment, as far as that goes without making one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make here")


def run(*command: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "LLMC_"))}
    return subprocess.run(
        list(map(str, command)), cwd=cwd, env=kept | environment, capture_output=True, text=True, check=False
    )


def test_make_alone_lists_the_targets_from_any_folder(tmp_path: Path) -> None:
    documented = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert {"demo", "test", "test-all", "test-real", "check", "bench"} <= set(documented)
    done = run("make", "-C", ROOT, cwd=tmp_path)
    assert done.returncode == 0
    assert re.findall(r"^  make ([a-z-]+) ", done.stdout, re.MULTILINE) == documented


@pytest.mark.parametrize("target", ["test-real", "bench"])
def test_what_needs_a_real_model_asks_for_it_first(target: str, tmp_path: Path) -> None:
    for model in ("", str(tmp_path / "no.gguf")):
        done = run("make", "-C", ROOT, target, f"VENV={tmp_path}/venv", cwd=tmp_path, LLMC_REAL_MODEL=model)
        assert done.returncode == 2
        assert f"LLMC_REAL_MODEL=/path/to/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf make {target}" in done.stdout
        assert not (tmp_path / "venv").exists()


def fake(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o755)


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A PATH with a Python that lacks venv, as Debian's does, and without anything that could install it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("sh", "dirname", "rm", "cat"):
        (folder / name).symlink_to(shutil.which(name) or name)
    fake(folder, "python3.11", f'case "$*" in *ensurepip*) exit 1;; esac\nexec {sys.executable} "$@"')
    return folder


def test_a_user_is_told_which_package_brings_venv(tools: Path, tmp_path: Path) -> None:
    fake(tools, "id", "echo 1000")
    done = run("sh", ROOT / "scripts" / "setup.sh", tmp_path / "venv", cwd=tmp_path, PATH=str(tools))
    assert done.returncode == 1
    assert "sudo apt-get install python3." in done.stderr
    assert not (tmp_path / "venv").exists()


def test_root_has_it_installed(tools: Path, tmp_path: Path) -> None:
    fake(tools, "id", "echo 0")
    fake(tools, "apt-get", f'echo "$*" >> {tmp_path}/asked\ncase "$1" in install) exit 9;; esac')
    done = run("sh", ROOT / "scripts" / "setup.sh", tmp_path / "venv", cwd=tmp_path, PATH=str(tools))
    assert done.returncode == 9
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert f"install -y -qq python{version}-venv" in (tmp_path / "asked").read_text(encoding="utf-8")


def test_the_programs_of_the_slow_tests_are_installed_by_root_alone(tools: Path, tmp_path: Path) -> None:
    fake(tools, "apt-get", f'echo "$*" >> {tmp_path}/asked')
    script, asked = ROOT / "scripts" / "programs.sh", tmp_path / "asked"
    fake(tools, "id", "echo 1000")
    done = run("sh", script, cwd=tmp_path, PATH=str(tools))
    assert done.returncode == 0
    assert "sudo apt-get install chromium chromium-driver nginx-light" in done.stderr
    fake(tools, "id", "echo 0")
    assert run("sh", script, cwd=tmp_path, PATH=str(tools)).returncode == 0
    assert asked.read_text(encoding="utf-8").splitlines() == [
        "update -qq",
        "install -y -qq chromium chromium-driver nginx-light",
    ]
    fake(tools, "chromium", "exit 0")
    fake(tools, "chromedriver", "exit 0")
    fake(tools, "nginx", "exit 0")
    assert run("sh", script, cwd=tmp_path, PATH=str(tools)).stdout == ""
    assert "sh scripts/programs.sh" in run("make", "-n", "-C", ROOT, "test-all", cwd=tmp_path).stdout
    assert "programs" not in run("make", "-n", "-C", ROOT, "test", cwd=tmp_path).stdout


def test_a_python_that_is_not_there_or_too_old_is_said(tools: Path, tmp_path: Path) -> None:
    fake(tools, "old", "exit 1")
    for python in ("/no/such/python", "old"):
        done = run("sh", ROOT / "scripts" / "setup.sh", tmp_path / "venv", cwd=tmp_path, PATH=str(tools), PYTHON=python)
        assert done.returncode == 1
        assert f"no Python from 3.10 to 3.13 found in PYTHON={python}" in done.stderr


def test_ci_runs_the_tests_and_then_the_demo() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = [line for line in script.read_text(encoding="utf-8").splitlines() if line.startswith("make ")]
    assert lines == ["make test", "make demo"]
