"""Which device a machine has, and what is said where an engine's own is missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from llmc.builders import ort as builder
from llmc.builders import ort_devices as kinds
from llmc.engine import Engine, describe
from llmc.errors import MissingDependencyError
from llmc.serve.runners import open_runner, ort_devices


def test_builders_and_runners_know_the_same_devices() -> None:
    named = Engine.model_fields["device"].annotation
    assert set(getattr(named, "__args__", ())) == set(kinds.DEVICES) == set(ort_devices.DEVICES)


@pytest.mark.parametrize(
    ("devices", "providers", "best"),
    [
        (1, ["CUDAExecutionProvider", "CPUExecutionProvider"], "cuda"),
        (1, ["CPUExecutionProvider"], "cpu"),
        # A build of onnxruntime for CUDA, where there is none.
        (0, ["CUDAExecutionProvider", "CPUExecutionProvider"], "cpu"),
    ],
)
def test_the_driver_and_onnxruntime_are_asked(
    devices: int, providers: list[str], best: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort_devices, "_cuda_devices", lambda: devices)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)
    assert ort_devices.best() == best


def test_where_onnxruntime_is_not_installed_it_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort_devices, "_cuda_devices", lambda: 1)
    monkeypatch.setattr(ort_devices, "installed", lambda module: False)
    assert ort_devices.best() == "cpu"


@pytest.mark.parametrize(("status", "count"), [(0, 2), (100, 0)])
def test_a_driver_is_believed_if_it_starts(status: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """100 is CUDA_ERROR_NO_DEVICE."""

    class Driver:
        def cuInit(self, flags: int) -> int:  # noqa: N802
            return status

        def cuDeviceGetCount(self, pointer: Any) -> int:  # noqa: N802
            pointer._obj.value = 2
            return 0

    monkeypatch.setattr(ort_devices.ctypes, "CDLL", lambda name: Driver())
    assert ort_devices._cuda_devices() == count


def test_no_driver_is_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ort_devices.ctypes, "CDLL", missing)
    assert ort_devices._cuda_devices() == 0


@pytest.fixture
def cuda_engine(tmp_path: Path, tiny_checkpoint: Callable[[str], Path]) -> Path:
    builder.build(tiny_checkpoint("llama"), tmp_path / "engine", device="cuda")
    return tmp_path / "engine"


def test_an_engine_for_cuda_where_onnxruntime_has_none(cuda_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(
        MissingDependencyError, match=r"was built for cuda, and onnxruntime .* has no CUDAExecutionProvider"
    ) as error:
        open_runner(cuda_engine)
    assert 'install "llmc-toolkit[serve-cuda]"' in str(error.value)
    assert f"llmc build-engine CHECKPOINT {cuda_engine} --device cpu --overwrite" in str(error.value)


def test_an_engine_for_cuda_where_torch_is_missing(cuda_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(ort_devices, "installed", lambda module: module != "torch")
    with pytest.raises(
        MissingDependencyError, match=r"'torch' is not installed here: install .llmc-toolkit\[serve-cuda\]"
    ):
        open_runner(cuda_engine)


def test_onnxruntime_s_silent_fall_back_to_the_cpu_is_refused(
    cuda_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where CUDA's libraries are missing it gives a session all the same, which the CPU computes."""
    made = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(
        onnxruntime,
        "InferenceSession",
        lambda model, options, providers: made(model, options, providers=providers[1:]),
    )
    with pytest.raises(
        MissingDependencyError, match=r"CUDAExecutionProvider did not start .*llmc-toolkit\[serve-cuda\]"
    ):
        open_runner(cuda_engine)


def test_engines_of_older_versions_are_for_the_cpu(tmp_path: Path, tiny_checkpoint: Callable[[str], Path]) -> None:
    builder.build(tiny_checkpoint("llama"), tmp_path / "engine")
    path = tmp_path / "engine" / "engine.json"
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if '"device"' not in line and '"compute"' not in line]
    assert len(lines) - len(kept) == 2
    path.write_text("\n".join(kept), encoding="utf-8")
    assert (describe(tmp_path / "engine").device, describe(tmp_path / "engine").compute) == ("cpu", "float32")
