"""What goes from layer to layer in an engine: how these values are named, and a graph that gives them as outputs.

They show where two models part. The engine's file is left as it is; the weights stay beside it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from llmc.builders.onnx_graph import MODEL
from llmc.errors import EngineError


def state_name(index: int) -> str:
    """The value that goes into layer `index`, which is what comes out of the one before."""
    return f"/layers/{index}"


def with_states(folder: Path, num_layers: int, compute: npt.DTypeLike = np.float32) -> tuple[bytes, list[str]]:
    """The model of an engine folder, which also gives its states.

    Args:
        compute: The type that the engine computes in, which its states have.

    Returns:
        The model, and the names of its new outputs, [batch * length, hidden]: what goes into the first layer,
        and what comes out of each.

    Raises:
        EngineError: The engine's builder did not name them.
    """
    model = ir.load(folder / MODEL)
    values = {value.name: value for node in model.graph for value in node.outputs}
    names = [state_name(index) for index in range(num_layers + 1)]
    for name in names:
        if name not in values:
            raise EngineError(f"{folder} has no value '{name}': build the engine again with this version of llmc")
        values[name].type = ir.TensorType(ir.DataType.from_numpy(np.dtype(compute)))
        model.graph.outputs.append(values[name])
    return ir.to_proto(model).SerializeToString(), names
