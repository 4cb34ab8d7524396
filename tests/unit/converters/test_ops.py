"""llmc.converters.ops: cut, join and turn, exactly, both ways."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from llmc.converters.ops import BY_HEADS, BY_HEADS_ON_TWO_AXES, STACKED, TRANSPOSED, transposed
from llmc.converters.rules import Op
from llmc.spec import ModelSpec

SHAPES = {"weight": [(4, 6), (2, 6), (2, 6)], "bias": [(4,), (2,), (2,)]}


def spec() -> ModelSpec:
    return ModelSpec.model_validate_json(
        """{"family": "x", "vocab_size": 8, "hidden_size": 6, "num_layers": 1, "max_positions": 8, "norm": {"eps": 1},
        "position": {"kind": "rope"}, "attention": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 2},
        "mlp": {"intermediate_size": 8}}"""
    )


@pytest.mark.parametrize("op", [STACKED, transposed(STACKED)])
@pytest.mark.parametrize("kind", SHAPES)
def test_cut_and_joined(op: Op, kind: str) -> None:
    shapes = SHAPES[kind]
    source = np.random.default_rng(0).standard_normal(op.source_shape(shapes)).astype(np.float16)
    parts = op.split(source, shapes, spec())
    assert [part.shape for part in parts] == shapes
    np.testing.assert_array_equal(op.join(parts, spec()), source)


@pytest.mark.parametrize("op", [BY_HEADS, transposed(BY_HEADS)])
@pytest.mark.parametrize("rest", [(6,), ()])
def test_heads_cut_and_joined(op: Op, rest: tuple[int, ...]) -> None:
    shapes = [(4, *rest)] * 3
    source = np.random.default_rng(0).standard_normal(op.source_shape(shapes)).astype(np.float16)
    np.testing.assert_array_equal(op.join(op.split(source, shapes, spec()), spec()), source)


def test_where_heads_are_cut() -> None:
    """Two heads of two: q of head 0, k of head 0, v of head 0, q of head 1 ..."""
    q, k, v = BY_HEADS.split(np.arange(12), [(4,)] * 3, spec())
    assert (q.tolist(), k.tolist(), v.tolist()) == ([0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11])


def test_heads_on_two_axes() -> None:
    """Of a head of 8 the pairs are (0, 2), (1, 3) on one axis and (4, 6), (5, 7) on the other; ours are (i, i + 4)."""
    attention = spec().attention.model_copy(update={"num_kv_heads": 2, "head_dim": 8})
    wide = spec().model_copy(update={"attention": attention})
    source = np.arange(48)
    q, k, v = BY_HEADS_ON_TWO_AXES.split(source, [(16,)] * 3, wide)
    assert q.tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 24, 25, 28, 29, 26, 27, 30, 31]
    assert (k - q).tolist() == [8] * 16
    assert v.tolist() == [*range(16, 24), *range(40, 48)]
    np.testing.assert_array_equal(BY_HEADS_ON_TWO_AXES.join([q, k, v], wide), source)


def test_what_is_cut_where() -> None:
    source = np.arange(48).reshape(8, 6)
    np.testing.assert_array_equal(STACKED.split(source, SHAPES["weight"], spec())[1], source[4:6])
    np.testing.assert_array_equal(transposed(STACKED).split(source.T, SHAPES["weight"], spec())[1], source[4:6])
    (turned,) = TRANSPOSED.split(source.T, [(8, 6)], spec())
    np.testing.assert_array_equal(turned, source)
    assert turned.flags.c_contiguous


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(1, 70), (70, 1), (32, 64), (33, 65), (100, 31), (0, 5)])
def test_what_is_turned_strip_by_strip(dtype: type, shape: tuple[int, int]) -> None:
    source = np.arange(shape[0] * shape[1]).reshape(shape).astype(dtype)
    (turned,) = TRANSPOSED.split(source, [shape[::-1]], spec())
    assert turned.flags.c_contiguous
    assert (turned.dtype, turned.shape) == (source.dtype, shape[::-1])
    assert turned.tobytes() == source.T.tobytes()
    assert TRANSPOSED.join([turned], spec()).tobytes() == source.tobytes()
