"""safetensors files, read and written one tensor at a time.

The safetensors package writes a file from tensors that are all in memory, and reads through a memory map whose pages
count as the process's own. A stage that must never hold more than its largest tensor needs neither, so these are the
format's own rules: u64 length of the header, a JSON header, the data. Tests compare both ways with the package.

Knows the format and its dangers (a header is a stranger's). Does not know what a tensor means.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from llmc.errors import CheckpointError

Array = npt.NDArray[Any]

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000  # the limit of the safetensors package
_ALIGNMENT = 64  # of the data's beginning: a cache line, so that a runtime may map the file and use it in place


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a header says of a tensor: dtype, shape, and for one in a file where its bytes lie."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    path: Path = Path()
    offset: int = 0

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """All tensors of a file.

    Raises:
        CheckpointError: The file cannot be read, or its header contradicts itself or the file's size.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else _MAX_HEADER + 1
            if length > min(_MAX_HEADER, size - 8):
                raise CheckpointError(f"{path} is not a safetensors file, or is cut short ({size} bytes)")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        found = {name: _entry(path, 8 + length, entry) for name, entry in header.items()}
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} has an unreadable safetensors header: {error}") from None
    for name, info in found.items():
        if info.offset + info.nbytes > size:
            raise CheckpointError(f"{path} is cut short: '{name}' ends past the file's {size} bytes")
    return found


def _entry(path: Path, data_start: int, entry: Mapping[str, Any]) -> TensorInfo:
    begin, end = (int(value) for value in entry["data_offsets"])
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"dtype {entry['dtype']!r} is not known")
    info = TensorInfo(DTYPES[entry["dtype"]], tuple(int(n) for n in entry["shape"]), path, data_start + begin)
    if begin < 0 or any(n < 0 for n in info.shape) or end - begin != info.nbytes:
        raise ValueError(f"offsets {begin}..{end} do not fit {entry['dtype']} {list(info.shape)}")
    return info


def read_tensor(info: TensorInfo) -> Array:
    """The tensor's values, in memory of their own (not mapped)."""
    values = np.empty(info.shape, info.dtype)
    if not values.nbytes:
        return values
    with info.path.open("rb", buffering=0) as file:
        file.seek(info.offset)
        raw = values.reshape(-1).view(np.uint8)
        done = 0
        while done < len(raw):
            count = file.readinto(raw[done:].data)
            if not count:
                raise CheckpointError(f"{info.path} is cut short at byte {info.offset + done}")
            done += count
    return values


class SafetensorsWriter:
    """Writes a file whose header is decided first and whose tensors come one by one, in that order.

    Use as a context manager; leaving it before every tensor was written is an error. The file is hashed on the way,
    beside the writing: to read it again for that would cost as much as to write it.
    """

    def __init__(self, path: Path, plan: Mapping[str, TensorInfo], metadata: Mapping[str, str] | None = None) -> None:
        self.path = path
        self.infos: dict[str, TensorInfo] = {}
        header: dict[str, Any] = {"__metadata__": dict(metadata or {})}
        offset = 0
        for name, info in plan.items():
            header[name] = {
                "dtype": _CODES[np.dtype(info.dtype)],
                "shape": list(info.shape),
                "data_offsets": [offset, offset + info.nbytes],
            }
            self.infos[name] = TensorInfo(np.dtype(info.dtype), info.shape, path, offset)
            offset += info.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % _ALIGNMENT)
        start = 8 + len(text)
        self.infos = {
            name: TensorInfo(info.dtype, info.shape, path, info.offset + start) for name, info in self.infos.items()
        }
        self._waiting = list(plan)[::-1]
        self._digest = hashlib.sha256()
        self._hasher = ThreadPoolExecutor(max_workers=1)
        self._file = path.open("wb")
        self._append(np.frombuffer(struct.pack("<Q", len(text)) + text, np.uint8))

    def write(self, name: str, values: Array) -> None:
        """Append the next tensor; its name, dtype and shape are those of the plan."""
        if not self._waiting or self._waiting[-1] != name:
            expected = self._waiting[-1] if self._waiting else "nothing more"
            raise CheckpointError(f"{self.path}: '{name}' was written where the plan has '{expected}'")
        info = self.infos[name]
        if values.dtype != info.dtype or values.shape != info.shape:
            raise CheckpointError(
                f"{self.path}: '{name}' is {values.dtype} {list(values.shape)}, "
                f"the plan says {info.dtype} {list(info.shape)}"
            )
        self._waiting.pop()
        self._append(np.ascontiguousarray(values).reshape(-1).view(np.uint8))

    def _append(self, raw: Array) -> None:
        hashed = self._hasher.submit(self._digest.update, raw.data)
        self._file.write(raw.data)
        hashed.result()

    @property
    def sha256(self) -> str:
        """Hex digest of what was written."""
        return self._digest.hexdigest()

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._file.close()
        self._hasher.shutdown()
        if kind is None and self._waiting:
            raise CheckpointError(f"{self.path}: '{self._waiting[-1]}' of the plan was never written")


def shard(plan: Mapping[str, TensorInfo], max_bytes: int) -> list[dict[str, TensorInfo]]:
    """Cut a plan into consecutive pieces of at most `max_bytes`, or of one tensor larger than that."""
    shards: list[dict[str, TensorInfo]] = [{}]
    used = 0
    for name, info in plan.items():
        if shards[-1] and used + info.nbytes > max_bytes:
            shards.append({})
            used = 0
        shards[-1][name] = info
        used += info.nbytes
    return shards


def write_sharded(
    folder: Path,
    plan: Mapping[str, TensorInfo],
    values: Iterable[tuple[str, Array]],
    *,
    max_bytes: int,
    layout: str = "pt",
) -> dict[str, str]:
    """Write `model.safetensors`, or `model-0000i-of-0000n.safetensors` with Hugging Face's index beside them.

    Args:
        values: (name, tensor) in the order of the plan; each is let go before the next is asked for.
        layout: What the header says to loaders of whose kind the tensors are ("pt": PyTorch's).

    Returns:
        sha256 of each file of tensors, by its name.
    """
    shards = shard(plan, max_bytes)
    names = [
        "model.safetensors" if len(shards) == 1 else f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
        for index in range(len(shards))
    ]
    stream = iter(values)
    hashes = {}
    for name, part in zip(names, shards, strict=True):
        with SafetensorsWriter(folder / name, part, {"format": layout}) as writer:
            for _ in part:
                try:
                    tensor_name, tensor = next(stream)
                except StopIteration:
                    break
                writer.write(tensor_name, tensor)
                del tensor
        hashes[name] = writer.sha256
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(info.nbytes for info in plan.values())},
            "weight_map": {tensor: name for name, part in zip(names, shards, strict=True) for tensor in part},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return hashes


def read_folder(folder: Path) -> dict[str, TensorInfo]:
    """All tensors of a folder with `model.safetensors`, or with an index and its shards.

    Raises:
        CheckpointError: Neither is there, a shard is missing or damaged, the index names a tensor that its shard
            lacks, or a shard's name leads out of the folder.
    """
    index_path = folder / "model.safetensors.index.json"
    if not index_path.is_file():
        return read_header(folder / "model.safetensors")
    try:
        weight_map: dict[str, str] = json.loads(index_path.read_text(encoding="utf-8"))["weight_map"]
        shard_names = sorted(set(weight_map.values()))
    except (KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{index_path} is not a safetensors index: it has no 'weight_map'") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{index_path} is not a safetensors index: {error}") from None
    found: dict[str, TensorInfo] = {}
    for name in shard_names:
        if Path(name).name != name:
            raise CheckpointError(f"{index_path} names the shard '{name}', which is not a plain file name")
        header = read_header(folder / name)
        found |= {tensor: info for tensor, info in header.items() if weight_map.get(tensor) == name}
    for tensor, name in weight_map.items():
        if tensor not in found:
            raise CheckpointError(f"{index_path} says that '{tensor}' is in {name}, which does not hold it")
    return found
