"""What quantizing costs on real weights: a quick part of bench/quantization.py, and what a quantized engine writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import llmc

from llmc.checkpoint import Checkpoint

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


@pytest.fixture(scope="module")
def rounded(converted: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The checkpoint of `w8a8`, and what `llmc quantize` says of it."""
    folder = tmp_path_factory.mktemp("rounded") / "w8a8"
    return folder, quality(converted, folder, "--algo", "w8a8")


def test_rounded_activations_cost_little(rounded: tuple[Path, dict[str, Any]]) -> None:
    _, found = rounded
    assert 0 < found["increase"] < 0.015
    assert 0 < found["kl"] < 0.02


def test_rounded_activations_leave_and_come_back(rounded: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """Through compressed-tensors, which has a place for all but embedding and head."""
    llmc("export", rounded[0], tmp_path / "exported", "--format", "compressed-tensors")
    llmc("convert", tmp_path / "exported", tmp_path / "back")
    one, two = Checkpoint(rounded[0]), Checkpoint(tmp_path / "back")
    assert one.recipe is not None
    assert two.recipe is not None
    assert (two.recipe.weights, two.recipe.activations) == (one.recipe.weights, one.recipe.activations)
    inside = [name for name in one if name.startswith("layers.")]
    assert sum(name.endswith(".qweight") for name in inside) == 7 * one.spec.num_layers
    assert inside == [name for name in two if name.startswith("layers.")]
    for name in inside:
        assert np.array_equal(two[name], one[name]), name
