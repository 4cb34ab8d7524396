"""Our safetensors against the safetensors package's, both ways."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from llmc import tensors
from llmc.errors import CheckpointError
from llmc.tensors import DTYPES, TensorInfo

# The package's own numpy front knows no bfloat16 and no fp8; those are compared through torch.
PLAIN = {code: dtype for code, dtype in DTYPES.items() if not code.startswith(("BF", "F8"))}

arrays = st.sampled_from(sorted(PLAIN)).flatmap(
    lambda code: hnp.arrays(PLAIN[code], hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5))
)
names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(lambda n: n != "__metadata__")


def write(path: Path, values: dict[str, np.ndarray]) -> None:
    plan = {name: TensorInfo(value.dtype, value.shape) for name, value in values.items()}
    with tensors.SafetensorsWriter(path, plan, {"format": "pt"}) as writer:
        for name, value in values.items():
            writer.write(name, value)


def same(left: np.ndarray, right: np.ndarray) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()


@given(values=st.dictionaries(names, arrays, max_size=5))
@settings(max_examples=80, deadline=None)
def test_the_package_reads_what_we_write(
    values: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory
) -> None:
    from safetensors.numpy import load_file

    path = tmp_path_factory.getbasetemp() / "ours.safetensors"
    write(path, values)
    found = load_file(path)
    assert set(found) == set(values)
    assert all(same(found[name], value) for name, value in values.items())


@given(values=st.dictionaries(names, arrays, min_size=1, max_size=5))
@settings(max_examples=80, deadline=None)
def test_we_read_what_the_package_writes(
    values: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory
) -> None:
    from safetensors.numpy import save_file

    path = tmp_path_factory.getbasetemp() / "theirs.safetensors"
    save_file(values, path, metadata={"format": "pt"})
    found = tensors.read_header(path)
    assert set(found) == set(values)
    for name, value in values.items():
        assert same(tensors.read_tensor(found[name]), value)


@pytest.mark.parametrize("code", sorted(set(DTYPES) - set(PLAIN)))
def test_the_types_that_numpy_lacks(code: str, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    theirs = {
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "F8_E8M0": torch.float8_e8m0fnu,
    }[code]
    lowest = 0.1 if code == "F8_E8M0" else -3  # it has no sign
    value = np.linspace(lowest, 3, 12).reshape(3, 4).astype(DTYPES[code])
    write(tmp_path / "ours.safetensors", {"x": value})
    found = load_file(tmp_path / "ours.safetensors")["x"]
    assert found.dtype == theirs
    assert np.array_equal(found.float().numpy(), value.astype(np.float32))
    save_file({"x": found}, tmp_path / "theirs.safetensors")
    assert same(tensors.read_tensor(tensors.read_header(tmp_path / "theirs.safetensors")["x"]), value)


def test_data_begins_on_a_cache_line(tmp_path: Path) -> None:
    for length in range(1, 80):
        write(tmp_path / "x", {"n" * length: np.zeros(3, np.float32)})
        (info,) = tensors.read_header(tmp_path / "x").values()
        assert info.offset % 64 == 0


def raw(path: Path, header: Any, data: bytes = bytes(16)) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(**changes: Any) -> dict[str, Any]:
    return {"x": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], **changes}}


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[1]",
        b"[" * 100_000,
        {"x": 3},
        {"x": {}},
        entry(dtype="F31"),
        entry(shape=[2, -2]),
        entry(shape=[-2, -2]),
        entry(shape=[2, 3]),
        entry(shape="ab"),
        entry(shape=None),
        entry(data_offsets=[0, 20]),
        entry(data_offsets=[16, 0]),
        entry(data_offsets=[-16, 0]),
        entry(data_offsets=[0]),
        entry(data_offsets=[16, 32]),
        entry(shape=[2**62, 4]),
    ],
)
def test_a_corrupt_header_is_refused(tmp_path: Path, header: Any) -> None:
    with pytest.raises(CheckpointError, match="x"):
        tensors.read_header(raw(tmp_path / "x", header))


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="missing"):
        tensors.read_header(tmp_path / "x")
    for content in (b"", b"abc", struct.pack("<Q", 2**63) + b"{}", struct.pack("<Q", 100) + b"{}"):
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(CheckpointError, match="not a safetensors file"):
            tensors.read_header(tmp_path / "x")


def test_a_file_that_shrinks_after_it_was_opened(tmp_path: Path) -> None:
    write(tmp_path / "x", {"x": np.zeros(1000)})
    (info,) = tensors.read_header(tmp_path / "x").values()
    with (tmp_path / "x").open("r+b") as file:
        file.truncate(info.offset + 100)
    with pytest.raises(CheckpointError, match="cut short"):
        tensors.read_tensor(info)


def test_what_is_written_must_be_what_was_planned(tmp_path: Path) -> None:
    plan = {name: TensorInfo(np.dtype(np.float32), (2,)) for name in ("a", "b")}
    ok = np.zeros(2, np.float32)

    def attempt(*pairs: tuple[str, np.ndarray]) -> str:
        with pytest.raises(CheckpointError) as caught:
            written(*pairs)
        return str(caught.value)

    def written(*pairs: tuple[str, np.ndarray]) -> None:
        with tensors.SafetensorsWriter(tmp_path / "x", plan) as writer:
            for name, value in pairs:
                writer.write(name, value)

    assert "'b' was written where the plan has 'a'" in attempt(("b", ok))
    assert "float64" in attempt(("a", np.zeros(2)))
    assert "[3]" in attempt(("a", np.zeros(3, np.float32)))
    assert "'b' of the plan was never written" in attempt(("a", ok))
    assert "nothing more" in attempt(("a", ok), ("b", ok), ("a", ok))


@given(sizes=st.lists(st.integers(0, 50), min_size=1, max_size=12), limit=st.integers(1, 100))
def test_shards_are_in_order_and_no_larger_than_they_must_be(sizes: list[int], limit: int) -> None:
    plan = {str(index): TensorInfo(np.dtype(np.uint8), (size,)) for index, size in enumerate(sizes)}
    shards = tensors.shard(plan, limit)
    assert [name for part in shards for name in part] == list(plan)
    assert all(len(part) == 1 or sum(info.nbytes for info in part.values()) <= limit for part in shards)
    assert all(shards)


def save_sharded(folder: Path, values: dict[str, np.ndarray], max_bytes: int) -> None:
    plan = {name: TensorInfo(value.dtype, value.shape) for name, value in values.items()}
    tensors.write_sharded(folder, plan, iter(values.items()), max_bytes=max_bytes)


def test_sharded_folders(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    values = {f"t{index}": np.full((4,), index, ml_dtypes.bfloat16) for index in range(5)}
    save_sharded(tmp_path, values, max_bytes=16)
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert names == [f"model-0000{index}-of-00003.safetensors" for index in (1, 2, 3)]
    found = tensors.read_folder(tmp_path)
    assert set(found) == set(values)
    assert all(same(tensors.read_tensor(found[name]), value) for name, value in values.items())
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in values.values())
    for name in names:
        assert {tensor for tensor, file in index["weight_map"].items() if file == name} == set(
            tensors.read_header(tmp_path / name)
        )
    (tmp_path / "one").mkdir()
    save_sharded(tmp_path / "one", {"x": np.zeros(3)}, max_bytes=1)
    assert load_file(tmp_path / "one/model.safetensors")["x"].tolist() == [0, 0, 0]


def test_an_index_that_is_wrong_is_refused(tmp_path: Path) -> None:
    save_sharded(tmp_path, {"a": np.zeros(4), "b": np.ones(4)}, max_bytes=32)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text(encoding="utf-8"))

    def attempt(weight_map: Any) -> str:
        path.write_text(json.dumps({**index, "weight_map": weight_map}), encoding="utf-8")
        with pytest.raises(CheckpointError) as caught:
            tensors.read_folder(tmp_path)
        return str(caught.value)

    weight_map = index["weight_map"]
    assert "'c' is in" in attempt({**weight_map, "c": weight_map["a"]})
    assert "'a' is in" in attempt({**weight_map, "a": weight_map["b"]})
    assert "plain file name" in attempt({**weight_map, "a": f"../{tmp_path.name}/{weight_map['a']}"})
    assert "is missing" in attempt({**weight_map, "a": "model-9.safetensors"})
    assert "not a safetensors index" in attempt(3)


@given(values=st.dictionaries(names, arrays, min_size=1, max_size=5), limit=st.integers(1, 200))
@settings(max_examples=20, deadline=None)
def test_files_are_hashed_while_they_are_written(
    values: dict[str, np.ndarray], limit: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("hashed")
    plan = {name: TensorInfo(value.dtype, value.shape) for name, value in values.items()}
    hashes = tensors.write_sharded(folder, plan, iter(values.items()), max_bytes=limit)
    assert hashes == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}
