"""Operations of rules that several families share; each is exact both ways.

Knows: how arrays are cut, joined and turned. Does not know: names, nor any family.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llmc.converters.rules import SAME, Op
from llmc.names import Shape
from llmc.spec import ModelSpec
from llmc.tensors import Array


def _cut(source: Array, shapes: Sequence[Shape], _spec: ModelSpec) -> list[Array]:
    return np.split(source, np.cumsum([shape[0] for shape in shapes])[:-1])


def _stacked_shape(shapes: Sequence[Shape]) -> Shape:
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


# Linears (or their biases) of the same input, one's outputs after the other's.
STACKED = Op(split=_cut, join=lambda parts, _spec: np.concatenate(parts), source_shape=_stacked_shape)


_STRIP = 32  # rows that are turned at a time: what they are made of should stay in the cache meanwhile


def _row_by_row(values: Array) -> Array:
    """An array as numpy keeps it by default; six times as fast as numpy where it is turned."""
    if values.ndim != 2 or values.flags.c_contiguous:
        return np.ascontiguousarray(values)
    turned = np.empty(values.shape, values.dtype)
    # As whole numbers: numpy copies types that it does not know, such as bfloat16, one by one.
    source, target = (array.view(f"u{values.itemsize}") for array in (values, turned))
    for row in range(0, len(values), _STRIP):
        target[row : row + _STRIP] = np.ascontiguousarray(source[row : row + _STRIP].T).T
    return turned


def transposed(op: Op) -> Op:
    """`op` of a source that keeps its linears as [in, out]."""
    return Op(
        split=lambda source, shapes, spec: [_row_by_row(part) for part in op.split(source.T, shapes, spec)],
        join=lambda parts, spec: _row_by_row(op.join(parts, spec).T),
        source_shape=lambda shapes: op.source_shape(shapes)[::-1],
        rows=op,
    )


# A linear as [in, out]: transformers' Conv1D, and all of Paddle's.
TRANSPOSED = transposed(SAME)


def _of_heads(source: Array, shapes: Sequence[Shape], spec: ModelSpec) -> list[Array]:
    heads = source.reshape(spec.attention.num_heads, len(shapes), spec.attention.head_dim, *shapes[0][1:])
    return [heads[:, index].reshape(shape) for index, shape in enumerate(shapes)]


def _by_heads(parts: Sequence[Array], spec: ModelSpec) -> Array:
    shape = spec.attention.num_heads, spec.attention.head_dim, *parts[0].shape[1:]
    whole = np.stack([part.reshape(shape) for part in parts], axis=1)
    return whole.reshape(-1, *parts[0].shape[1:])


# q, k and v (or their biases) of the first head, then of the second, and so on: as many of each as there are heads.
BY_HEADS = Op(split=_of_heads, join=_by_heads, source_shape=_stacked_shape)


def _middle_quarters_exchanged(part: Array, spec: ModelSpec) -> Array:
    heads = part.reshape(spec.attention.num_heads, 4, spec.attention.head_dim // 4, *part.shape[1:])
    exchanged: Array = heads[:, [0, 2, 1, 3]].reshape(part.shape)
    return exchanged


def _on_two_axes(parts: Sequence[Array], spec: ModelSpec) -> list[Array]:
    q, k, v = parts
    return [_middle_quarters_exchanged(q, spec), _middle_quarters_exchanged(k, spec), v]


# As BY_HEADS, of a source where each half of a head is turned on an axis of its own, its quarters forming the pairs:
# here the halves of the whole head form them, the first axis' pairs before the second's. Scores are the same, since q
# and k are both put into another order; and what exchanges two quarters also puts them back.
BY_HEADS_ON_TWO_AXES = Op(
    split=lambda source, shapes, spec: _on_two_axes(_of_heads(source, shapes, spec), spec),
    join=lambda parts, spec: _by_heads(_on_two_axes(parts, spec), spec),
    source_shape=_stacked_shape,
)
