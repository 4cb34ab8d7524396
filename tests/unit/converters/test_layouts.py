"""Every layout gives back what it was given, in the types and shapes that it announces."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmc.converters.export import FORMATS
from llmc.converters.layouts import Grid, Layout, Linear, Matrix
from llmc.converters.packed_import import METHODS
from llmc.recipe import BLOCKS, ActivationFormat

ALL: dict[str, Layout] = {
    layout.name: layout
    for row in FORMATS.values()
    if row.quantized
    for layout in importlib.import_module(row.module).LAYOUTS
}


def there_and_back(layout: Layout, matrix: Matrix, linear: Linear) -> Matrix:
    """What is read of what was packed, which has the planned tensors, and the same codes and scales."""
    parts = layout.pack(matrix, linear)
    assert {suffix: (info.dtype, info.shape) for suffix, info in layout.plan(linear).items()} == {
        suffix: (part.dtype, part.shape) for suffix, part in parts.items()
    }
    found = layout.unpack(parts, linear)
    np.testing.assert_array_equal(found.codes, matrix.codes)
    np.testing.assert_array_equal(found.scale, matrix.scale)
    return found


def test_every_format_is_written_and_read() -> None:
    assert set(METHODS.values()) == {row.module for row in FORMATS.values() if row.quantized}
    assert set(ALL) == {*METHODS, "gptq_v2", "compressed-tensors-8", "modelopt-8", "modelopt-blocks"}


def test_the_first_layout_of_a_format_has_its_name() -> None:
    """Which is what warnings call it: nobody knows the others."""
    found = {
        name: importlib.import_module(row.module).LAYOUTS[0].name for name, row in FORMATS.items() if row.quantized
    }
    assert found == {name: name for name in METHODS}


@pytest.mark.parametrize("name", [name for name, layout in ALL.items() if layout.holds != "blocks"])
@given(
    rows=st.integers(1, 9).map(lambda count: 8 * count),
    columns=st.integers(1, 20).map(lambda count: 8 * count),
    bits=st.sampled_from([4, 8]),
    group_size=st.sampled_from([16, 32, 64, None]),
    symmetric=st.booleans(),
    ordered=st.booleans(),
    seed=st.integers(0, 9),
)
def test_back_and_forth(
    name: str, rows: int, columns: int, bits: int, group_size: int | None, symmetric: bool, ordered: bool, seed: int
) -> None:
    layout, linear = ALL[name], Linear(rows, columns, Grid(bits, group_size, symmetric), ordered=ordered)
    if layout.lacks(linear) or (ordered and layout.groups is None):
        return
    draw = np.random.default_rng(seed)
    grid = (rows, linear.groups)
    matrix = Matrix(
        draw.integers(0, 1 << bits, (rows, columns), np.uint8),
        draw.uniform(1e-3, 1, grid).astype(np.float16).astype(np.float32),
        np.full(grid, 1 << (bits - 1), np.uint8) if symmetric else draw.integers(0, 1 << bits, grid, np.uint8),
        groups=draw.permutation(linear.runs) if ordered else None,
    )
    found = there_and_back(layout, matrix, linear)
    np.testing.assert_array_equal(found.zero, matrix.zero)
    np.testing.assert_array_equal(found.groups, matrix.groups)


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("name", [name for name, layout in ALL.items() if layout.holds == "blocks"])
@given(rows=st.integers(1, 9), groups=st.integers(1, 5), seed=st.integers(0, 9))
def test_blocks_back_and_forth(name: str, kind: Any, rows: int, groups: int, seed: int) -> None:
    layout, blocks, draw = ALL[name], BLOCKS[kind], np.random.default_rng(seed)
    linear = Linear(rows, groups * blocks.size, Grid(blocks.bits, blocks.size, kind=kind))
    assert layout.lacks(linear) is None
    matrix = Matrix(
        draw.integers(0, 1 << blocks.bits, (rows, groups * blocks.size), np.uint8),
        draw.integers(0, 127, (rows, groups), np.uint8).view(blocks.scales),
        np.empty((rows, groups), np.uint8),
        scale_2=draw.uniform(1e-3, 1, 1).astype(np.float32) if blocks.two_scales else None,
    )
    found = there_and_back(layout, matrix, linear)
    assert found.scale_2 == matrix.scale_2


@pytest.mark.parametrize("name", ALL)
def test_it_has_a_place_for_the_usual_linear(name: str) -> None:
    grid = {
        "weights": Grid(4, 128, symmetric=name != "gptq_v2"),
        "rounded": Grid(8, None, inputs=ActivationFormat(dynamic=False)),
        "blocks": Grid(4, 16, kind="nvfp4"),
    }[ALL[name].holds]
    assert grid.sort == ALL[name].holds
    assert ALL[name].lacks(Linear(64, 256, grid)) is None
