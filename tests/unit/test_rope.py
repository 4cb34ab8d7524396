"""llmc.rope against transformers: frequencies against ROPE_INIT_FUNCTIONS, tables against LlamaRotaryEmbedding."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from llmc.errors import UnsupportedModelError
from llmc.rope import inverse_frequencies, rotary_table
from llmc.spec import (
    Attention,
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Mlp,
    ModelSpec,
    Norm,
    Rope,
    Scaling,
    YarnScaling,
)

HEAD_DIM, ORIGINAL, LONGEST = 64, 128, 512
SHORT, LONG = [1.0 + i / 32 for i in range(32)], [1.0 + i / 4 for i in range(32)]

# case -> (our scaling, theta, what transformers calls the same)
CASES: dict[str, tuple[Scaling | None, float, dict[str, Any]]] = {
    "plain": (None, 10_000.0, {"rope_type": "default"}),
    "plain, large theta": (None, 1_000_000.0, {"rope_type": "default"}),
    "linear": (LinearScaling(factor=4.0), 10_000.0, {"rope_type": "linear", "factor": 4.0}),
    "dynamic": (
        DynamicScaling(factor=2.0, original_max_positions=ORIGINAL),
        10_000.0,
        {"rope_type": "dynamic", "factor": 2.0},
    ),
    "yarn": (
        YarnScaling(factor=4.0, original_max_positions=ORIGINAL, attention_factor=0.1 * math.log(4.0) + 1),
        10_000.0,
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL},
    ),
    "yarn, every option": (
        YarnScaling(
            factor=3.0, original_max_positions=ORIGINAL, attention_factor=0.8, beta_fast=16, beta_slow=2, truncate=False
        ),
        500_000.0,
        {
            "rope_type": "yarn",
            "factor": 3.0,
            "original_max_position_embeddings": ORIGINAL,
            "attention_factor": 0.8,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "truncate": False,
        },
    ),
    "yarn, degenerate ramp": (
        YarnScaling(factor=4.0, original_max_positions=4, attention_factor=1.0),
        10_000.0,
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4, "attention_factor": 1.0},
    ),
    "longrope": (
        LongRopeScaling(
            original_max_positions=ORIGINAL,
            attention_factor=math.sqrt(1 + math.log(4) / math.log(ORIGINAL)),
            short_factor=tuple(SHORT),
            long_factor=tuple(LONG),
        ),
        10_000.0,
        {
            "rope_type": "longrope",
            "factor": 4.0,
            "original_max_position_embeddings": ORIGINAL,
            "short_factor": SHORT,
            "long_factor": LONG,
        },
    ),
    "llama3": (
        Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=ORIGINAL),
        500_000.0,
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": ORIGINAL,
        },
    ),
}


def their_config(case: str) -> LlamaConfig:
    _, theta, parameters = CASES[case]
    return LlamaConfig(
        hidden_size=4 * HEAD_DIM,
        num_attention_heads=4,
        # transformers takes dynamic's original length from the model's longest
        max_position_embeddings=ORIGINAL if parameters["rope_type"] == "dynamic" else LONGEST,
        rope_parameters={"rope_theta": theta, **parameters},
    )


def our_spec(case: str) -> ModelSpec:
    scaling, theta, _ = CASES[case]
    return ModelSpec(
        family="llama",
        vocab_size=8,
        hidden_size=4 * HEAD_DIM,
        num_layers=1,
        max_positions=LONGEST,
        norm=Norm(eps=1e-6),
        position=Rope(theta=theta, scaling=scaling),
        attention=Attention(num_heads=4, num_kv_heads=4, head_dim=HEAD_DIM),
        mlp=Mlp(intermediate_size=8),
    )


def test_every_scaling_has_a_case() -> None:
    kinds = {parameters["rope_type"] for _, _, parameters in CASES.values()}
    assert kinds == set(ROPE_INIT_FUNCTIONS) - {"proportional"} | {"default"}


@pytest.mark.parametrize("length", [5, ORIGINAL, ORIGINAL + 1, LONGEST])
@pytest.mark.parametrize("case", CASES)
def test_frequencies_are_those_of_transformers(case: str, length: int) -> None:
    config = their_config(case)
    kind = CASES[case][2]["rope_type"]
    if kind == "default":
        expected, factor = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    else:
        expected, factor = ROPE_INIT_FUNCTIONS[kind](config, seq_len=length)
    ours, our_factor = inverse_frequencies(our_spec(case).position, HEAD_DIM, length)
    assert ours.dtype == np.float32
    assert ours.shape == (HEAD_DIM // 2,)
    np.testing.assert_array_max_ulp(ours, expected.numpy(), maxulp=2)
    assert our_factor == pytest.approx(factor, rel=1e-7)


@pytest.mark.parametrize("length", [5, ORIGINAL, LONGEST])
@pytest.mark.parametrize("case", CASES)
def test_tables_are_those_of_transformers(case: str, length: int) -> None:
    rotary = LlamaRotaryEmbedding(their_config(case))
    expected_cos, expected_sin = rotary(torch.zeros(1), torch.arange(length)[None])
    cos, sin = rotary_table(our_spec(case), length)
    assert cos.dtype == sin.dtype == np.float32
    # an angle at position p carries p units of the frequency's last place: 512 * 2 * 2^-24
    for ours, theirs in ((cos, expected_cos), (sin, expected_sin)):
        np.testing.assert_allclose(ours, theirs[0, :, : HEAD_DIM // 2].numpy(), rtol=0, atol=6e-5)


@pytest.mark.parametrize("case", CASES)
def test_context_chooses_the_frequencies(case: str) -> None:
    """A table for a long context begins as the long table does; only two kinds notice the difference."""
    spec = our_spec(case)
    whole, _ = rotary_table(spec, LONGEST)
    begun, _ = rotary_table(spec, 5, context=LONGEST)
    short, _ = rotary_table(spec, 5)
    np.testing.assert_array_equal(begun, whole[:5])
    assert np.array_equal(begun, short) == (CASES[case][2]["rope_type"] not in {"dynamic", "longrope"})


def test_longrope_needs_a_factor_for_each_pair() -> None:
    with pytest.raises(UnsupportedModelError, match="32 factors for 16 pairs"):
        inverse_frequencies(our_spec("longrope").position, 32, 5)
