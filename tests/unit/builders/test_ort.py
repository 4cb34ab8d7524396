"""The engine folder: reproducible, checked when opened, and refused with both values named when it was changed."""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from llmc import manifest as manifests
from llmc.builders import ort as builder
from llmc.engine import describe, open_engine
from llmc.errors import EngineError, ManifestError, UserError
from llmc.runtime import Chunk
from llmc.serve.runners import open_runner
from llmc.serve.runners.caches import HostCache

GOLDEN = Path(__file__).parents[2] / "golden"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable[[str], Path]) -> Path:
    folder = tmp_path_factory.mktemp("engines") / "qwen2.5-tied"
    builder.build(tiny_checkpoint("qwen2.5-tied"), folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_built_twice_gives_the_same_bytes(engine: Path, tmp_path: Path, tiny_checkpoint: Callable[[str], Path]) -> None:
    builder.build(tiny_checkpoint("qwen2.5-tied"), tmp_path / "again")
    assert contents(tmp_path / "again") == contents(engine)


def test_the_folder_is_all_a_server_needs(engine: Path, tiny_checkpoint: Callable[[str], Path]) -> None:
    assert set(contents(engine)) == {
        "manifest.json",
        "engine.json",
        "model.onnx",
        "weights.bin",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
    }
    manifest = manifests.read(engine, "engine")
    assert manifest.parents[0].sha256 == manifests.sha256_of(tiny_checkpoint("qwen2.5-tied") / "manifest.json")
    assert manifest.settings == {
        "max_length": 256,
        "device": "cpu",
        "kv_cache": "float32",
        "arithmetic": "int8",
    }


def test_every_node_has_a_path(engine: Path) -> None:
    model = onnx.load(engine / "model.onnx", load_external_data=False)
    nodes = [f"{node.op_type} {node.name}" for node in model.graph.node]
    assert all(" /" in node for node in nodes)
    assert nodes == (GOLDEN / "decoder_nodes.txt").read_text(encoding="utf-8").splitlines()


def test_a_tied_matrix_is_stored_once(engine: Path) -> None:
    """Embedding [320, 64] and head are the same weight, so the file is as large as the tensors of the model."""
    model = onnx.load(engine / "model.onnx", load_external_data=False)
    external = [each for each in model.graph.initializer if each.external_data]
    offsets = [int(entry.value) for each in external for entry in each.external_data if entry.key == "offset"]
    assert len(set(offsets)) == len(external) >= 20
    assert all(offset % 64 == 0 for offset in offsets)
    users = [node.name for node in model.graph.node if "embed.weight" in node.input]
    assert users == ["/embed", "/head"]


@pytest.mark.parametrize("name", ["weights.bin", "model.onnx", "engine.json", "tokenizer.json"])
def test_a_changed_byte_is_refused(name: str, tmp_path: Path, tiny_checkpoint: Callable[[str], Path]) -> None:
    folder = tmp_path / "engine"
    builder.build(tiny_checkpoint("llama"), folder)
    before = manifests.sha256_of(folder / name)
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(ManifestError) as raised:
        open_runner(folder)
    assert before in str(raised.value)
    assert manifests.sha256_of(folder / name) in str(raised.value)
    assert name in str(raised.value)


def test_another_schema_is_refused(engine: Path, tmp_path: Path) -> None:
    manifest = json.loads((engine / "manifest.json").read_text())
    manifest["schema"] = 7
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ManifestError, match=r"schema 7.*reads schema 1"):
        open_runner(tmp_path)


def test_a_checkpoint_is_not_an_engine(tiny_checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(ManifestError, match="is a checkpoint, expected an engine: make one with llmc build-engine"):
        open_engine(tiny_checkpoint("llama"))


def test_options_that_do_not_fit(tmp_path: Path, tiny_checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match=r"llmc quantize .* --kv-cache int8 --calibration"):
        builder.build(tiny_checkpoint("llama"), tmp_path / "out", kv_cache="int8")
    with pytest.raises(UserError, match="was made for 1 to 256 tokens"):
        builder.build(tiny_checkpoint("llama"), tmp_path / "out", max_length=257)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_build_leaves_nothing(tmp_path: Path, tiny_checkpoint: Callable[[str], Path]) -> None:
    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        builder.build(tiny_checkpoint("llama"), tmp_path / "out", progress=interrupt)
    assert not list(tmp_path.iterdir())


def test_limits_follow_from_the_options(engine: Path) -> None:
    runner = open_runner(engine, threads=1, max_sequences=3, cache_tokens=100)
    assert (runner.limits.max_sequences, runner.limits.max_length, runner.limits.cache_tokens) == (3, 256, 100)
    runner.close()


def test_the_cache_s_memory_is_bounded_and_known(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One slot after another holds a long sequence; what they leave behind is given back to the system."""
    spec = open_engine(engine).spec
    token_bytes = 2 * 4 * spec.num_layers * spec.attention.num_kv_heads * spec.attention.head_dim
    runner = open_runner(engine, threads=1, max_sequences=3, cache_gib=300.5 * token_bytes / 2**30)
    assert (runner.limits.cache_tokens, runner.limits.token_bytes) == (300, token_bytes)
    assert runner.limits.cache_bytes == 300 * token_bytes
    dropped: list[tuple[int, int]] = []
    monkeypatch.setattr(runner._cache, "drop", lambda slot, keep: dropped.append((slot, keep)))  # type: ignore[attr-defined]
    for number in range(2):
        runner.claim(number, np.arange(200) + number)
        runner.step([Chunk(number, 0, np.arange(200) + number)])
        runner.free(number)
    assert dropped == [(0, 0)]
    runner.close()
    with pytest.raises(UserError, match=r"holds 255 tokens, but .* may have 256: give it at least"):
        open_runner(engine, threads=1, cache_gib=255 * token_bytes / 2**30)


def test_memory_behind_what_is_kept_is_given_back(engine: Path) -> None:
    """Whole pages behind the kept tokens read as zero again, and no other byte changes."""
    cache = HostCache(describe(engine).model_copy(update={"max_length": 4096}), slots=3)
    for array in cache.arrays.values():
        array[:] = 1
    cache.drop(1, 100)
    page_tokens = mmap.PAGESIZE // (cache.dtype.itemsize * cache.shape[3])
    assert cache.shape[2] > 10 * page_tokens
    for array in cache.arrays.values():
        assert (array[[0, 2]] == 1).all()
        assert (array[1, :, :100] == 1).all()
        assert (array[1, :, 100 + page_tokens : -page_tokens] == 0).all()
    cache.drop(1, 0)
    for array in cache.arrays.values():
        assert (array[[0, 2]] == 1).all()
        assert (array[1, :, page_tokens:-page_tokens] == 0).all()


def test_a_failed_step_is_an_engine_error_and_the_next_one_works(engine: Path) -> None:
    runner = open_runner(engine, threads=1, max_sequences=2)
    tokens = np.array([5, 6, 7])
    runner.claim(1, tokens)
    with pytest.raises(EngineError, match="ONNX Runtime failed"):
        runner.step([Chunk(1, 0, np.array([5, 320_000]))])
    (after,) = runner.step([Chunk(1, 0, tokens)])
    runner.free(1)
    runner.claim(2, np.array([9, 5, 6, 7]))
    runner.free(2)
    runner.claim(3, tokens)
    (again,) = runner.step([Chunk(3, 2, tokens[2:])])
    np.testing.assert_allclose(again, after, atol=1e-5)
    runner.close()


@pytest.mark.parametrize("bad", [Chunk(2, 5, np.array([5])), Chunk(9, 0, np.array([5]))], ids=["gap", "unclaimed"])
def test_a_wrong_chunk_leaves_the_others_as_they_were(engine: Path, bad: Chunk) -> None:
    """Tokens that were announced, but never computed, are nothing that a later sequence could reuse."""
    runner = open_runner(engine, threads=1, max_sequences=3)
    tokens = np.array([5, 6, 7, 8])
    for each in (1, 2):
        runner.claim(each, tokens)
    with pytest.raises(EngineError, match=r"^sequence \d.*(do not continue|never claimed)"):
        runner.step([Chunk(1, 0, tokens), bad])
    assert runner.claim(3, tokens) == 0
    (after,) = runner.step([Chunk(1, 0, tokens)])
    assert np.isfinite(after).all()
    runner.close()
