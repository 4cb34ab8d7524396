"""Tokens on disk: what is written is read, in the layout that the format's authors describe."""

from __future__ import annotations

import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmc.errors import ArtifactError
from llmc.trainers.data import indexed


@given(
    documents=st.lists(st.lists(st.integers(0, 60_000), min_size=1, max_size=20), max_size=10),
    vocab_size=st.sampled_from([60_001, 100_000]),
)
def test_round_trip(documents: list[list[int]], vocab_size: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train"
        assert indexed.write(path, documents, vocab_size=vocab_size) == sum(map(len, documents))
        tokens = indexed.Tokens(path)
        assert tokens.values.dtype == (np.uint16 if vocab_size < 65_500 else np.int32)
        met = [tokens.values[a:b].tolist() for a, b in zip(tokens.starts[:-1], tokens.starts[1:], strict=True)]
        assert met == documents


def test_layout(tmp_path: Path) -> None:
    indexed.write(tmp_path / "x", [[1, 2, 3], [4]], vocab_size=300)
    raw = (tmp_path / "x.idx").read_bytes()
    assert raw[:9] == b"MMIDIDX\0\0"
    assert struct.unpack_from("<QBQQ", raw, 9) == (1, 8, 2, 3)
    assert struct.unpack_from("<2i2q3q", raw, 34) == (3, 1, 0, 6, 0, 1, 2)
    assert len(raw) == 34 + 2 * 4 + 2 * 8 + 3 * 8
    assert (tmp_path / "x.bin").read_bytes() == struct.pack("<4H", 1, 2, 3, 4)


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("x.idx", lambda raw: raw[:20], "cannot read"),
        ("x.idx", lambda raw: b"X" + raw[1:], "not a token index"),
        ("x.idx", lambda raw: raw[:-40], "cut short"),
        ("x.bin", lambda raw: raw[:-1], "its index says 4 tokens"),
    ],
)
def test_damage_is_refused(tmp_path: Path, name: str, damage: object, words: str) -> None:
    indexed.write(tmp_path / "x", [[1, 2, 3], [4]], vocab_size=300)
    path = tmp_path / name
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(ArtifactError, match=words):
        indexed.Tokens(tmp_path / "x")
