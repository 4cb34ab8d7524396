"""ONNX graphs written node by node, their weights streamed into one file beside them.

A node's name is a path (`/layers.0/attn/qkv`), so that profiles and error messages of a runtime can be read. A weight
is registered with its shape and a function that loads it; nothing is loaded before `save`, and then one at a time.
The same registrations give the same bytes.

A graph computes in one type, which its weights are converted to as they are written.

Knows ONNX and its external data. Does not know what the graph computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

import llmc
from llmc.errors import CheckpointError

MODEL = "model.onnx"
WEIGHTS = "weights.bin"
MICROSOFT = "com.microsoft"

# Opset 21 with IR 10 is old enough for every onnxruntime that has the fused operators used here.
_OPSET = 21
_IR_VERSION = 10
_ALIGNMENT = 64  # of every weight's offset: a cache line, so that a runtime may map the file and use it in place

# Of a tensor as a whole, as a share of its size, that a narrower type may take: with 11 bits it is 0.02 %.
_MOST_LOST = 0.01

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class _Weight:
    value: ir.Value
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    load: Callable[[], Array]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


class Graph:
    """A graph under construction.

    Attributes:
        compute: The type that it computes in, float32 or float16.
    """

    def __init__(self, name: str, compute: npt.DTypeLike = np.float32) -> None:
        self.compute: np.dtype[Any] = np.dtype(compute)
        self._graph = ir.Graph([], [], nodes=[], opset_imports={"": _OPSET, MICROSOFT: 1}, name=name)
        self._weights: dict[str, list[_Weight]] = {}

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        """Declare an input; a string in `shape` names a dimension that may vary."""
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self._graph.inputs.append(value)
        return value

    def output(self, value: ir.Value, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> None:
        """Give `value` a name, type and shape, and declare it an output."""
        value.name, value.type, value.shape = name, ir.TensorType(dtype), ir.Shape(shape)
        self._graph.outputs.append(value)

    def node(
        self,
        op: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        *,
        domain: str = "",
        outputs: int = 1,
        **attributes: Any,
    ) -> tuple[ir.Value, ...]:
        """Append a node.

        Args:
            inputs: None for an optional input that is left out.
            outputs: How many outputs it has; those never used cost nothing.
        """
        attrs = [ir.convenience.convert_attribute(key, value) for key, value in attributes.items()]
        node = ir.Node(domain, op, inputs, attrs, num_outputs=outputs, name=name, graph=self._graph)
        for index, value in enumerate(node.outputs):
            value.name = name if index == 0 else f"{name}:{index}"
        return tuple(node.outputs)

    def call(self, op: str, inputs: Sequence[ir.Value | None], name: str, **options: Any) -> ir.Value:
        """Append a node, and return its first output."""
        return self.node(op, inputs, name, **options)[0]

    @property
    def compute_type(self) -> ir.DataType:
        """`compute`, as ONNX names it."""
        return ir.DataType.from_numpy(self.compute)

    def cast(self, x: ir.Value, name: str, *, before: npt.DTypeLike, after: npt.DTypeLike) -> ir.Value:
        """x of type `before` as `after`; without a node where they are the same."""
        after = np.dtype(after)
        return x if np.dtype(before) == after else self.call("Cast", [x], name, to=ir.DataType.from_numpy(after))

    def number(self, name: str, value: float) -> ir.Value:
        """A constant of the type that the graph computes in."""
        return self.constant(name, np.array(value, self.compute))

    def constant(self, name: str, values: Array) -> ir.Value:
        """A small value that a runtime must see while it plans (a shape, an axis); kept in the graph itself."""
        value = ir.Value(name=name, const_value=ir.tensor(values, name=name))
        self._graph.register_initializer(value)
        return value

    def weight(
        self, name: str, dtype: npt.DTypeLike, shape: tuple[int, ...], load: Callable[[], Array], *, stored: str = ""
    ) -> ir.Value:
        """Declare a weight.

        Args:
            load: Gives the values, called once by `save`; as many as `shape` has, and of `dtype` unless both are
                floats: those are converted.
            stored: Weights of the same `stored` are the same bytes under several shapes, written once.
        """
        dtype = np.dtype(dtype)
        value = ir.Value(name=name, type=ir.TensorType(ir.DataType.from_numpy(dtype)), shape=ir.Shape(shape))
        self._weights.setdefault(stored or name, []).append(_Weight(value, dtype, shape, load))
        return value

    def save(self, folder: Path, progress: Callable[[int, int], object] | None = None) -> None:
        """Write `model.onnx` and `weights.bin` into `folder`.

        Args:
            progress: Told the bytes written so far, and those of all weights.

        Raises:
            CheckpointError: A weight does not fit the type that it was declared of.
        """
        total = sum(group[0].nbytes for group in self._weights.values())
        with (folder / WEIGHTS).open("wb") as file:
            for group in self._weights.values():
                file.write(bytes(-file.tell() % _ALIGNMENT))
                offset = file.tell()
                _write(file, group[0])
                for weight in group:
                    self._refer(weight, offset, folder)
                if progress:
                    progress(file.tell(), total)
        model = ir.Model(self._graph, ir_version=_IR_VERSION, producer_name="llmc", producer_version=llmc.__version__)
        ir.save(model, folder / MODEL)

    def _refer(self, weight: _Weight, offset: int, folder: Path) -> None:
        weight.value.const_value = ir.ExternalTensor(
            WEIGHTS,
            offset,
            weight.nbytes,
            ir.DataType.from_numpy(weight.dtype),
            shape=ir.Shape(weight.shape),
            name=weight.value.name or "",
            base_dir=folder,
        )
        self._graph.register_initializer(weight.value)


def _write(file: Any, weight: _Weight) -> None:
    values = _narrowed(weight.load(), weight)
    if values.dtype != weight.dtype or values.size != math.prod(weight.shape):
        raise ValueError(
            f"weight '{weight.value.name}' was declared {weight.dtype} {list(weight.shape)} "
            f"and loaded as {values.dtype} {list(values.shape)}"
        )
    np.ascontiguousarray(values).reshape(-1).view(np.uint8).tofile(file)


def _narrowed(values: Array, weight: _Weight) -> Array:
    """Floats in the weight's type; single values may become zero, as long as the tensor hardly notices."""
    if values.dtype == weight.dtype or values.dtype.kind != "f" or weight.dtype.kind != "f":
        return values
    with np.errstate(over="ignore", under="ignore"):
        found = values.astype(weight.dtype)
    if found.dtype.itemsize >= values.dtype.itemsize:
        return found
    name, largest = weight.value.name, np.abs(values).max(initial=0)
    if not np.isfinite(found).all():
        raise CheckpointError(
            f"'{name}' has values of {largest:.6g}, beyond {np.finfo(weight.dtype).max} that {weight.dtype} can hold: "
            "build with --device cpu, which computes in float32"
        )
    # In float64, where squares of what is lost do not vanish as well.
    lost = np.linalg.norm((values - found).ravel().astype(np.float64))
    if lost > _MOST_LOST * np.linalg.norm(values.ravel().astype(np.float64)):
        raise CheckpointError(
            f"the values of '{name}', at most {largest:.3g}, are too small for {weight.dtype}: "
            "build with --device cpu, which computes in float32"
        )
    return found
