"""What quantizing costs on real weights: a quick part of bench/quantization.py, and what a quantized engine writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import llmc

pytestmark = [pytest.mark.real, pytest.mark.timeout(1800)]

TASKS = Path(__file__).parents[2] / "examples" / "code_tasks.jsonl"


def quality(converted: Path, out: Path, *options: object) -> dict[str, Any]:
    """What `llmc quantize` says of its result on 1,024 tokens."""
    llmc("quantize", converted, out, "--text-tokens", 1024, *options)
    found: dict[str, Any] = json.loads((out / "report.json").read_text(encoding="utf-8"))["quality"]
    return found


def test_eight_bits_are_free_and_four_cost_little(converted: Path, tmp_path: Path) -> None:
    eight = quality(converted, tmp_path / "int8", "--bits", 8)
    assert abs(eight["increase"]) < 0.001
    assert eight["kl"] < 0.001
    four = quality(converted, tmp_path / "int4")
    assert eight["kl"] < four["kl"] < 0.1
    llmc("build-engine", tmp_path / "int4", tmp_path / "engine")
    llmc("evaluate", tmp_path / "engine", "--tasks", TASKS, "--json", tmp_path / "tasks.json")
    (row,) = json.loads((tmp_path / "tasks.json").read_text(encoding="utf-8"))
    assert row["pass_at_1"] >= 0.25
