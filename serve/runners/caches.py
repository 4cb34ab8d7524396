"""Keys and values of every layer, [slots, kv_heads, max_length, head_dim] each, on the host or on a device.

Both are `Storage` for a SlotTable, and bind any block of slots to a run, past and present to the same memory.

Knows an engine's description, and how onnxruntime is told of memory. Does not know sequences.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from llmc.engine import Engine
from llmc.need import need
from llmc.serve.runners.slots import Storage

Array = npt.NDArray[Any]

_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # named by Python from 3.13 on


class Cache(Storage, Protocol):
    """What the runner needs of a cache."""

    def bind(self, binding: Any, first: int, count: int) -> list[Any]:
        """Bind `count` slots from `first` on as past and present; the result must live as long as the binding."""
        ...


def _names(engine: Engine) -> list[str]:
    return [f"{layer}.{kind}" for layer in range(engine.spec.num_layers) for kind in ("key", "value")]


def _shape(engine: Engine, slots: int) -> tuple[int, int, int, int]:
    attention = engine.spec.attention
    return slots, attention.num_kv_heads, engine.max_length, attention.head_dim


class HostCache:
    """In lazily touched memory: what is reserved costs nothing before it is used."""

    def __init__(self, engine: Engine, slots: int) -> None:
        self._ort = need("onnxruntime")
        self.shape = _shape(engine, slots)
        self.dtype = np.dtype(engine.kv_cache)
        self._slot_bytes = self.dtype.itemsize * int(np.prod(self.shape[1:]))
        self._maps = {name: _reserve(slots * self._slot_bytes) for name in _names(engine)}
        self.arrays: dict[str, Array] = {
            name: np.frombuffer(memory, self.dtype, count=int(np.prod(self.shape))).reshape(self.shape)
            for name, memory in self._maps.items()
        }

    def bind(self, binding: Any, first: int, count: int) -> list[Any]:
        keep = []
        for name, array in self.arrays.items():
            keep.append(self._ort.OrtValue.ortvalue_from_numpy(array[first : first + count]))
            binding.bind_ortvalue_input(f"past.{name}", keep[-1])
            binding.bind_ortvalue_output(f"present.{name}", keep[-1])
        return keep

    def copy(self, source: int, target: int, count: int) -> None:
        for array in self.arrays.values():
            array[target, :, :count] = array[source, :, :count]

    def exchange(self, a: int, b: int, count_a: int, count_b: int) -> None:
        for array in self.arrays.values():
            kept = array[a, :, :count_a].copy()
            array[a, :, :count_b] = array[b, :, :count_b]
            array[b, :, :count_a] = kept

    def drop(self, slot: int, keep: int) -> None:
        heads, token_bytes = self.shape[1], self.dtype.itemsize * self.shape[3]
        first = slot * self._slot_bytes
        size = self._slot_bytes // heads if keep else self._slot_bytes
        for begin in range(first, first + self._slot_bytes, size):
            # Whole pages only; what is left of a page at either end stays resident.
            low = -(-(begin + keep * token_bytes) // mmap.PAGESIZE) * mmap.PAGESIZE
            high = (begin + size) // mmap.PAGESIZE * mmap.PAGESIZE
            if high > low:
                for memory in self._maps.values():
                    memory.madvise(mmap.MADV_DONTNEED, low, high - low)


def _reserve(size: int) -> mmap.mmap:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
    # A huge page would make the first token of every head of every slot cost 2 MiB.
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return memory


class DeviceCache:
    """In the memory of a device, all of which is taken at once.

    onnxruntime and torch each have a queue of work: a run has ended when it returns, and what is moved here has been
    moved when a method returns.
    """

    def __init__(self, engine: Engine, slots: int, device: str) -> None:
        torch = need("torch")
        self.shape = _shape(engine, slots)
        self.dtype = np.dtype(engine.kv_cache)
        # Zeros, because what nobody wrote is multiplied by zero as well, and could be anything.
        self.tensors = {
            name: torch.zeros(self.shape, dtype=getattr(torch, engine.kv_cache), device=device)
            for name in _names(engine)
        }
        self._wait = getattr(torch, device).synchronize
        self._device = device
        self._wait()

    def bind(self, binding: Any, first: int, count: int) -> list[Any]:
        for name, tensor in self.tensors.items():
            block = tensor[first : first + count]
            memory = (self._device, 0, self.dtype, tuple(block.shape), block.data_ptr())
            binding.bind_input(f"past.{name}", *memory)
            binding.bind_output(f"present.{name}", *memory)
        return []

    def copy(self, source: int, target: int, count: int) -> None:
        for tensor in self.tensors.values():
            tensor[target, :, :count] = tensor[source, :, :count]
        self._wait()

    def exchange(self, a: int, b: int, count_a: int, count_b: int) -> None:
        for tensor in self.tensors.values():
            kept = tensor[a, :, :count_a].clone()
            tensor[a, :, :count_b] = tensor[b, :, :count_b]
            tensor[b, :, :count_a] = kept
        self._wait()

    def drop(self, slot: int, keep: int) -> None:
        """Nothing is given back: the memory is one block, and there is nobody else on the device to use it."""


def host_memory() -> int:
    """Bytes that can be had without swapping; the page cache counts, because it gives way (Linux, proc(5))."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * mmap.PAGESIZE


def cuda_memory() -> int:
    """Bytes of the first CUDA device that nobody has taken."""
    free: int = need("torch").cuda.mem_get_info(0)[0]
    return free
