from __future__ import annotations

import hashlib
import json
import stat
from pathlib import Path

import pytest

import llmc
from llmc import manifest as manifests
from llmc.errors import ManifestError, UserError
from llmc.manifest import Manifest, Parent

PLAIN = Manifest(kind="checkpoint", tools={"llmc": "0"})


def make(folder: Path, text: str = "hello", *, kind: str = "checkpoint", overwrite: bool = False) -> Manifest:
    with manifests.creating(folder, overwrite=overwrite) as work:
        (work / "sub").mkdir()
        (work / "sub" / "file.txt").write_text(text, encoding="utf-8")
        (work / "other").write_bytes(b"\0" * 5_000_000)
        return manifests.seal(work, PLAIN.model_copy(update={"kind": kind}))


def test_a_sealed_folder_lists_every_file_with_its_hash(tmp_path: Path) -> None:
    sealed = make(tmp_path / "a")
    assert sealed == manifests.read(tmp_path / "a", "checkpoint")
    assert set(sealed.files) == {"sub/file.txt", "other"}
    assert sealed.files["sub/file.txt"].sha256 == hashlib.sha256(b"hello").hexdigest()
    assert sealed.files["other"].bytes == 5_000_000
    assert sealed.files["other"].sha256 == hashlib.sha256(bytes(5_000_000)).hexdigest()
    manifests.verify(tmp_path / "a", sealed)


def test_a_known_hash_is_taken_and_the_file_not_read(tmp_path: Path) -> None:
    with manifests.creating(tmp_path / "a") as work:
        (work / "one").write_bytes(b"one")
        (work / "two").write_bytes(b"two")
        sealed = manifests.seal(work, PLAIN, {"one": "0" * 64})
    assert sealed.files["one"].sha256 == "0" * 64
    assert sealed.files["two"].sha256 == hashlib.sha256(b"two").hexdigest()


def test_the_same_contents_give_the_same_manifest_wherever_they_are(tmp_path: Path) -> None:
    make(tmp_path / "a")
    make(tmp_path / "deep" / "b")
    assert (tmp_path / "a/manifest.json").read_bytes() == (tmp_path / "deep/b/manifest.json").read_bytes()
    assert str(tmp_path) not in (tmp_path / "a/manifest.json").read_text(encoding="utf-8")


def test_a_changed_byte_is_named_with_both_hashes(tmp_path: Path) -> None:
    sealed = make(tmp_path / "a")
    (tmp_path / "a/sub/file.txt").write_text("jello", encoding="utf-8")
    with pytest.raises(ManifestError) as caught:
        manifests.verify(tmp_path / "a", sealed)
    for part in ("sub/file.txt", hashlib.sha256(b"jello").hexdigest(), hashlib.sha256(b"hello").hexdigest()):
        assert part in str(caught.value)


def test_another_size_and_a_missing_file_are_named(tmp_path: Path) -> None:
    sealed = make(tmp_path / "a")
    (tmp_path / "a/sub/file.txt").write_text("hello!", encoding="utf-8")
    with pytest.raises(ManifestError, match=r"file\.txt was changed: 6 bytes, the manifest says 5"):
        manifests.verify(tmp_path / "a", sealed)
    (tmp_path / "a/sub/file.txt").unlink()
    with pytest.raises(ManifestError, match=r"sub/file\.txt is missing"):
        manifests.verify(tmp_path / "a", sealed)


def edit(folder: Path, **changes: object) -> None:
    path = folder / manifests.NAME
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


@pytest.mark.parametrize("more", [{}, {"a_new_field": 1}, {"kind": "spaceship"}, {"files": 3}])
def test_another_schema_is_refused_with_both_numbers(tmp_path: Path, more: dict[str, object]) -> None:
    make(tmp_path / "a")
    edit(tmp_path / "a", schema=7, **more)
    with pytest.raises(ManifestError, match=f"schema 7.*reads schema {manifests.SCHEMA}"):
        manifests.read(tmp_path / "a")


def test_an_unknown_field_of_our_own_schema_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "a")
    edit(tmp_path / "a", setings={})
    with pytest.raises(ManifestError, match="did you mean 'settings'"):
        manifests.read(tmp_path / "a")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"kind": "engine"}'])
def test_a_malformed_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / manifests.NAME).write_text(text, encoding="utf-8")
    with pytest.raises(ManifestError, match=r"manifest\.json"):
        manifests.read(tmp_path)


@pytest.mark.parametrize("kind", manifests.MADE_BY)
def test_another_kind_is_refused_with_the_command_that_makes_the_right_one(tmp_path: Path, kind: str) -> None:
    make(tmp_path / "a", kind="run" if kind != "run" else "engine")
    with pytest.raises(ManifestError) as caught:
        manifests.read(tmp_path / "a", kind)  # type: ignore[arg-type]
    assert manifests.MADE_BY[kind] in str(caught.value)
    assert ("an engine" if kind == "run" else "a training run") in str(caught.value)


def test_kinds_and_their_makers_agree() -> None:
    from typing import get_args

    assert set(manifests.MADE_BY) == set(get_args(manifests.Kind))


def test_what_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail() -> None:
        with manifests.creating(tmp_path / "a") as work:
            (work / "half").write_text("x", encoding="utf-8")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_nothing_stands_at_the_target_until_the_end(tmp_path: Path) -> None:
    with manifests.creating(tmp_path / "a") as work:
        assert work.parent == tmp_path
        assert not (tmp_path / "a").exists()
        manifests.seal(work, PLAIN)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_an_existing_folder_is_kept_unless_told_otherwise_and_until_the_new_one_is_whole(tmp_path: Path) -> None:
    make(tmp_path / "a", "old")
    with pytest.raises(UserError, match="--overwrite"):
        make(tmp_path / "a", "new")

    def fail() -> None:
        with manifests.creating(tmp_path / "a", overwrite=True):
            assert (tmp_path / "a/sub/file.txt").read_text(encoding="utf-8") == "old"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (tmp_path / "a/sub/file.txt").read_text(encoding="utf-8") == "old"
    make(tmp_path / "a", "new", overwrite=True)
    assert (tmp_path / "a/sub/file.txt").read_text(encoding="utf-8") == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_what_llmc_did_not_make_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years", encoding="utf-8")
    (tmp_path / "file").write_text("x", encoding="utf-8")
    for target in ("home", "file"):
        with pytest.raises(UserError, match="not made by llmc"):
            make(tmp_path / target, overwrite=True)
    assert (tmp_path / "home" / "thesis.txt").read_text(encoding="utf-8") == "years"


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    make(tmp_path / "a")
    assert (tmp_path / "a" / manifests.NAME).is_file()


def test_a_folder_has_the_usual_permissions(tmp_path: Path) -> None:
    make(tmp_path / "a")
    (tmp_path / "b").mkdir()
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == stat.S_IMODE((tmp_path / "b").stat().st_mode)


def test_a_parent_is_known_by_its_manifest(tmp_path: Path) -> None:
    make(tmp_path / "a")
    found = manifests.parent(tmp_path / "a")
    sha256 = hashlib.sha256((tmp_path / "a/manifest.json").read_bytes()).hexdigest()
    assert found == Parent(kind="checkpoint", sha256=sha256, name="a")
    child = PLAIN.model_copy(update={"parents": (found,)})
    assert list(manifests.lineage(child)) == [f"checkpoint a {sha256[:12]}"]


def test_tools_are_versions() -> None:
    import numpy

    found = manifests.tools("numpy")
    assert found["llmc"] == llmc.__version__
    assert found["numpy"] == numpy.__version__
