from __future__ import annotations

import numpy as np
import pytest
import tiny_gguf
from hypothesis import given
from hypothesis import strategies as st

from llmc.converters.llama3_factors import recover
from llmc.errors import UnsupportedModelError


@pytest.mark.parametrize(("theta", "head_dim", "factor"), [(500000.0, 128, 8.0), (500000.0, 64, 32.0)])
def test_the_scalings_that_meta_published(theta: float, head_dim: int, factor: float) -> None:
    """Llama 3.1 8B and 70B; Llama 3.2 1B and 3B."""
    published = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    divisors = tiny_gguf.llama3_divisors({**published, "rope_theta": theta}, head_dim)
    assert recover(divisors, theta, head_dim) == published


@given(
    factor=st.sampled_from([2.0, 4.0, 8.0, 16.0, 32.0]),
    high=st.sampled_from([2.0, 3.0, 4.0, 8.0]),
    original=st.sampled_from([2048, 4096, 8192, 16384]),
    theta=st.sampled_from([10000.0, 500000.0, 1000000.0]),
)
def test_others_like_them(factor: float, high: float, original: int, theta: float) -> None:
    scaling = {
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
    divisors = tiny_gguf.llama3_divisors({**scaling, "rope_theta": theta}, 128)
    assert recover(divisors, theta, 128) == {"rope_type": "llama3", **scaling}


def test_nothing_divided_is_no_scaling() -> None:
    assert recover(np.ones(64, np.float32), 10000.0, 128) is None


@pytest.mark.parametrize(
    "divisors",
    [
        np.full(64, 2.0),  # that is linear
        np.linspace(1, 8, 64),
        np.linspace(8, 1, 64),
        np.ones(32),
        np.full(64, 0.5),
        np.array([np.nan] * 64),
    ],
)
def test_what_is_not_llama_3_s_is_refused(divisors: np.ndarray) -> None:
    with pytest.raises(UnsupportedModelError, match="rope_freqs"):
        recover(divisors.astype(np.float32), 10000.0, 128)
