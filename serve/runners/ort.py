"""Runs an ONNX Runtime engine on the CPU.

One KV cache for all sequences is reserved at the start and touched only as it fills. A step is one run for all chunks
of a single token (one batch in the first slots) and one run for each longer chunk: GroupQueryAttention takes several
tokens with a past for one sequence only. Keys and values are written in place, because past and present are bound to
the same memory.

Knows onnxruntime and the engine's inputs (builders/onnx_decoder.py). Does not know requests, or how tokens are chosen.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmc.adapter import Adapter
from llmc.engine import Engine
from llmc.errors import EngineError
from llmc.need import need
from llmc.runtime import Chunk, Limits, Logits
from llmc.serve import invariance
from llmc.serve.runners.ort_adapters import NONE, Adapters, Span
from llmc.serve.runners.slots import SlotTable

Array = npt.NDArray[Any]

MODEL = "model.onnx"
LOGITS, HIDDEN = "logits", "hidden"
DEFAULT_SEQUENCES = 16
BINDINGS = 256  # kept at most: there are as many as sizes of batches, times sets of adapters
CACHE_SHARE = 0.5  # of the memory that is free when the engine is opened
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # named by Python from 3.13 on


class Cache:
    """Keys and values of every layer, [slots, kv_heads, max_length, head_dim] each, in lazily touched memory."""

    def __init__(self, engine: Engine, slots: int) -> None:
        attention = engine.spec.attention
        self.shape = (slots, attention.num_kv_heads, engine.max_length, attention.head_dim)
        self.dtype = np.dtype(np.int8 if engine.kv_cache == "int8" else np.float32)
        self._slot_bytes = self.dtype.itemsize * int(np.prod(self.shape[1:]))
        names = [f"{layer}.{kind}" for layer in range(engine.spec.num_layers) for kind in ("key", "value")]
        self._maps = {name: _reserve(slots * self._slot_bytes) for name in names}
        self.arrays: dict[str, Array] = {
            name: np.frombuffer(memory, self.dtype, count=int(np.prod(self.shape))).reshape(self.shape)
            for name, memory in self._maps.items()
        }

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


@dataclass(slots=True)
class _DecodeBatch:
    """Everything that a batch of single tokens needs again in every step, bound once."""

    binding: Any
    tokens: Array
    seqlens: Array
    total: Array
    prefix: Array
    logits: Logits
    masks: dict[str, Array]
    keep: list[Any]


class OrtRunner:
    """An engine of the backend "ort", opened. Implements `llmc.runtime.Runner`."""

    def __init__(
        self,
        session: Any,
        engine: Engine,
        limits: Limits,
        *,
        deterministic: bool = False,
        adapters: Sequence[Adapter] = (),
    ) -> None:
        self._ort = need("onnxruntime")
        self._adapters = Adapters(engine.spec, [each.name for each in session.get_inputs()], adapters)
        self._session = session
        self._limits = limits
        self._cache = Cache(engine, limits.max_sequences)
        self._deterministic = deterministic
        block = invariance.BLOCK if deterministic else None
        self._table = SlotTable(
            self._cache, limits.max_sequences, limits.max_length, limits.cache_tokens, engine.spec.prefix, block
        )
        # Of all decoding batches: one is computed at a time, and a row can be 600 kB.
        self._logits = np.zeros((limits.max_sequences, limits.width), np.float32)
        most = max(BINDINGS, limits.max_sequences)
        self._decode_batch = lru_cache(maxsize=most)(self._bind_decode_batch)
        self._slot_binding = lru_cache(maxsize=most)(self._bind_slots)

    @property
    def limits(self) -> Limits:
        return self._limits

    def claim(self, sequence_id: int, tokens: npt.NDArray[np.int64], salt: str = "") -> int:
        return self._table.claim(sequence_id, tokens, salt)

    def truncate(self, sequence_id: int, length: int) -> None:
        self._table.forget(sequence_id, length)

    def free(self, sequence_id: int) -> None:
        self._table.free(sequence_id)

    def step(self, chunks: Sequence[Chunk]) -> list[Logits]:
        """See `llmc.runtime.Runner.step`."""
        results: dict[int, Logits] = {}
        try:
            for chunk in chunks:
                self._table.extend(chunk.sequence_id, chunk.start, chunk.tokens)
            self._table.trim()
            singles = [chunk for chunk in chunks if self._in_batch(chunk)]
            if singles:
                self._decode(singles, results)
            for chunk in chunks:
                if chunk.sequence_id not in results:
                    results[chunk.sequence_id] = self._prefill(chunk)
        except Exception as error:
            for chunk in chunks:
                self._table.forget(chunk.sequence_id, chunk.start)
            if isinstance(error, EngineError):
                raise
            raise EngineError(f"ONNX Runtime failed: {error}") from error
        return [results[chunk.sequence_id] for chunk in chunks]

    def _in_batch(self, chunk: Chunk) -> bool:
        """It is computed in one run with others.

        Adapters are inputs, not weights that onnxruntime has packed; how it multiplies by them depends on the rows.
        """
        return len(chunk.tokens) == 1 and not chunk.states and not (self._deterministic and chunk.adapter)

    def close(self) -> None:
        self._decode_batch.cache_clear()
        self._slot_binding.cache_clear()
        del self._session, self._table, self._cache

    def _decode(self, chunks: Sequence[Chunk], results: dict[int, Logits]) -> None:
        """One token of each of several sequences."""
        by_id = {chunk.sequence_id: chunk for chunk in chunks}
        order = [by_id[sequence_id] for sequence_id in self._table.line_up(list(by_id))]
        wanted = [chunk.adapter for chunk in order]
        span = self._adapters.span(wanted)
        batch = self._decode_batch(len(order), span)
        self._adapters.fill(batch.masks, wanted, span)
        batch.tokens[:, 0] = [int(chunk.tokens[0]) for chunk in order]
        batch.seqlens[:] = [chunk.start for chunk in order]
        batch.total[...] = batch.seqlens.max() + 1
        batch.prefix[:] = [self._table[chunk.sequence_id].span for chunk in order]
        self._session.run_with_iobinding(batch.binding)
        for row, chunk in enumerate(order):
            results[chunk.sequence_id] = batch.logits[row : row + chunk.logits]

    def _prefill(self, chunk: Chunk) -> Logits:
        """Several tokens of one sequence."""
        count = len(chunk.tokens)
        slot, end = self._table[chunk.sequence_id].index, chunk.start + count
        # What was bound once stays bound: an output that is rarely wanted has a binding of its own.
        span = self._adapters.span([chunk.adapter])
        binding, _ = self._bind_slots(slot, 1, span) if chunk.states else self._slot_binding(slot, 1, span)
        masks = self._adapters.masks(count, span)
        self._adapters.fill(masks, [chunk.adapter], span)
        rows = 0 if chunk.states else chunk.logits
        shape = (count, self._limits.state_size) if chunk.states else (rows, self._limits.width)
        found = np.empty(shape, np.float32)
        keep = self._bind(
            binding,
            {
                "tokens": np.asarray(chunk.tokens, np.int64)[None],
                "rows": np.arange(count - rows, count),
                "seqlens_k": np.array([end - 1], np.int32),
                "total_sequence_length": np.array(end, np.int32),
                "prefix": np.array([self._table[chunk.sequence_id].span]),
                **masks,
            },
            {HIDDEN if chunk.states else LOGITS: found},
        )
        self._session.run_with_iobinding(binding)
        del keep
        return found[len(found) - chunk.logits :]

    def _bind(self, binding: Any, inputs: dict[str, Array], outputs: dict[str, Array]) -> list[Any]:
        """Bind inputs and outputs; the result must live as long as the binding is run with them.

        Args:
            inputs: Among them the prefix, which most engines do not ask for.
        """
        keep = []
        for name, values in inputs.items():
            if name == "prefix" and self._limits.prefix_end is None:
                continue
            keep.append(self._ort.OrtValue.ortvalue_from_numpy(values))
            binding.bind_ortvalue_input(name, keep[-1])
        for name, values in outputs.items():
            keep.append(self._ort.OrtValue.ortvalue_from_numpy(values))
            binding.bind_ortvalue_output(name, keep[-1])
        return keep

    def _bind_slots(self, first: int, count: int, span: Span = NONE) -> tuple[Any, list[Any]]:
        """A binding whose caches are `count` slots from `first` on, with the adapters of a span."""
        binding = self._session.io_binding()
        keep = self._bind(binding, self._adapters.stacks(span), {})
        for name, array in self._cache.arrays.items():
            value = self._ort.OrtValue.ortvalue_from_numpy(array[first : first + count])
            binding.bind_ortvalue_input(f"past.{name}", value)
            binding.bind_ortvalue_output(f"present.{name}", value)
            keep.append(value)
        return binding, keep

    def _bind_decode_batch(self, count: int, span: Span) -> _DecodeBatch:
        binding, keep = self._bind_slots(0, count, span)
        masks = self._adapters.masks(count, span)
        tokens, seqlens = np.zeros((count, 1), np.int64), np.zeros(count, np.int32)
        total, logits = np.zeros((), np.int32), self._logits[:count]
        prefix = np.zeros((count, 2), np.int64)
        inputs: dict[str, Array] = {
            "tokens": tokens,
            "rows": np.arange(count),
            "seqlens_k": seqlens,
            "total_sequence_length": total,
            "prefix": prefix,
            **masks,
        }
        keep += self._bind(binding, inputs, {LOGITS: logits})
        return _DecodeBatch(binding, tokens, seqlens, total, prefix, logits, masks, keep)


def open_runner(
    folder: Path,
    engine: Engine,
    *,
    threads: int | None,
    max_sequences: int | None,
    cache_tokens: int | None,
    deterministic: bool = False,
    adapters: Sequence[Adapter] = (),
) -> OrtRunner:
    """Open the engine in `folder`; see `llmc.serve.runners.open_runner`."""
    ort = need("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Without VNNI, sums of two products of unsigned and signed bytes overflow 16 bits: take slower products there.
    options.add_session_config_entry("session.x64quantprecision", "1")
    try:
        session = ort.InferenceSession(folder / MODEL, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise EngineError(f"ONNX Runtime {ort.__version__} cannot open {folder / MODEL}: {error}") from error
    sequences = max_sequences or DEFAULT_SEQUENCES
    limits = Limits(
        max_sequences=sequences,
        max_length=engine.max_length,
        cache_tokens=min(sequences * engine.max_length, cache_tokens or _affordable_tokens(engine)),
        vocab_size=engine.spec.vocab_size,
        prefix_end=engine.spec.prefix.end if engine.spec.prefix else None,
        token_bytes=engine.cache_token_bytes,
        num_scores=engine.spec.score.labels if engine.spec.score else 0,
        # Engines of older versions have no such output.
        state_size=next((each.shape[1] for each in session.get_outputs() if each.name == HIDDEN), 0),
    )
    return OrtRunner(session, engine, limits, deterministic=deterministic, adapters=adapters)


def _affordable_tokens(engine: Engine) -> int:
    """Tokens whose keys and values fit in a share of the memory that is free now, at least those of one sequence."""
    return max(engine.max_length, int(CACHE_SHARE * _available_memory()) // engine.cache_token_bytes)


def _available_memory() -> int:
    """Bytes that can be had without swapping; the page cache counts, because it gives way (Linux, proc(5))."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * mmap.PAGESIZE
