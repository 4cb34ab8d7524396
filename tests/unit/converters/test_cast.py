from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tiny
import tiny_gguf
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.converters import cast, gguf_file, gguf_tensors
from llmc.errors import CheckpointError, UserError
from llmc.tensors import SafetensorsWriter, TensorInfo, read_header

TYPES = list(cast.FLOATS.values())


def stored(path: Path, values: np.ndarray) -> dict[str, TensorInfo]:
    with SafetensorsWriter(path, {"x": TensorInfo(values.dtype, values.shape)}) as writer:
        writer.write("x", values)
    return read_header(path)


@given(
    shape=st.lists(st.integers(0, 7), max_size=3).map(tuple),
    source=st.sampled_from(TYPES),
    target=st.sampled_from(TYPES),
    block=st.integers(1, 64),
)
@settings(max_examples=150, deadline=None)
def test_in_blocks_of_any_size_it_is_one_cast(
    shape: tuple[int, ...], source: np.dtype, target: np.dtype, block: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    values = np.random.default_rng(0).normal(size=shape).astype(source)
    infos = stored(tmp_path_factory.getbasetemp() / "cast.safetensors", values)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cast, "BLOCK_BYTES", block)
        found = cast.on_disk(infos, target)
        met = found.load("x")
    assert found.infos["x"].shape == met.shape == shape
    assert met.dtype == target
    assert met.tobytes() == values.astype(target).tobytes()


@pytest.mark.parametrize("block", [1, 1000, 30000])
@pytest.mark.parametrize("kind", ["F32", "F16", "Q4_0"])
def test_gguf_in_blocks_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, block: int) -> None:
    file = gguf_file.read(tiny_gguf.save(tiny.TINY["llama-bias"], tmp_path / "m.gguf", kind=kind))
    whole = gguf_tensors.open_tensors(file, None)
    expected = {name: whole.load(name) for name in whole.infos}
    monkeypatch.setattr(cast, "BLOCK_BYTES", block)
    found = gguf_tensors.open_tensors(file, None)
    assert len(expected) > 20
    for name, value in expected.items():
        assert np.array_equal(found.load(name), value), name


def test_the_last_block_is_checked_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cast, "BLOCK_BYTES", 16)
    values = np.ones((9, 4), np.float32)
    values[8, 3] = 70000
    infos = stored(tmp_path / "x", values)
    with pytest.raises(CheckpointError, match="float16"):
        cast.on_disk(infos, np.dtype(np.float16)).load("x")
    assert cast.on_disk(infos, np.dtype(ml_dtypes.bfloat16)).load("x")[8, 3] == 70144


def test_names_of_types() -> None:
    assert cast.target_dtype("keep") is None
    assert cast.target_dtype("bfloat16") == ml_dtypes.bfloat16
    with pytest.raises(UserError, match="keep, float32, float16, bfloat16"):
        cast.target_dtype("int8")
