from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_gguf
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.converters import gguf_file, gguf_tensors
from llmc.errors import CheckpointError, UnsupportedModelError


@pytest.mark.parametrize("name", ["llama-llama3", "qwen2.5-tied"])
def test_metadata_and_tensors_are_those_that_the_gguf_package_reads(name: str, tmp_path: Path) -> None:
    from gguf import GGUFReader

    path = tiny_gguf.save(tiny.TINY[name], tmp_path / "m.gguf", kind="Q4_0", **{"general.flag": True})
    ours, theirs = gguf_file.read(path), GGUFReader(path)
    fields = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert len(fields) > 20
    assert ours.metadata == fields
    assert ours.metadata["general.flag"] is True
    assert len(ours.tensors) == len(theirs.tensors)
    for tensor in theirs.tensors:
        found = ours.tensors[tensor.name]
        assert (found.shape, found.kind, found.offset) == (
            tuple(tensor.shape.tolist()[::-1]), int(tensor.tensor_type), tensor.data_offset
        )  # fmt: skip


def test_numbers_of_every_type(tmp_path: Path) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_uint8("u8", 200)
    writer.add_int8("i8", -3)
    writer.add_uint16("u16", 60000)
    writer.add_int16("i16", -300)
    writer.add_int32("i32", -70000)
    writer.add_uint64("u64", 2**40)
    writer.add_int64("i64", -(2**40))
    writer.add_float64("f64", 0.1)
    writer.add_array("texts", ["a", "Ğ", ""])
    writer.add_array("flags", [True, False])
    writer.add_array("floats", [0.5, -1.0])
    writer.add_custom_alignment(64)
    writer.add_tensor("t", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = gguf_file.read(tmp_path / "m.gguf")
    expected = {
        "u8": 200, "i8": -3, "u16": 60000, "i16": -300, "i32": -70000, "u64": 2**40, "i64": -(2**40), "f64": 0.1,
        "texts": ["a", "Ğ", ""], "flags": [True, False], "floats": [0.5, -1.0],
    }  # fmt: skip
    assert {key: file.metadata[key] for key in expected} == expected
    assert gguf_tensors.open_tensors(file, None).load("t").tolist() == [[0, 1, 2], [3, 4, 5]]


def write(
    path: Path, *, version: int = 3, keys: bytes = b"", num_keys: int = 0, tensors: bytes = b"", count: int = 0
) -> Path:
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", version, count, num_keys) + keys + tensors)
    return path


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"version": 1}, "version 1"),
        ({"version": 3 << 24}, "little-endian"),
        ({"num_keys": 2**60}, "damaged"),
        ({"count": 2**60}, "damaged"),
        ({"num_keys": 1, "keys": text("k") + struct.pack("<IIQ", 9, 8, 2**60)}, "damaged"),
        ({"num_keys": 1, "keys": text("k") + struct.pack("<II", 99, 0)}, "type 99"),
        ({"num_keys": 1, "keys": text("k") + struct.pack("<IIQ", 9, 9, 1)}, "array of type 9"),
        ({"num_keys": 1, "keys": struct.pack("<Q", 2) + b"\xff\xfe" + struct.pack("<II", 4, 1)}, "UTF-8"),
        ({"num_keys": 1, "keys": text("general.alignment") + struct.pack("<II", 4, 0)}, "alignment"),
        ({"count": 1, "tensors": text("t") + struct.pack("<I", 9) + bytes(100)}, "9 dimensions"),
        ({"count": 1, "tensors": text("t") + struct.pack("<IQIQ", 1, 2**50, 0, 0)}, "larger than the file"),
        ({"count": 2, "tensors": 2 * (text("t") + struct.pack("<IQIQ", 1, 1, 0, 0))}, "twice"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, arguments: dict[str, int], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        gguf_file.read(write(tmp_path / "m.gguf", **arguments))  # type: ignore[arg-type]


def one_tensor(tmp_path: Path, shape: tuple[int, ...], kind: int, offset: int = 0) -> gguf_file.GgufFile:
    entry = text("t") + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, offset)
    return gguf_file.read(write(tmp_path / "m.gguf", count=1, tensors=entry + bytes(200)))


def test_tensors_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="type 26"):
        gguf_tensors.open_tensors(one_tensor(tmp_path, (4,), 26), None)  # I32
    with pytest.raises(UnsupportedModelError, match="type 999"):
        gguf_tensors.open_tensors(one_tensor(tmp_path, (4,), 999), np.dtype(np.float16))
    with pytest.raises(CheckpointError, match="whole blocks of Q8_0"):
        gguf_tensors.open_tensors(one_tensor(tmp_path, (2, 33), 8), None)
    with pytest.raises(CheckpointError, match="cut short"):
        gguf_tensors.open_tensors(one_tensor(tmp_path, (2, 32), 0), np.dtype(np.float16))
    with pytest.raises(CheckpointError, match="cut short"):
        gguf_tensors.open_tensors(one_tensor(tmp_path, (4,), 0, offset=2**40), None)


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_any_damage_is_an_error_of_ours_or_does_no_harm(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp()
    path, damaged = folder / "whole.gguf", folder / "damaged.gguf"
    if not path.exists():
        tiny_gguf.save(tiny.TINY["qwen2.5-tied"], path, **{"tokenizer.ggml.merges": None})
    whole = bytearray(path.read_bytes()[:6000])
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(4, len(whole) - 1))] = data.draw(st.integers(0, 255))
    damaged.write_bytes(whole[: data.draw(st.integers(4, len(whole)))])
    with pytest.raises((CheckpointError, UnsupportedModelError)):
        gguf_tensors.open_tensors(gguf_file.read(damaged), None)
