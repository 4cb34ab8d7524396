"""Finding text files, and holding some of them out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmc.errors import UserError
from llmc.trainers.config import Data
from llmc.trainers.data import text
from llmc.trainers.data.text import TextFile


def data(*paths: object, **settings: Any) -> Data:
    return Data(paths=tuple(map(str, paths)), **settings)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in {
        "a.txt": "alpha",
        "b.md": "beta",
        "c.py": "gamma",
        "deep/d.txt": "delta",
        "deep/test/e.txt": "epsilon",
        "empty.txt": "",
        "z_copy_of_a.txt": "alpha",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    return tmp_path


def names(files: list[TextFile]) -> list[str]:
    return [file.path.name for file in files]


def test_a_folder_is_searched_by_suffix_without_copies_and_empty_files(folder: Path) -> None:
    assert names(text.find(data(folder))) == ["a.txt", "b.md", "d.txt", "e.txt"]
    assert names(text.find(data(folder, suffixes=(".py",)))) == ["c.py"]
    assert names(text.find(data(folder, suffixes=()))) == ["a.txt", "b.md", "c.py", "d.txt", "e.txt"]


def test_exclude_works_on_names_below_the_folder_only(folder: Path) -> None:
    assert names(text.find(data(folder, exclude=("test", "b*")))) == ["a.txt", "d.txt"]
    assert names(text.find(data(folder / "deep" / "test", exclude=("test",)))) == ["e.txt"]


def test_a_file_is_taken_whatever_its_suffix_and_a_glob_by_it(folder: Path) -> None:
    assert names(text.find(data(folder / "c.py"))) == ["c.py"]
    assert names(text.find(data(folder / "**" / "*.txt"))) == ["a.txt", "d.txt", "e.txt"]
    assert names(text.find(data(folder / "c.py", folder / "*.txt"))) == ["c.py", "a.txt"]


@pytest.mark.parametrize("path", ["nowhere", "nowhere/*.txt", "a.txt/b"])
def test_a_path_to_nothing_is_named(folder: Path, path: str) -> None:
    with pytest.raises(UserError, match=r"nowhere|a\.txt/b"):
        text.find(data(folder / path))


def test_a_folder_without_such_files_says_which_it_wanted(folder: Path) -> None:
    with pytest.raises(UserError, match=r"no file with a suffix of \.rst"):
        text.find(data(folder, suffixes=(".rst",)))


def test_text_that_is_not_utf8_is_named_or_skipped(folder: Path) -> None:
    (folder / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.txt is not UTF-8 text \(byte 3"):
        text.find(data(folder))
    assert "latin.txt" not in names(text.find(data(folder, undecodable="skip")))


def test_bytes_are_kept_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "dos.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r")
    (file,) = text.find(data(tmp_path))
    assert file.read().encode() == b"\xef\xbb\xbfone\r\ntwo\r"


@given(
    sizes=st.lists(st.integers(1, 1000), min_size=2, max_size=30),
    fraction=st.floats(0.001, 0.5),
    seed=st.integers(0, 5),
)
def test_split_divides_whole_files_and_keeps_both_sides(sizes: list[int], fraction: float, seed: int) -> None:
    files = [TextFile(Path(f"{index}"), f"{index:064}", size) for index, size in enumerate(sizes)]
    trained, held_out = text.split(files, fraction, seed)
    assert trained
    assert held_out
    assert sorted(trained + held_out, key=lambda file: file.sha256) == files
    held = sum(file.size for file in held_out)
    assert len(trained) == 1 or held >= fraction * sum(sizes)
    assert held - max(file.size for file in held_out) < fraction * sum(sizes)
    assert (trained, held_out) == text.split(files, fraction, seed)


def test_one_file_cannot_be_held_out(folder: Path) -> None:
    files = text.find(data(folder / "a.txt"))
    with pytest.raises(UserError, match="held_out_fraction = 0"):
        text.split(files, 0.1, 0)
    assert text.split(files, 0, 0) == (files, [])
