"""Compared with what transformers computes from the same config: the frequencies and the attention factor."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.converters import families
from llmc.rope import inverse_frequencies
from llmc.spec import DynamicScaling, LongRopeScaling, YarnScaling

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "intermediate_size": 96,
    "vocab_size": 320,
}

factors = st.floats(1.0, 32.0).map(lambda value: round(value, 3))
originals = st.sampled_from([32, 64, 4096])
optional = st.none() | st.floats(0.1, 3.0).map(lambda value: round(value, 3))
lists = st.lists(factors, min_size=8, max_size=8)


def without_none(**values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


scalings = st.one_of(
    st.builds(dict, rope_type=st.just("default")),
    st.builds(dict, rope_type=st.just("linear"), factor=factors),
    st.builds(dict, rope_type=st.just("dynamic"), factor=factors),
    st.builds(
        without_none,
        rope_type=st.just("yarn"),
        factor=factors,
        original_max_position_embeddings=originals,
        attention_factor=optional,
        mscale=optional,
        mscale_all_dim=optional,
        beta_fast=st.none() | st.sampled_from([16.0, 32.0, 64.0]),
        beta_slow=st.none() | st.sampled_from([0.5, 1.0, 2.0]),
        truncate=st.none() | st.booleans(),
    ),
    st.builds(
        without_none,
        rope_type=st.just("longrope"),
        factor=st.none() | factors,
        original_max_position_embeddings=originals,
        attention_factor=optional,
        short_factor=lists,
        long_factor=lists,
    ),
    st.builds(
        dict,
        rope_type=st.just("llama3"),
        factor=factors,
        low_freq_factor=st.sampled_from([1.0, 2.0]),
        high_freq_factor=st.sampled_from([4.0, 8.0]),
        original_max_position_embeddings=originals,
    ),
)


def theirs(config: dict[str, Any], length: int) -> tuple[np.ndarray, float]:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    made = LlamaConfig(**{key: value for key, value in config.items() if key != "architectures"})
    kind = made.rope_parameters["rope_type"]
    if kind == "default":
        plain = LlamaRotaryEmbedding(made)
        return plain.inv_freq.numpy(), plain.attention_scaling
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](made, None, seq_len=length)
    return frequencies.numpy(), factor


@given(
    scaling=scalings,
    theta=st.sampled_from([10000.0, 500000.0]),
    maximum=st.sampled_from([64, 4096, 131072]),
    spelling=st.sampled_from(["rope_parameters", "rope_scaling", "type"]),
    long=st.booleans(),
)
@settings(max_examples=150, deadline=None)
@pytest.mark.filterwarnings("ignore")
def test_frequencies_are_those_of_transformers(
    scaling: dict[str, Any], theta: float, maximum: int, spelling: str, long: bool
) -> None:
    config: dict[str, Any] = {**SIZES, "max_position_embeddings": maximum, "architectures": ["LlamaForCausalLM"]}
    if spelling == "rope_parameters":
        config["rope_parameters"] = {**scaling, "rope_theta": theta}
    else:
        named = dict(scaling)
        if spelling == "type":
            named["type"] = named.pop("rope_type")
        config |= {"rope_scaling": named, "rope_theta": theta}
    length = 200000 if long else 16
    expected, factor = theirs(config, length)
    family, spec = families.read_spec(config, "config.json")
    met, met_factor = inverse_frequencies(spec.position, spec.attention.head_dim, length)
    np.testing.assert_allclose(met, expected, rtol=3e-6)
    assert met_factor == pytest.approx(factor, rel=1e-6)
    assert families.read_spec(family.write(spec), "written") == (family, spec)


def read(**changes: Any) -> Any:
    config = {**SIZES, "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 1000, **changes}
    return families.read_spec(config, "config.json")[1]


def test_where_the_original_context_is_found() -> None:
    dynamic = read(rope_scaling={"type": "dynamic", "factor": 3.0})
    assert dynamic.position.scaling == DynamicScaling(factor=3.0, original_max_positions=1000)
    assert dynamic.max_positions == 3000
    yarn = read(rope_scaling={"type": "yarn", "factor": 4.0})
    assert isinstance(yarn.position.scaling, YarnScaling)
    assert (yarn.position.scaling.original_max_positions, yarn.max_positions) == (1000, 4000)
    lists = {"short_factor": [1] * 8, "long_factor": [2] * 8}
    outside = read(original_max_position_embeddings=100, rope_scaling={"type": "longrope", **lists})
    assert isinstance(outside.position.scaling, LongRopeScaling)
    assert outside.position.scaling.original_max_positions == 100
    assert outside.max_positions == 1000


def test_scaling_wins_over_parameters_as_in_transformers() -> None:
    spec = read(
        rope_theta=7.0,
        rope_scaling={"rope_type": "linear", "factor": 2.0},
        rope_parameters={"rope_type": "default", "rope_theta": 9.0},
    )
    assert spec.position.scaling is not None
    assert spec.position.theta == 7.0
