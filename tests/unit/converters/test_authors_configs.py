"""Configs of ChatGLM-6B, ChatGLM2, ChatGLM3, GLM-4-9B, Qwen 1 and Gemma 3 as their authors publish them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny

from llmc.checkpoint import Checkpoint
from llmc.converters import families, hf
from llmc.errors import CheckpointError, UnsupportedModelError
from llmc.spec import LinearScaling, ModelSpec, Norm, Prefix, Rope

CHATGLM3: dict[str, Any] = {
    "_name_or_path": "THUDM/chatglm3-6b",
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "auto_map": {"AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration"},
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "ffn_hidden_size": 13696,
    "fp32_residual_connection": False,
    "hidden_dropout": 0.0,
    "hidden_size": 4096,
    "kv_channels": 128,
    "layernorm_epsilon": 1e-05,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 32,
    "num_layers": 28,
    "original_rope": True,
    "padded_vocab_size": 65024,
    "post_layer_norm": True,
    "rmsnorm": True,
    "seq_length": 8192,
    "use_cache": True,
    "torch_dtype": "float16",
    "transformers_version": "4.30.2",
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CHATGLM: dict[str, Any] = {
    "_name_or_path": "THUDM/chatglm-6b",
    "architectures": ["ChatGLMModel"],
    "auto_map": {"AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration"},
    "bos_token_id": 130004,
    "eos_token_id": 130005,
    "gmask_token_id": 130001,
    "hidden_size": 4096,
    "inner_hidden_size": 16384,
    "layernorm_epsilon": 1e-05,
    "mask_token_id": 130000,
    "max_sequence_length": 2048,
    "model_type": "chatglm",
    "num_attention_heads": 32,
    "num_layers": 28,
    "pad_token_id": 3,
    "position_encoding_2d": True,
    "pre_seq_len": None,
    "prefix_projection": False,
    "quantization_bit": 0,
    "torch_dtype": "float16",
    "transformers_version": "4.27.1",
    "use_cache": True,
    "vocab_size": 130528,
}
QWEN: dict[str, Any] = {
    "architectures": ["QWenLMHeadModel"],
    "auto_map": {"AutoConfig": "configuration_qwen.QWenConfig"},
    "attn_dropout_prob": 0.0,
    "bf16": False,
    "emb_dropout_prob": 0.0,
    "fp16": False,
    "fp32": False,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "initializer_range": 0.02,
    "kv_channels": 128,
    "layer_norm_epsilon": 1e-06,
    "max_position_embeddings": 32768,
    "model_type": "qwen",
    "no_bias": True,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "onnx_safe": None,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "seq_length": 8192,
    "tie_word_embeddings": False,
    "tokenizer_class": "QWenTokenizer",
    "transformers_version": "4.32.0",
    "use_cache": True,
    "use_dynamic_ntk": True,
    "use_flash_attn": "auto",
    "use_logn_attn": True,
    "vocab_size": 151936,
}
GEMMA3: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 106],
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "initializer_range": 0.02,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 262144,
}


def read(config: dict[str, Any], **changes: Any) -> ModelSpec:
    return families.read_spec({**config, **changes}, "config.json")[1]


def test_chatglm3_6b() -> None:
    spec = read(CHATGLM3)
    assert (spec.vocab_size, spec.hidden_size, spec.num_layers, spec.max_positions) == (65024, 4096, 28, 8192)
    assert (spec.attention.num_heads, spec.attention.num_kv_heads, spec.attention.head_dim) == (32, 2, 128)
    assert (spec.attention.qkv_bias, spec.attention.o_bias, spec.mlp.bias) == (True, False, False)
    assert (spec.mlp.intermediate_size, spec.norm.eps, spec.tied) == (13696, 1e-5, False)
    assert spec.position == Rope(theta=10000.0, fraction=0.5, interleaved=True)


def test_rope_ratio_means_what_each_model_s_code_makes_of_it() -> None:
    third, second = read(CHATGLM3, rope_ratio=50), read(CHATGLM3, rope_ratio=4, _name_or_path="x/ChatGLM2-6b-32k")
    glm4 = read(CHATGLM3, rope_ratio=500, _name_or_path="THUDM/glm-4-9b-chat")
    assert (third.rope.theta, third.rope.scaling) == (500000.0, None)
    assert (glm4.rope.theta, glm4.rope.scaling) == (5000000.0, None)
    assert (second.rope.theta, second.rope.scaling) == (10000.0, LinearScaling(factor=4.0))


def test_qwen_7b() -> None:
    spec = read(QWEN)
    assert (spec.vocab_size, spec.hidden_size, spec.num_layers, spec.max_positions) == (151936, 4096, 32, 8192)
    assert (spec.attention.num_heads, spec.attention.num_kv_heads, spec.attention.head_dim) == (32, 32, 128)
    assert (spec.attention.qkv_bias, spec.attention.o_bias) == (True, False)
    assert (spec.mlp.intermediate_size, spec.norm.eps) == (11008, 1e-6)


def test_chatglm_6b() -> None:
    spec = read(CHATGLM)
    assert (spec.family, spec.max_positions, spec.tied) == ("chatglm", 2048, False)
    assert spec.prefix == Prefix(end=130004, marks=(130001, 130000))
    assert spec.position == Rope(axes=2, half=True)
    assert spec.norm == Norm(kind="layer", eps=1e-5, residual_scale=56**0.5)
    assert (spec.attention.head_dim, spec.mlp.intermediate_size, spec.mlp.activation) == (128, 16384, "gelu_tanh")
    # Of any depth: what the authors' code takes the root of is no setting.
    assert read(CHATGLM, num_layers=12).norm.residual_scale == 56**0.5
    # The first release named neither mask, and had 20,000 tokens of images before all others.
    first = {"bos_token_id": 150004, "gmask_token_id": None, "mask_token_id": None, "vocab_size": 150528}
    assert read(CHATGLM, **first).prefix == Prefix(end=150004, marks=(150001, 150000))


def test_one_architecture_of_two_families() -> None:
    assert [read(config).family for config in (CHATGLM, CHATGLM3)] == ["chatglm", "chatglm2"]
    assert read(CHATGLM3, position_encoding_2d=False).family == "chatglm2"


def test_gemma_3_1b() -> None:
    spec = read(GEMMA3)
    assert [layer for layer in range(26) if spec.window(layer) is None] == [5, 11, 17, 23]
    assert (spec.window(0), spec.tied, spec.embedding_scale) == (512, True, 1152**0.5)
    assert (spec.rope_of(5).theta, spec.rope_of(0)) == (1e6, Rope(theta=1e4))
    assert (spec.attention.scale, spec.attention.qk_norm, spec.norm.plus_one, spec.norm.order) == (
        1 / 16, True, True, "both",
    )  # fmt: skip
    scaled = read(GEMMA3, rope_scaling={"factor": 8.0, "rope_type": "linear"})
    assert (scaled.rope_of(5).scaling, scaled.rope_of(0).scaling) == (LinearScaling(factor=8.0), None)


@pytest.mark.parametrize(
    ("config", "changes", "said"),
    [
        (GEMMA3, {"final_logit_softcapping": 30.0}, ["'final_logit_softcapping'", "30.0"]),
        (GEMMA3, {"hidden_activation": "silu"}, ["'hidden_activation'", "'silu'"]),
        (GEMMA3, {"layer_types": ["chunked_attention"] * 26}, ["'layer_types'", "chunked_attention"]),
        (GEMMA3, {"vision_config": {}}, ["'vision_config'"]),
        (CHATGLM3, {"rope_ratio": 8, "_name_or_path": "mine"}, ["'rope_ratio'", "8.0", "'mine'", "_name_or_path"]),
        (CHATGLM, {"pre_seq_len": 128}, ["'pre_seq_len'", "128", "trained prefix"]),
        (CHATGLM, {"quantization_bit": 4}, ["'quantization_bit'", "4"]),
        (CHATGLM, {"bos_token_id": None}, ["'bos_token_id'", "missing"]),
        (CHATGLM, {"inner_hidden_size": None}, ["'inner_hidden_size'", "missing"]),
        (CHATGLM, {"rope_ratio": 2}, ["'rope_ratio'", "2"]),
        (CHATGLM3, {"multi_query_attention": False}, ["'multi_query_attention'", "False"]),
        (CHATGLM3, {"add_bias_linear": True}, ["'add_bias_linear'", "True"]),
        (CHATGLM3, {"rmsnorm": False}, ["'rmsnorm'", "False"]),
        (CHATGLM3, {"quantization_bit": 4}, ["'quantization_bit'", "4"]),
        (CHATGLM3, {"pre_seq_len": 128}, ["'pre_seq_len'", "128"]),
        (CHATGLM3, {"kv_channels": None}, ["'kv_channels'", "missing"]),
        (CHATGLM3, {"vision_config": {}}, ["'vision_config'"]),
        (QWEN, {"no_bias": False}, ["'no_bias'", "False"]),
        (QWEN, {"rotary_pct": 0.5}, ["'rotary_pct'", "0.5"]),
        (QWEN, {"seq_length": None}, ["'seq_length'", "missing"]),
        (QWEN, {"visual": {"width": 1}}, ["'visual'"]),
    ],
)
def test_what_is_not_supported_is_refused_by_name(config: dict[str, Any], changes: Any, said: list[str]) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        read(config, **changes)
    for part in said:
        assert part in str(caught.value)


def test_code_that_came_along_is_not_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = tiny.save(tiny.TINY["chatglm3"], tmp_path / "source")
    (source / "modeling_chatglm.py").write_text("raise SystemExit('this was run')", encoding="utf-8")
    hf.convert(source, tmp_path / "out")
    assert "auto_map" in caplog.text
    assert Checkpoint(tmp_path / "out").spec.family == "chatglm2"


def test_a_missing_tensor_is_named_as_the_authors_name_it(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = tiny.save(tiny.TINY["qwen1"], tmp_path / "source")
    state = load_file(source / "model.safetensors")
    del state["transformer.h.1.mlp.w2.weight"]
    save_file(state, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"'transformer\.h\.1\.mlp\.w2\.weight'"):
        hf.convert(source, tmp_path / "out")
