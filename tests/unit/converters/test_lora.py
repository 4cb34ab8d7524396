"""What of a PEFT adapter can be kept beside its base: PEFT's own product, and every refusal."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapters import ADAPTERS, make

from llmc.checkpoint import Checkpoint
from llmc.converters import lora
from llmc.errors import CheckpointError, LlmcError, UnsupportedModelError, UserError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft.*")

KEPT = [
    *("lora", "all-linear", "rslora", "patterns", "one-layer", "conv1d", "fused-by-heads", "fused-mlp", "opt"),
    "experts-left-alone",
]
REFUSED = sorted(ADAPTERS.keys() - set(KEPT))


@pytest.mark.parametrize("name", KEPT)
def test_factors_are_what_peft_adds(
    name: str, tmp_path: Path, tiny_source: Callable[[str], Path], tiny_checkpoint: Callable[[str], Path]
) -> None:
    """b^T a^T of each module is the difference between the base's matrix and the one that PEFT merges."""
    from llmc.converters.convert import convert

    base = tiny_source(ADAPTERS[name][0])
    make(name, base, tmp_path / "adapter")
    plain = Checkpoint(tiny_checkpoint(ADAPTERS[name][0]))
    merged = convert(tmp_path / "adapter", tmp_path / "merged", base=base)
    adapter = lora.read("mine", tmp_path / "adapter", plain.spec)
    assert adapter.name == "mine"
    changed = {key for key in plain if not np.array_equal(plain[key], merged[key])}
    assert {f"{module}.weight" for module in adapter.factors} == changed
    for module, (a, b) in adapter.factors.items():
        difference = merged[f"{module}.weight"] - plain[f"{module}.weight"]
        np.testing.assert_allclose((a.T @ b).T, difference, atol=2e-6)


@pytest.mark.parametrize("name", REFUSED)
def test_what_must_be_merged_says_so(
    name: str, tmp_path: Path, tiny_source: Callable[[str], Path], tiny_checkpoint: Callable[[str], Path]
) -> None:
    make(name, tiny_source(ADAPTERS[name][0]), tmp_path / "adapter")
    with pytest.raises(UnsupportedModelError, match="merge it: llmc convert"):
        lora.read("mine", tmp_path / "adapter", Checkpoint(tiny_checkpoint(ADAPTERS[name][0])).spec)


def refused(adapter: Path, spec: Any) -> LlmcError:
    with pytest.raises(LlmcError) as caught:
        lora.read("mine", adapter, spec)
    return caught.value


def test_what_is_wrong_is_named(
    tmp_path: Path, tiny_source: Callable[[str], Path], tiny_checkpoint: Callable[[str], Path]
) -> None:
    spec = Checkpoint(tiny_checkpoint("llama")).spec
    error = refused(tmp_path, spec)
    assert isinstance(error, UserError)
    assert "adapter_config.json" in str(error)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make("lora", tiny_source("llama"), tmp_path / "pickled", pickled=True)
        make("lora", tiny_source("llama"), tmp_path / "lora")
    error = refused(tmp_path / "pickled", spec)
    assert isinstance(error, CheckpointError)
    assert "no pickles" in str(error)
    other = Checkpoint(tiny_checkpoint("llama-head-dim")).spec
    assert "q_proj" in str(refused(tmp_path / "lora", other))
    gpt2 = Checkpoint(tiny_checkpoint("gpt2")).spec
    assert "which this base does not have" in str(refused(tmp_path / "lora", gpt2))
