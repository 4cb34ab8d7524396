"""Every layout gives back what it was given, in the types and shapes that it announces."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmc.converters.export import FORMATS
from llmc.converters.layouts import Grid, Layout, Linear, Matrix
from llmc.converters.packed_import import METHODS
from llmc.recipe import ActivationFormat

ALL: dict[str, Layout] = {
    layout.name: layout
    for row in FORMATS.values()
    if row.quantized
    for layout in importlib.import_module(row.module).LAYOUTS
}


def test_every_format_is_written_and_read() -> None:
    assert set(METHODS.values()) == {row.module for row in FORMATS.values() if row.quantized}
    assert set(ALL) == {*METHODS, "gptq_v2", "compressed-tensors-8", "modelopt-8"}


def test_the_first_layout_of_a_format_has_its_name() -> None:
    """Which is what warnings call it: nobody knows the others."""
    found = {
        name: importlib.import_module(row.module).LAYOUTS[0].name for name, row in FORMATS.items() if row.quantized
    }
    assert found == {name: name for name in METHODS}


@pytest.mark.parametrize("name", ALL)
@given(
    rows=st.integers(1, 9).map(lambda count: 8 * count),
    columns=st.integers(1, 20).map(lambda count: 8 * count),
    bits=st.sampled_from([4, 8]),
    group_size=st.sampled_from([16, 32, 64, None]),
    symmetric=st.booleans(),
    seed=st.integers(0, 9),
)
def test_back_and_forth(
    name: str, rows: int, columns: int, bits: int, group_size: int | None, symmetric: bool, seed: int
) -> None:
    layout, linear = ALL[name], Linear(rows, columns, Grid(bits, group_size, symmetric))
    if layout.lacks(linear):
        return
    draw = np.random.default_rng(seed)
    grid = (rows, linear.groups)
    matrix = Matrix(
        draw.integers(0, 1 << bits, (rows, columns), np.uint8),
        draw.uniform(1e-3, 1, grid).astype(np.float16).astype(np.float32),
        np.full(grid, 1 << (bits - 1), np.uint8) if symmetric else draw.integers(0, 1 << bits, grid, np.uint8),
    )
    parts = layout.pack(matrix, linear)
    assert {suffix: (info.dtype, info.shape) for suffix, info in layout.plan(linear).items()} == {
        suffix: (part.dtype, part.shape) for suffix, part in parts.items()
    }
    found = layout.unpack(parts, linear)
    np.testing.assert_array_equal(found.codes, matrix.codes)
    np.testing.assert_array_equal(found.scale, matrix.scale)
    np.testing.assert_array_equal(found.zero, matrix.zero)


@pytest.mark.parametrize("name", ALL)
def test_it_has_a_place_for_the_usual_linear(name: str) -> None:
    static = Grid(8, None, inputs=ActivationFormat(dynamic=False))
    grid = static if ALL[name].rounded else Grid(4, 128, symmetric=name != "gptq_v2")
    linear = Linear(64, 256, grid)
    assert ALL[name].lacks(linear) is None
