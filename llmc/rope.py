"""Rotary position embedding: the angles, for every scaling of llmc/spec.py.

One table serves the reference decoder, the ONNX builder and the tests. Arithmetic follows transformers
(modeling_rope_utils.py, 5.23) step by step in fp32, because at position 100,000 one unit in the last place of a
frequency is visible; powers are taken in fp64 and rounded, which gives its values to that last place.

The frequencies of `dynamic` and `longrope` depend on how long the whole context is. transformers takes the length of
each call, so that keys cached earlier keep the frequencies of their time. An engine cannot turn cached keys again
and takes one table for the longest context that it is built for, as vLLM does; hence `context`.

Knows: positions and angles. Does not know: which dimensions of a head form a pair, nor who rotates.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from llmc.errors import UnsupportedModelError
from llmc.spec import DynamicScaling, LinearScaling, Llama3Scaling, LongRopeScaling, ModelSpec, Rope, YarnScaling

Floats = npt.NDArray[np.float32]


def rotary_table(
    spec: ModelSpec, length: int, *, context: int | None = None, of: Rope | None = None
) -> tuple[Floats, Floats]:
    """Cosines and sines of positions 0 to `length - 1`, multiplied by the attention factor.

    Args:
        context: Tokens of the whole context that the table is for; by default `length`. Only `dynamic` and
            `longrope` look at it.
        of: One of the model's rotary embeddings, where layers with a window have their own; by default the others'.

    Returns:
        cos, sin: float32 [length, pairs of a head that are turned]; of two axes, the pairs of either.
    """
    rope = of or spec.rope
    frequencies, factor = inverse_frequencies(rope, rope.size(spec.attention.head_dim) // rope.axes, context or length)
    if rope.half:
        frequencies = _rounded(frequencies.astype(np.float16))
    angles = np.arange(length, dtype=np.float32)[:, None] * frequencies
    return _rounded(np.cos(angles.astype(np.float64))) * factor, _rounded(np.sin(angles.astype(np.float64))) * factor


def inverse_frequencies(position: Rope, head_dim: int, length: int) -> tuple[Floats, np.float32]:
    """Radians per position of each pair of a head's dimensions.

    Args:
        head_dim: Dimensions of a head that are turned.
        length: Tokens of the whole context.

    Returns:
        float32 [head_dim / 2], and the factor that multiplies every cosine and sine.

    Raises:
        UnsupportedModelError: longrope's lists do not have one factor for each pair.
    """
    plain, one = _rounded(1 / _powers(position.theta, head_dim)), np.float32(1)
    match position.scaling:
        case None:
            return plain, one
        case LinearScaling(factor=factor):
            return plain / np.float32(factor), one
        case DynamicScaling() as scaling:
            return _dynamic(scaling, position.theta, head_dim, length), one
        case YarnScaling() as scaling:
            return _yarn(scaling, position.theta, head_dim), np.float32(scaling.attention_factor)
        case LongRopeScaling() as scaling:
            return _longrope(scaling, position.theta, head_dim, length), np.float32(scaling.attention_factor)
        case Llama3Scaling() as scaling:
            return _llama3(scaling, plain), one


def _powers(theta: float, head_dim: int) -> Floats:
    """theta^(2i / head_dim) for pair i."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return _rounded(np.power(np.float64(np.float32(theta)), exponents.astype(np.float64)))


def _rounded(values: npt.NDArray[Any]) -> Floats:
    return values.astype(np.float32)


def _dynamic(scaling: DynamicScaling, theta: float, head_dim: int, length: int) -> Floats:
    original = scaling.original_max_positions
    stretch = scaling.factor * max(length, original) / original - (scaling.factor - 1)
    return _rounded(1 / _powers(theta * stretch ** (head_dim / (head_dim - 2)), head_dim))


def _yarn(scaling: YarnScaling, theta: float, head_dim: int) -> Floats:
    def pair_turning(times: float) -> float:
        """The pair (not whole) that turns so many times over the original context."""
        wavelength = scaling.original_max_positions / (times * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(theta))

    low, high = pair_turning(scaling.beta_fast), pair_turning(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # transformers' own guard against a division by zero
    ramp = (np.arange(head_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    kept = 1 - np.clip(ramp, 0, 1)
    powers = _powers(theta, head_dim)
    return _rounded(1 / (np.float32(scaling.factor) * powers) * (1 - kept) + 1 / powers * kept)


def _longrope(scaling: LongRopeScaling, theta: float, head_dim: int, length: int) -> Floats:
    factors = scaling.long_factor if length > scaling.original_max_positions else scaling.short_factor
    if len(factors) != head_dim // 2:
        raise UnsupportedModelError(
            f"longrope has {len(factors)} factors for {head_dim // 2} pairs of a head of {head_dim}"
        )
    return _rounded(1 / (np.array(factors, np.float32) * _powers(theta, head_dim)))


def _llama3(scaling: Llama3Scaling, plain: Floats) -> Floats:
    original, low, high = scaling.original_max_positions, scaling.low_freq_factor, scaling.high_freq_factor
    wavelengths = np.float32(2 * math.pi) / plain
    divided = np.where(wavelengths > np.float32(original / low), plain / np.float32(scaling.factor), plain)
    smooth = (np.float32(original) / wavelengths - np.float32(low)) / np.float32(high - low)
    between = (1 - smooth) * divided / np.float32(scaling.factor) + smooth * divided
    is_between = (wavelengths >= np.float32(original / high)) & (wavelengths <= np.float32(original / low))
    return _rounded(np.where(is_between, between, divided))
