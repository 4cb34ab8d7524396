"""Attention with linear biases: the slope of each head."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt


def slopes(num_heads: int) -> npt.NDArray[np.float32]:
    """By how much each head lowers a score for every token between query and key.

    For a power of two heads, 2^(-8 / heads) to the powers 1, 2, ...; for other counts those of the power of two
    below, and then every second one of the power of two above (Press et al. 2022, their published code).

    Returns:
        float32 [num_heads], positive.
    """
    below = 2 ** int(math.log2(num_heads))
    exponents = np.concatenate(
        (np.arange(1, below + 1) / below, np.arange(1, 2 * (num_heads - below), 2) / (2 * below))
    )
    found: npt.NDArray[np.float32] = np.exp2(-8 * exponents).astype(np.float32)
    return found
