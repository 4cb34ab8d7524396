"""Engines opened for running: one module a backend, chosen by what the engine's folder says."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

from llmc.adapter import Adapter
from llmc.engine import open_engine
from llmc.errors import UserError
from llmc.runtime import Runner

GIB = 1 << 30

# backend -> module whose `open_runner(folder, engine, ...)` takes the other arguments of the one below by name.
RUNNERS = {"ort": "llmc.serve.runners.ort"}


def open_runner(
    folder: Path,
    *,
    threads: int | None = None,
    max_sequences: int | None = None,
    cache_tokens: int | None = None,
    cache_gib: float | None = None,
    deterministic: bool = False,
    adapters: Sequence[Adapter] = (),
) -> Runner:
    """Open an engine.

    Args:
        threads: CPU threads that compute; by default all that this process may use.
        max_sequences: Sequences at a time.
        cache_tokens: Tokens of the KV cache, for all sequences together; by default what fits in half of the memory
            that is free now.
        cache_gib: The same as memory, in GiB, instead of `cache_tokens`.
        deterministic: Reuse from the cache only what was computed in whole blocks; see llmc/serve/invariance.py.
        adapters: Low-rank adapters to keep beside the model; `Chunk.adapter` names one.

    Raises:
        UserError: `cache_gib` is too little for one sequence of the greatest length.
        ManifestError: `folder` is not an engine, is of another schema, or was changed.
        MissingDependencyError: The backend's package is not installed.
        EngineError: The backend cannot load it.
        UserError: The engine does not take one of the adapters.
    """
    engine = open_engine(folder)
    if cache_gib is not None:
        cache_tokens = int(cache_gib * GIB) // engine.cache_token_bytes
        if cache_tokens < engine.max_length:
            needed = engine.max_length * engine.cache_token_bytes / GIB
            raise UserError(
                f"a KV cache of {cache_gib:g} GiB holds {cache_tokens} tokens, but this engine's sequences may have "
                f"{engine.max_length}: give it at least {needed:.3f} GiB, "
                "or build the engine with a smaller --max-length"
            )
    module = importlib.import_module(RUNNERS[engine.backend])
    runner: Runner = module.open_runner(
        folder,
        engine,
        threads=threads,
        max_sequences=max_sequences,
        cache_tokens=cache_tokens,
        deterministic=deterministic,
        adapters=adapters,
    )
    return runner
