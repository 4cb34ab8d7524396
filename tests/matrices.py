"""Matrices for property tests."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

# float32 [rows, columns] of any shape and size of values: groups of zeros, single values, last groups cut short.
MATRICES = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=70),
    elements=st.floats(-1e4, 1e4, width=32, allow_subnormal=False),
)
