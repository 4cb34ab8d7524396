"""Runs an ONNX Runtime engine.

One KV cache for all sequences is reserved at the start (serve/runners/caches.py). A step is one run for all chunks of a
single token (one batch in the first slots) and one run for each longer chunk: on a CPU, GroupQueryAttention takes
several tokens with a past for one sequence only. Keys and values are written in place, because past and present are
bound to the same memory; all else goes in and comes out as arrays of this machine's.

Knows onnxruntime and the engine's inputs (builders/onnx_decoder.py). Does not know requests, or how tokens are chosen,
or where it is computed (serve/runners/ort_devices.py).
"""

from __future__ import annotations

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
from llmc.serve.runners.ort_devices import DEVICES, Device, open_session
from llmc.serve.runners.slots import SlotTable

Array = npt.NDArray[Any]

LOGITS, HIDDEN = "logits", "hidden"
DEFAULT_SEQUENCES = 16
BINDINGS = 256  # kept at most: there are as many as sizes of batches, times sets of adapters
CACHE_SHARE = 0.5  # of the memory that is free when the engine is opened


@dataclass(slots=True)
class _DecodeBatch:
    """Everything that a batch of single tokens needs again in every step.

    Attributes:
        inputs: What changes from step to step, to be bound again: binding copies it where a device computes.
        keep: What the binding refers to.
    """

    binding: Any
    inputs: dict[str, Any]
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
        self._cache = DEVICES[engine.device].cache(engine, limits.max_sequences)
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
        for name, value in batch.inputs.items():
            batch.binding.bind_ortvalue_input(name, value)
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

    def _bind(self, binding: Any, inputs: dict[str, Array], outputs: dict[str, Array]) -> dict[str, Any]:
        """Bind inputs and outputs; the result, by name, must live as long as the binding is run with them.

        Args:
            inputs: Among them the prefix, which most engines do not ask for.
        """
        if self._limits.prefix_end is None:
            inputs = {name: values for name, values in inputs.items() if name != "prefix"}
        found = {name: self._ort.OrtValue.ortvalue_from_numpy(each) for name, each in (inputs | outputs).items()}
        for name, value in found.items():
            (binding.bind_ortvalue_input if name in inputs else binding.bind_ortvalue_output)(name, value)
        return found

    def _bind_slots(self, first: int, count: int, span: Span = NONE) -> tuple[Any, list[Any]]:
        """A binding whose caches are `count` slots from `first` on, with the adapters of a span."""
        binding = self._session.io_binding()
        keep = [self._bind(binding, self._adapters.stacks(span), {}), self._cache.bind(binding, first, count)]
        return binding, keep

    def _bind_decode_batch(self, count: int, span: Span) -> _DecodeBatch:
        binding, keep = self._bind_slots(0, count, span)
        masks = self._adapters.masks(count, span)
        tokens, seqlens = np.zeros((count, 1), np.int64), np.zeros(count, np.int32)
        total, logits = np.zeros((), np.int32), self._logits[:count]
        prefix = np.zeros((count, 2), np.int64)
        inputs: dict[str, Array] = {
            "tokens": tokens,
            "seqlens_k": seqlens,
            "total_sequence_length": total,
            "prefix": prefix,
            **masks,
        }
        keep.append(self._bind(binding, {"rows": np.arange(count)}, {LOGITS: logits}))
        return _DecodeBatch(
            binding, self._bind(binding, inputs, {}), tokens, seqlens, total, prefix, logits, masks, keep
        )


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
    session, device = open_session(folder, engine, options), DEVICES[engine.device]
    affordable = cache_tokens or _affordable_tokens(engine, device)
    sequences = max_sequences or DEFAULT_SEQUENCES
    if not device.is_lazy:
        sequences = _fitting(engine, max_sequences, affordable)
    limits = Limits(
        max_sequences=sequences,
        max_length=engine.max_length,
        cache_tokens=min(sequences * engine.max_length, affordable),
        vocab_size=engine.spec.vocab_size,
        prefix_end=engine.spec.prefix.end if engine.spec.prefix else None,
        token_bytes=engine.cache_token_bytes,
        num_scores=engine.spec.score.labels if engine.spec.score else 0,
        # Engines of older versions have no such output.
        state_size=next((each.shape[1] for each in session.get_outputs() if each.name == HIDDEN), 0),
    )
    return OrtRunner(session, engine, limits, deterministic=deterministic, adapters=adapters)


def _affordable_tokens(engine: Engine, device: Device) -> int:
    """Tokens whose keys and values fit in a share of the memory that is free now, at least those of one sequence."""
    return max(engine.max_length, int(CACHE_SHARE * device.free_memory()) // engine.cache_token_bytes)


def _fitting(engine: Engine, max_sequences: int | None, cache_tokens: int) -> int:
    """How many sequences of the greatest length so many tokens are, at most those asked for.

    Raises:
        EngineError: Fewer than were asked for.
    """
    fitting = cache_tokens // engine.max_length
    if fitting < (max_sequences or 1):
        raise EngineError(
            f"on {engine.device} every sequence has room for {engine.max_length} tokens from the start, and "
            f"{max_sequences or 1} of them do not fit in a KV cache of {cache_tokens} tokens: serve fewer "
            "(--max-sequences), or build the engine with a smaller --max-length"
        )
    return max_sequences or min(fitting, DEFAULT_SEQUENCES)
