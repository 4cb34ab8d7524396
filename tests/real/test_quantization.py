"""What quantizing costs on real weights: a quick part of bench/quantization.py, and what a quantized engine writes.

Run by `make test-real`, with the file's path in LLMC_REAL_MODEL.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.real, pytest.mark.timeout(1800)]

TASKS = Path(__file__).parents[2] / "examples" / "code_tasks.jsonl"


def llmc(*arguments: object) -> None:
    command = [sys.executable, "-m", "llmc.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not os.environ.get("LLMC_REAL_MODEL"):
        pytest.fail("LLMC_REAL_MODEL is not set: it is the path of a Qwen2.5-Coder-0.5B-Instruct GGUF file")
    folder = tmp_path_factory.mktemp("quantization") / "checkpoint"
    llmc("convert", os.environ["LLMC_REAL_MODEL"], folder)
    return folder


def quality(checkpoint: Path, out: Path, *options: object) -> dict[str, Any]:
    """What `llmc quantize` says of its result on 1,024 tokens."""
    llmc("quantize", checkpoint, out, "--text-tokens", 1024, *options)
    found: dict[str, Any] = json.loads((out / "report.json").read_text(encoding="utf-8"))["quality"]
    return found


def test_eight_bits_are_free_and_four_cost_little(checkpoint: Path, tmp_path: Path) -> None:
    eight = quality(checkpoint, tmp_path / "int8", "--bits", 8)
    assert abs(eight["increase"]) < 0.001
    assert eight["kl"] < 0.001
    four = quality(checkpoint, tmp_path / "int4")
    assert eight["kl"] < four["kl"] < 0.1
    llmc("build-engine", tmp_path / "int4", tmp_path / "engine")
    llmc("evaluate", tmp_path / "engine", "--tasks", TASKS, "--json", tmp_path / "tasks.json")
    (row,) = json.loads((tmp_path / "tasks.json").read_text(encoding="utf-8"))
    assert row["pass_at_1"] >= 0.25
