"""llmc.alibi: slopes as the authors' code and transformers have them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.models.bloom.modeling_bloom import _get_alibi_slopes

from llmc.alibi import slopes


@pytest.mark.parametrize("num_heads", [1, 2, 3, 6, 8, 12, 14, 16, 25, 32, 40, 64, 112])
def test_slopes_are_those_of_transformers(num_heads: int) -> None:
    met = slopes(num_heads)
    assert (met.dtype, met.shape) == (np.float32, (num_heads,))
    np.testing.assert_allclose(met, _get_alibi_slopes(num_heads, torch.device("cpu")).numpy(), rtol=1e-6)


def test_the_paper_s_example() -> None:
    np.testing.assert_array_equal(slopes(8), [0.5**power for power in range(1, 9)])
