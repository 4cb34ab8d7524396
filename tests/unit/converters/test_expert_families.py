"""What the configs of Mixtral, Qwen2-MoE and Qwen3-MoE say, and what they may not."""

from __future__ import annotations

from typing import Any

import pytest

from llmc.converters import families
from llmc.errors import UnsupportedModelError
from llmc.spec import ModelSpec, Moe

SIZES: dict[str, Any] = {
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 6,
    "vocab_size": 32000,
    "intermediate_size": 11008,
}
QWEN2: dict[str, Any] = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "router_aux_loss_coef": 0.001,
    "output_router_logits": False,
    "sliding_window": 32768,
    "max_window_layers": 21,
    "use_sliding_window": False,
}
QWEN3 = {key: value for key, value in QWEN2.items() if key != "shared_expert_intermediate_size"} | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "head_dim": 128,
}
MIXTRAL: dict[str, Any] = {"architectures": ["MixtralForCausalLM"], "sliding_window": None}


def read(config: dict[str, Any], **changes: Any) -> ModelSpec:
    return families.read_spec({**SIZES, **config, **changes}, "config.json")[1]


def test_defaults_are_those_of_transformers() -> None:
    from transformers import MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig

    for kind, config in ((MixtralConfig, MIXTRAL), (Qwen2MoeConfig, QWEN2), (Qwen3MoeConfig, QWEN3)):
        settings = {key: value for key, value in config.items() if key != "architectures"}
        theirs, ours = kind(**SIZES, **settings), read(config)
        assert ours.moe is not None
        assert (ours.moe.num_experts, ours.moe.top_k) == (theirs.num_experts, theirs.num_experts_per_tok)
        assert ours.moe.renormalise == getattr(theirs, "norm_topk_prob", True)
        assert ours.attention.num_kv_heads == theirs.num_key_value_heads
        assert ours.max_positions == theirs.max_position_embeddings
        assert ours.norm.eps == theirs.rms_norm_eps
        assert ours.position.model_dump()["theta"] == theirs.rope_parameters["rope_theta"]
        assert ours.attention.qkv_bias == getattr(theirs, "qkv_bias", False)


def test_mixtral() -> None:
    assert read(MIXTRAL).moe == Moe(num_experts=8, top_k=2, intermediate_size=11008)
    assert read(MIXTRAL, sliding_window=4096).attention.window == 4096


def test_layers_without_experts() -> None:
    def dense(**changes: Any) -> tuple[int, ...]:
        moe = read(QWEN2, **changes).moe
        assert moe is not None
        return moe.dense_layers

    assert dense() == ()
    assert dense(mlp_only_layers=[0, 3]) == (0, 3)
    assert dense(decoder_sparse_step=2) == (0, 2, 4)
    assert dense(decoder_sparse_step=3, mlp_only_layers=[5]) == (0, 1, 3, 4, 5)


def test_both_names_of_the_number_of_experts() -> None:
    old = read(QWEN3)
    assert read({key: value for key, value in QWEN3.items() if key != "num_experts"}, num_local_experts=60) == old


def test_windows() -> None:
    kinds = ["full_attention", "sliding_attention"] * 3
    spec = read(QWEN2, use_sliding_window=True, layer_types=kinds)
    assert [spec.window(layer) for layer in range(6)] == [None, 32768] * 3
    assert read(QWEN3, use_sliding_window=True, sliding_window=512).attention.window == 512
    assert read(QWEN3).attention.window is None


@pytest.mark.parametrize(
    ("config", "changes", "said"),
    [
        (QWEN2, {"decoder_sparse_step": 0}, ["'decoder_sparse_step'", "0"]),
        (QWEN2, {"mlp_only_layers": ["first"]}, ["'mlp_only_layers'", "'first'"]),
        (QWEN2, {"use_sliding_window": True}, ["'use_sliding_window'", "True"]),
        (QWEN2, {"num_experts": None}, ["'num_experts'", "missing"]),
        (QWEN2, {"num_experts": 3}, ["top_k 4", "num_experts 3"]),
        (QWEN2, {"shared_expert_intermediate_size": None}, ["'shared_expert_intermediate_size'", "missing"]),
        (QWEN2, {"hidden_act": "gelu"}, ["'hidden_act'", "'gelu'"]),
        (QWEN3, {"shared_expert_intermediate_size": 64}, ["'shared_expert_intermediate_size'", "64"]),
        (MIXTRAL, {"num_experts_per_tok": 9}, ["top_k 9", "num_experts 8"]),
        (MIXTRAL, {"n_shared_experts": 1}, ["'n_shared_experts'", "1"]),
    ],
)
def test_what_is_not_supported_is_refused_by_name(config: dict[str, Any], changes: Any, said: list[str]) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        read(config, **changes)
    for part in said:
        assert part in str(caught.value)
