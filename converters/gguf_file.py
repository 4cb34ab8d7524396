"""GGUF files: the metadata, and where each tensor lies. (ggml's docs/gguf.md has the format.)

The gguf package has a reader, too; it keeps an array object for every string of the vocabulary, which for 150,000
tokens costs half a gigabyte and seconds. This one reads a file from front to back into plain values, and checks every
length against the file's size before it believes it, for the file is a stranger's. Tests compare the two.

Knows the container. Does not know what a key or a tensor means, nor how a block of a quantized type is laid out.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from llmc.errors import CheckpointError

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32  # of the tensors' data, unless general.alignment says otherwise

_STRING, _ARRAY, _BOOL = 8, 9, 7
_NUMBERS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "<u1",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as the file lists it.

    Attributes:
        shape: Rows first, as numpy has it (the file lists the innermost first).
        kind: Number of the ggml type.
        offset: Of its first byte in the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True, slots=True)
class GgufFile:
    """An opened file's contents, without the tensors' data."""

    path: Path
    size: int
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]


def read(path: Path) -> GgufFile:
    """Read everything but the tensors' data.

    Raises:
        CheckpointError: It is not a GGUF file of version 2 or 3, is cut short, or contradicts itself.
    """
    try:
        with path.open("rb") as file:
            return _Reader(file, path).read()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is damaged: a name in it is not UTF-8: {error}") from None


class _Reader:
    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path = file, path
        self.size = os.fstat(file.fileno()).st_size

    def read(self) -> GgufFile:
        if self.bytes(4) != MAGIC:
            raise CheckpointError(f"{self.path} is not a GGUF file")
        version = self.number("<I")
        if version not in _VERSIONS:
            raise CheckpointError(f"{self.path} is GGUF version {version}; llmc reads versions 2 and 3, little-endian")
        num_tensors, num_keys = self.count(1), self.count(1)
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self.string()
            metadata[key] = self.value(self.number("<I"))
        listed = [self.tensor() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise CheckpointError(f"{self.path}: general.alignment is {alignment!r}")
        start = -(-self.file.tell() // alignment) * alignment
        tensors = {item.name: StoredTensor(item.name, item.shape, item.kind, start + item.offset) for item in listed}
        if len(tensors) != num_tensors:
            raise CheckpointError(f"{self.path} lists a tensor twice")
        return GgufFile(self.path, self.size, metadata, tensors)

    def bytes(self, count: int) -> bytes:
        found = self.file.read(count)
        if len(found) != count:
            raise CheckpointError(f"{self.path} is cut short at byte {self.file.tell()}")
        return found

    def number(self, code: str) -> int:
        value: int = struct.unpack(code, self.bytes(struct.calcsize(code)))[0]
        return value

    def count(self, item_bytes: int) -> int:
        """How many things follow, each of at least so many bytes."""
        count = self.number("<Q")
        if count * item_bytes > self.size - self.file.tell():
            raise CheckpointError(f"{self.path} is damaged: {count} items are said to follow byte {self.file.tell()}")
        return count

    def string(self) -> str:
        return self.bytes(self.count(1)).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array(self.number("<I"))
        if kind not in _NUMBERS:
            raise CheckpointError(f"{self.path} is damaged: a value of type {kind} at byte {self.file.tell()}")
        dtype = np.dtype(_NUMBERS[kind])
        number = np.frombuffer(self.bytes(dtype.itemsize), dtype)[0].item()
        return bool(number) if kind == _BOOL else number

    def array(self, kind: int) -> list[Any]:
        if kind == _STRING:
            return [self.string() for _ in range(self.count(8))]
        if kind not in _NUMBERS:
            raise CheckpointError(f"{self.path} is damaged: an array of type {kind} at byte {self.file.tell()}")
        dtype = np.dtype(_NUMBERS[kind])
        numbers: list[Any] = np.frombuffer(self.bytes(self.count(dtype.itemsize) * dtype.itemsize), dtype).tolist()
        return [bool(number) for number in numbers] if kind == _BOOL else numbers

    def tensor(self) -> StoredTensor:
        name = self.string()
        num_dimensions = self.number("<I")
        if num_dimensions > 4:
            raise CheckpointError(f"{self.path} is damaged: '{name}' has {num_dimensions} dimensions")
        shape = tuple(self.number("<Q") for _ in range(num_dimensions))[::-1]
        kind, offset = self.number("<I"), self.number("<Q")
        if math.prod(shape) > 8 * self.size:
            raise CheckpointError(f"{self.path} is damaged: '{name}' {list(shape)} is larger than the file")
        return StoredTensor(name, shape, kind, offset)
