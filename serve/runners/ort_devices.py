"""Where ONNX Runtime computes: its provider of each device, and which device this machine has.

Knows onnxruntime and the driver. Does not know what engines hold (builders/ort_devices.py).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmc.engine import DeviceName, Engine
from llmc.errors import EngineError, MissingDependencyError
from llmc.need import installed, need
from llmc.serve.runners.caches import Cache, DeviceCache, HostCache, cuda_memory, host_memory

MODEL = "model.onnx"


@dataclass(frozen=True)
class Device:
    """How engines for a device are run.

    Attributes:
        provider: onnxruntime's name of it.
        cache: (engine, slots) -> its KV cache.
        free_memory: Bytes that the cache may share.
        is_lazy: The cache takes memory only as it fills; else all its slots must fit from the start.
        extra: Of setup.cfg, that brings what it needs.
        libraries: The module that brings the device's own: onnxruntime finds them once it has been imported.
    """

    provider: str
    cache: Callable[[Engine, int], Cache]
    free_memory: Callable[[], int]
    is_lazy: bool
    extra: str
    libraries: str = "onnxruntime"


DEVICES: dict[str, Device] = {
    "cpu": Device("CPUExecutionProvider", HostCache, host_memory, is_lazy=True, extra="serve"),
    "cuda": Device(
        "CUDAExecutionProvider",
        lambda engine, slots: DeviceCache(engine, slots, "cuda"),
        cuda_memory,
        is_lazy=False,
        extra="serve-cuda",
        libraries="torch",
    ),
}


def best() -> DeviceName:
    """The device that an engine built on this machine is for, unless its user says otherwise.

    A build of onnxruntime for CUDA names that provider on machines without a GPU too, so the driver is asked as well.
    """
    if not installed("onnxruntime") or not _cuda_devices():
        return "cpu"
    return "cuda" if DEVICES["cuda"].provider in need("onnxruntime").get_available_providers() else "cpu"


def _cuda_devices() -> int:
    """How many devices the CUDA driver has, 0 where there is no driver (CUDA Driver API: cuInit, cuDeviceGetCount)."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int()
    return count.value if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 else 0


def open_session(folder: Path, engine: Engine, options: Any, model: bytes | None = None) -> Any:
    """An onnxruntime session on the engine's device.

    Args:
        options: onnxruntime.SessionOptions.
        model: The graph, if it is not the folder's own.

    Raises:
        EngineError: onnxruntime cannot open it.
        MissingDependencyError: Not on that device.
    """
    ort, device = need("onnxruntime"), DEVICES[engine.device]
    if device.provider not in ort.get_available_providers():
        raise _no_device(folder, engine, f"onnxruntime {ort.__version__} here has no {device.provider}")
    if not installed(device.libraries):
        raise _no_device(folder, engine, f"'{device.libraries}' is not installed here")
    need(device.libraries)
    providers: Sequence[str] = list(dict.fromkeys([device.provider, DEVICES["cpu"].provider]))
    try:
        session = ort.InferenceSession(model or folder / MODEL, options, providers=providers)
    except Exception as error:
        raise EngineError(f"ONNX Runtime {ort.__version__} cannot open {folder / MODEL}: {error}") from error
    # Without a device or its libraries, onnxruntime goes on with the CPU and says so in its log alone.
    if device.provider not in session.get_providers():
        raise _no_device(folder, engine, f"{device.provider} did not start (no GPU, or CUDA's libraries are missing)")
    return session


def _no_device(folder: Path, engine: Engine, what: str) -> MissingDependencyError:
    extra = DEVICES[engine.device].extra
    return MissingDependencyError(
        f'{folder} was built for {engine.device}, and {what}: install "llmc-toolkit[{extra}]" in place of '
        f"onnxruntime on a machine with such a device, or build the engine again with "
        f"`llmc build-engine CHECKPOINT {folder} --device cpu --overwrite`"
    )
