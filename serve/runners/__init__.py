"""Engines opened for running: one module a backend, chosen by what the engine's folder says."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

from llmc.adapter import Adapter
from llmc.engine import open_engine
from llmc.runtime import Runner

# backend -> module with `open_runner(folder, engine, threads=, max_sequences=, cache_tokens=, adapters=)`.
RUNNERS = {"ort": "llmc.serve.runners.ort"}


def open_runner(
    folder: Path,
    *,
    threads: int | None = None,
    max_sequences: int | None = None,
    cache_tokens: int | None = None,
    adapters: Sequence[Adapter] = (),
) -> Runner:
    """Open an engine.

    Args:
        threads: CPU threads that compute; by default all that this process may use.
        max_sequences: Sequences at a time.
        cache_tokens: Tokens of the KV cache, for all sequences together; by default what fits in half of the memory
            that is free now.
        adapters: Low-rank adapters to keep beside the model; `Chunk.adapter` names one.

    Raises:
        ManifestError: `folder` is not an engine, is of another schema, or was changed.
        MissingDependencyError: The backend's package is not installed.
        EngineError: The backend cannot load it.
        UserError: The engine does not take one of the adapters.
    """
    engine = open_engine(folder)
    module = importlib.import_module(RUNNERS[engine.backend])
    runner: Runner = module.open_runner(
        folder, engine, threads=threads, max_sequences=max_sequences, cache_tokens=cache_tokens, adapters=adapters
    )
    return runner
