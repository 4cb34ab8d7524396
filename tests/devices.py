"""Engines for CUDA on a machine without it: all is as it would be there, but for the names of provider and device."""

from __future__ import annotations

import dataclasses

import pytest

from llmc.serve.runners import ort_devices
from llmc.serve.runners.caches import DeviceCache, host_memory


def cuda_on_the_cpu(patch: pytest.MonkeyPatch) -> None:
    """Engines for CUDA run on ONNX Runtime's CPU provider, their cache made of torch's tensors on the CPU."""
    _replace(patch, "cuda", provider=ort_devices.DEVICES["cpu"].provider, free_memory=host_memory)


def cpu_as_a_device(patch: pytest.MonkeyPatch) -> None:
    """Engines for the CPU run with the cache of a device, so that nothing else differs."""
    _replace(patch, "cpu")


def _replace(patch: pytest.MonkeyPatch, name: str, **changes: object) -> None:
    device = dataclasses.replace(
        ort_devices.DEVICES[name],
        cache=lambda engine, slots: DeviceCache(engine, slots, "cpu"),
        **changes,  # type: ignore[arg-type]
    )
    patch.setitem(ort_devices.DEVICES, name, device)
