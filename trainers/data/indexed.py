"""Tokens on disk: `NAME.bin` holds them one after another, `NAME.idx` says where each document lies.

The layout is Megatron-LM's MMapIndexedDataset, version 1 (megatron/core/datasets/indexed_dataset.py), little-endian:

    idx = "MMIDIDX\\0\\0" | u64 version 1 | u8 dtype code | u64 sequences | u64 documents + 1
          | i32 sizes [sequences] | i64 byte offsets [sequences] | i64 document starts [documents + 1]

Here a sequence is a document. Reading maps the file: memory holds only what is touched.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmc.errors import ArtifactError

_MAGIC = b"MMIDIDX\x00\x00"
_HEAD = struct.Struct("<9sQBQQ")
_CODES: dict[int, npt.DTypeLike] = {4: np.int32, 8: np.uint16}
_UINT16_WORDS = 65_500  # Megatron-LM's own limit for two-byte tokens


def write(path: Path, documents: Iterable[Sequence[int]], *, vocab_size: int) -> int:
    """Write `path`.bin and `path`.idx; one document is in memory at a time.

    Returns:
        Tokens written.
    """
    code = 8 if vocab_size < _UINT16_WORDS else 4
    dtype = np.dtype(_CODES[code])
    sizes = []
    with path.with_suffix(".bin").open("wb") as file:
        for document in documents:
            file.write(np.asarray(document, dtype=dtype).tobytes())
            sizes.append(len(document))
    starts = np.cumsum([0, *sizes], dtype=np.int64)
    with path.with_suffix(".idx").open("wb") as file:
        file.write(_HEAD.pack(_MAGIC, 1, code, len(sizes), len(sizes) + 1))
        file.write(np.asarray(sizes, dtype=np.int32).tobytes())
        file.write((starts[:-1] * dtype.itemsize).tobytes())
        file.write(np.arange(len(sizes) + 1, dtype=np.int64).tobytes())
    return int(starts[-1])


class Tokens:
    """A written pair, opened.

    Attributes:
        values: [tokens], mapped, of uint16 or int32.
        starts: int64 [documents + 1], where each document begins in `values`; the last is the number of tokens.
    """

    def __init__(self, path: Path) -> None:
        """Open `path`.bin and `path`.idx.

        Raises:
            ArtifactError: They are missing, of another format, or do not belong together.
        """
        try:
            raw = path.with_suffix(".idx").read_bytes()
            magic, version, code, count, _ = _HEAD.unpack_from(raw)
        except (OSError, struct.error) as error:
            raise ArtifactError(f"cannot read the token index {path.with_suffix('.idx')}: {error}") from None
        if magic != _MAGIC or version != 1 or code not in _CODES:
            raise ArtifactError(f"{path.with_suffix('.idx')} is not a token index of version 1 with 2 or 4 byte tokens")
        if len(raw) != _HEAD.size + count * (4 + 8 + 8) + 8:
            raise ArtifactError(f"{path.with_suffix('.idx')} is cut short: {len(raw)} bytes for {count} documents")
        dtype = np.dtype(_CODES[code])
        sizes = np.frombuffer(raw, np.int32, count, _HEAD.size)
        self.starts: npt.NDArray[np.int64] = np.cumsum(np.concatenate([[0], sizes]), dtype=np.int64)
        size = path.with_suffix(".bin").stat().st_size
        if size != self.starts[-1] * dtype.itemsize:
            raise ArtifactError(f"{path.with_suffix('.bin')} has {size} bytes, its index says {self.starts[-1]} tokens")
        self.values: npt.NDArray[Any] = (
            np.memmap(path.with_suffix(".bin"), dtype, "r") if size else np.empty(0, dtype)  # an empty map is refused
        )

    def __len__(self) -> int:
        return int(self.starts[-1])
