"""Both caches: what a slot table asks of them, what a binding sees, and engines that keep their keys on a device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import tiny
from devices import cpu_as_a_device, cuda_on_the_cpu
from onnx import TensorProto, helper

from llmc.builders import ort as builder
from llmc.errors import EngineError
from llmc.runtime import Chunk
from llmc.serve.runners import open_runner
from llmc.serve.runners.caches import DeviceCache, HostCache, host_memory

SLOTS, HEADS, LENGTH, WIDTH = 4, 2, 10, 8


def make(kind: str, kv_cache: str = "float32") -> Any:
    attention = SimpleNamespace(num_kv_heads=HEADS, head_dim=WIDTH)
    engine: Any = SimpleNamespace(
        spec=SimpleNamespace(num_layers=2, attention=attention), max_length=LENGTH, kv_cache=kv_cache
    )
    return HostCache(engine, SLOTS) if kind == "host" else DeviceCache(engine, SLOTS, "cpu")


def arrays(cache: Any) -> dict[str, np.ndarray]:
    """The cache's memory itself."""
    if isinstance(cache, HostCache):
        return cache.arrays
    return {name: tensor.numpy() for name, tensor in cache.tensors.items()}


def filled(kind: str, kv_cache: str) -> tuple[Any, dict[str, np.ndarray]]:
    """A cache full of different numbers, and a copy of them."""
    cache, rng = make(kind, kv_cache), np.random.default_rng(0)
    for array in arrays(cache).values():
        array[:] = rng.integers(-99, 99, array.shape)
    return cache, {name: array.copy() for name, array in arrays(cache).items()}


@pytest.mark.parametrize("kv_cache", ["float32", "float16", "int8"])
@pytest.mark.parametrize("kind", ["host", "device"])
def test_copied_and_exchanged(kind: str, kv_cache: str) -> None:
    cache, before = filled(kind, kv_cache)
    assert sorted(before) == ["0.key", "0.value", "1.key", "1.value"]
    assert all(array.dtype == kv_cache and array.shape == (SLOTS, HEADS, LENGTH, WIDTH) for array in before.values())
    cache.copy(0, 2, 7)
    cache.exchange(1, 3, 4, 9)
    for name, array in arrays(cache).items():
        wanted = before[name].copy()
        wanted[2, :, :7] = before[name][0, :, :7]
        wanted[1, :, :9], wanted[3, :, :4] = before[name][3, :, :9], before[name][1, :, :4]
        np.testing.assert_array_equal(array, wanted)
    cache.drop(1, 9)
    for name, array in arrays(cache).items():
        np.testing.assert_array_equal(array[1, :, :9], before[name][3, :, :9])


@pytest.mark.parametrize("kv_cache", ["float32", "float16", "int8"])
@pytest.mark.parametrize("kind", ["host", "device"])
def test_a_binding_reads_and_writes_the_slots_themselves(kind: str, kv_cache: str) -> None:
    """A graph that gives each past as the other's present."""
    element = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "int8": TensorProto.INT8}[kv_cache]
    cache, before = filled(kind, kv_cache)
    value, shape = helper.make_tensor_value_info, ["slots", HEADS, LENGTH, WIDTH]
    nodes = [
        helper.make_node("Identity", [f"past.{name}"], [f"present.{name[:2]}{other}"])
        for name in before
        for other in {"key", "value"} - {name[2:]}
    ]
    inputs, outputs = ([value(f"{side}.{name}", element, shape) for name in before] for side in ("past", "present"))
    graph = helper.make_graph(nodes, "swap", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    # Where past and present are one memory, as here, who writes first wins: only the slots that are bound change.
    binding = session.io_binding()
    keep = cache.bind(binding, 1, 2)
    session.run_with_iobinding(binding)
    del keep
    for layer in "01":
        key, other = (arrays(cache)[f"{layer}.{kind}"] for kind in ("key", "value"))
        old = [before[f"{layer}.{kind}"] for kind in ("key", "value")]
        for now, then in zip((key, other), old, strict=True):
            np.testing.assert_array_equal(now[[0, 3]], then[[0, 3]])
        np.testing.assert_array_equal(key[1:3], other[1:3])
        assert any(np.array_equal(key[1:3], then[1:3]) for then in old)


def test_of_a_device_all_slots_must_fit_from_the_start(
    tmp_path: Path, tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda_on_the_cpu(monkeypatch)
    engine = builder.build(tiny_checkpoint("llama"), tmp_path / "engine", max_length=64, device="cuda")
    floats = engine.spec.num_layers * 2 * engine.spec.attention.num_kv_heads * engine.spec.attention.head_dim
    assert engine.cache_token_bytes == 2 * floats
    runner = open_runner(tmp_path / "engine", threads=1, cache_tokens=64 * 3 + 63)
    assert (runner.limits.max_sequences, runner.limits.cache_tokens) == (3, 64 * 3)
    assert runner._cache.shape[0] == 3  # type: ignore[attr-defined]
    runner.close()
    runner = open_runner(tmp_path / "engine", threads=1)
    assert runner.limits.max_sequences == 16
    runner.close()
    with pytest.raises(EngineError, match=r"room for 64 tokens.* 4 of them do not fit .* 255 tokens.*--max-sequences"):
        open_runner(tmp_path / "engine", threads=1, max_sequences=4, cache_tokens=255)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("name", ["llama", "mistral-window", "bloom"])
def test_slots_move_and_lend_on_a_device_as_on_the_host(
    name: str,
    deterministic: bool,
    tmp_path: Path,
    tiny_checkpoint: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same engine, float32 both times, the same logits to the last bit, whatever is claimed, shared and freed."""
    builder.build(tiny_checkpoint(name), tmp_path / "engine", max_length=64)
    host = open_runner(tmp_path / "engine", threads=1, max_sequences=4, deterministic=deterministic)
    cpu_as_a_device(monkeypatch)
    device = open_runner(tmp_path / "engine", threads=1, max_sequences=4, deterministic=deterministic)
    assert (type(host._cache), type(device._cache)) == (HostCache, DeviceCache)  # type: ignore[attr-defined]
    rng, done, texts, reused = np.random.default_rng(1), dict[int, int](), dict[int, np.ndarray](), 0
    for number in range(60):
        if len(done) < 4:
            text = np.array(tiny.tokens(8, seed=int(rng.integers(3))) + tiny.tokens(30, seed=number))
            counts = {each.claim(number, text) for each in (host, device)}
            assert len(counts) == 1
            texts[number], done[number] = text, counts.pop()
            reused += done[number] > 0
        chosen = [each for each in done if rng.random() < 0.7]
        chunks = []
        for each in chosen:
            new = texts[each][done[each] :][: 1 if rng.random() < 0.6 else 6]
            chunks.append(Chunk(each, done[each], new, logits=len(new)))
            done[each] += len(new)
        if chunks:
            for a, b in zip(host.step(chunks), device.step(chunks), strict=True):
                np.testing.assert_array_equal(a, b)
        for each in [each for each in done if done[each] == len(texts[each]) or rng.random() < 0.05]:
            host.free(each)
            device.free(each)
            del done[each]
    # Reused deterministically are whole blocks alone, which these beginnings are not.
    assert (reused > 5) != deterministic
    host.close()
    device.close()


def test_free_memory_is_a_plausible_number() -> None:
    assert 1 << 27 < host_memory() < 1 << 45
