"""What goes on between the layers of an ONNX Runtime engine. For comparing models, never for serving.

Knows onnxruntime and the engine's inputs, as serve/runners/ort.py does. Does not know how the graph was given these
outputs (builders/onnx_layers.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmc import prefix
from llmc.engine import Engine
from llmc.need import need
from llmc.runtime import Tokens
from llmc.serve.runners.ort_devices import open_session

# The option by which a model that is no file finds its weights.
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"

States = list[npt.NDArray[np.float32]]


def open_states(folder: Path, engine: Engine, model: bytes, names: Sequence[str]) -> Callable[[Tokens], States]:
    """Open a copy of an engine's graph.

    Args:
        folder: Where its weights are.
        model: The graph.
        names: The outputs that are wanted.

    Returns:
        A function from the tokens of a whole sequence to these outputs.

    Raises:
        EngineError: It cannot be opened.
    """
    ort = need("onnxruntime")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry(_WEIGHTS_FOLDER, str(folder.resolve()))
    session = open_session(folder, engine, options, model)
    attention = engine.spec.attention
    dtype = np.dtype(engine.kv_cache)
    caches = [f"past.{layer}.{kind}" for layer in range(engine.spec.num_layers) for kind in ("key", "value")]

    def states(tokens: Tokens) -> States:
        count = len(tokens)
        empty = np.zeros((1, attention.num_kv_heads, count, attention.head_dim), dtype)
        inputs: dict[str, Any] = {
            "tokens": tokens[None],
            "rows": np.array([count - 1]),
            "seqlens_k": np.array([count - 1], np.int32),
            "total_sequence_length": np.array(count, np.int32),
            **dict.fromkeys(caches, empty),
        }
        if engine.spec.prefix:
            inputs["prefix"] = np.array([prefix.find(engine.spec.prefix, tokens)])
        return [state.astype(np.float32, copy=False) for state in session.run(list(names), inputs)]

    return states
