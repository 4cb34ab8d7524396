"""Llama 3's rotary scaling, found again from the factors that llama.cpp keeps in its place.

A GGUF file has no key for it but a tensor, `rope_freqs.weight`: what each frequency is divided by. Low frequencies are
divided by the scaling's `factor`, high ones by 1, and in between 1/divisor is a straight line in the frequency, whose
slope and offset give the rest (up to one number, `low_freq_factor`, which is 1 in every model that there is).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from llmc.errors import UnsupportedModelError
from llmc.rope import inverse_frequencies
from llmc.spec import Llama3Scaling, Rope

_TOLERANCE = 1e-4  # relative, of a divisor; float32 on both sides


def recover(divisors: npt.NDArray[Any], theta: float, head_dim: int) -> dict[str, Any] | None:
    """The `rope_scaling` section of a config that divides the frequencies so.

    Args:
        divisors: [head_dim / 2], at least 1.

    Returns:
        None when nothing is divided.

    Raises:
        UnsupportedModelError: No scaling of this kind has these factors.
    """
    divisors = divisors.astype(np.float64)
    factor = float(str(np.float32(divisors.max())))
    if divisors.shape == (head_dim // 2,) and np.allclose(divisors, 1, rtol=_TOLERANCE):
        return None
    scaling = _fit(divisors, theta, head_dim, factor) if divisors.shape == (head_dim // 2,) else None
    if scaling is None:
        raise UnsupportedModelError(
            f"rope_freqs.weight {list(divisors.shape)} scales the rotary frequencies in a way that llmc does not know: "
            "it supports Llama 3's"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_positions,
    }


def _fit(divisors: npt.NDArray[np.float64], theta: float, head_dim: int, factor: float) -> Llama3Scaling | None:
    between = (divisors > 1 + _TOLERANCE) & (divisors < factor * (1 - _TOLERANCE))
    plain = inverse_frequencies(Rope(theta=theta), head_dim, 1)[0].astype(np.float64)
    if between.sum() < 2 or factor <= 1:
        return None
    # 1/divisor = (1 - s)/factor + s, and s = (original / wavelength - low) / (high - low), with low = 1.
    smooth = (1 / divisors[between] - 1 / factor) / (1 - 1 / factor)
    slope, offset = np.polyfit(plain[between] / (2 * math.pi), smooth, 1)
    if offset >= 0 or slope <= 0:
        return None
    high = 1 - 1 / offset
    # Both are round numbers in every config; the fit is as exact as float32 is.
    scaling = Llama3Scaling(
        factor=factor,
        low_freq_factor=1.0,
        high_freq_factor=round(high, 2),
        original_max_positions=max(1, round(slope * (high - 1))),
    )
    scaled = inverse_frequencies(Rope(theta=theta, scaling=scaling), head_dim, 1)[0].astype(np.float64)
    return scaling if np.allclose(plain / scaled, divisors, rtol=_TOLERANCE) else None
