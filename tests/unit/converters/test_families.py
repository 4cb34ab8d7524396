from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from oracles import ORACLES

import llmc.converters.families
from llmc.converters import families
from llmc.errors import UnsupportedModelError
from llmc.spec import LinearScaling, ModelSpec

LLAMA_1: dict[str, Any] = {
    # What the first conversions of LLaMA 7B said: no key-value heads, no theta, no head size.
    "architectures": ["LLaMAForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 1,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "initializer_range": 0.02,
    "max_sequence_length": None,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "pad_token_id": -1,
    "rms_norm_eps": 1e-06,
    "torch_dtype": "float16",
    "transformers_version": "4.27.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}


def read(architecture: str = "LlamaForCausalLM", **changes: Any) -> ModelSpec:
    return families.read_spec({**LLAMA_1, "architectures": [architecture], **changes}, "config.json")[1]


def refused(architecture: str = "LlamaForCausalLM", **changes: Any) -> str:
    with pytest.raises(UnsupportedModelError) as caught:
        read(architecture, **changes)
    return str(caught.value)


def test_every_file_of_the_folder_is_a_family_and_has_a_tiny_model() -> None:
    folder = Path(llmc.converters.families.__file__).parent
    files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert set(families.load_all()) == files == {case.model_type for case in tiny.TINY.values()}
    assert len(files) >= 4
    for name in files:
        assert len((folder / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= 60, name


@pytest.mark.parametrize("name", tiny.TINY)
def test_what_is_written_reads_back(name: str, tiny_source: Callable[[str], Path]) -> None:
    config = json.loads((tiny_source(name) / "config.json").read_text(encoding="utf-8"))
    family, spec = families.read_spec(config, name)
    written = family.write(spec)
    assert families.read_spec(written, name) == (family, spec)
    assert json.loads(json.dumps(written)) == written


@pytest.mark.parametrize("name", [name for name, case in tiny.TINY.items() if case.model_type not in ORACLES])
def test_transformers_reads_what_is_written_as_it_reads_the_original(
    name: str, tiny_source: Callable[[str], Path]
) -> None:
    from transformers import AutoConfig

    original = AutoConfig.from_pretrained(tiny_source(name))
    family, spec = families.read_spec(original.to_dict(), name)
    written = family.write(spec)
    again = AutoConfig.for_model(written.pop("model_type"), **written)
    keys = ("vocab_size", "hidden_size", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "sliding_window")
    for key in keys:
        assert getattr(again, key, None) == getattr(original, key, None), key
    assert getattr(again, "layer_types", None) == getattr(original, "layer_types", None)


def test_an_old_config_gets_the_family_s_defaults() -> None:
    spec = read("LLaMAForCausalLM")
    assert (spec.attention.num_kv_heads, spec.attention.head_dim) == (32, 128)
    assert (spec.max_positions, spec.position.theta, spec.tied) == (2048, 10000.0, False)
    assert (spec.attention.qkv_bias, spec.attention.o_bias, spec.mlp.bias) == (False, False, False)


def test_defaults_of_the_other_families_are_those_of_transformers() -> None:
    from transformers import MistralConfig, Qwen2Config, Qwen3Config

    sizes = {"hidden_size": 4096, "num_attention_heads": 32, "num_hidden_layers": 32, "vocab_size": 32000}
    for kind, architecture in (
        (MistralConfig, "MistralForCausalLM"),
        (Qwen2Config, "Qwen2ForCausalLM"),
        (Qwen3Config, "Qwen3ForCausalLM"),
    ):
        theirs, ours = kind(**sizes, intermediate_size=11008), read(architecture)
        assert ours.attention.num_kv_heads == theirs.num_key_value_heads
        assert ours.max_positions == theirs.max_position_embeddings
        assert ours.attention.head_dim == (getattr(theirs, "head_dim", None) or 128)
        assert ours.attention.window == theirs.sliding_window
        assert ours.norm.eps == theirs.rms_norm_eps
        assert ours.position.theta == theirs.rope_parameters["rope_theta"]


def test_switches_of_the_families() -> None:
    biased = read(attention_bias=True)
    assert (biased.attention.qkv_bias, biased.attention.o_bias, biased.mlp.bias) == (True, True, False)
    assert read(mlp_bias=True).mlp.bias
    qwen2 = read("Qwen2ForCausalLM").attention
    assert (qwen2.qkv_bias, qwen2.o_bias, qwen2.qk_norm) == (True, False, False)
    qwen3 = read("Qwen3ForCausalLM", attention_bias=True).attention
    assert (qwen3.qkv_bias, qwen3.o_bias, qwen3.qk_norm) == (True, True, True)
    assert read("MistralForCausalLM", sliding_window=None).attention.window is None
    assert read("MistralForCausalLM", sliding_window=512).attention.window == 512
    assert read("MistralForCausalLM", head_dim=96).attention.head_dim == 96


def test_windows_of_qwen() -> None:
    def windows(**changes: Any) -> list[int | None]:
        spec = read("Qwen2ForCausalLM", num_hidden_layers=4, **changes)
        return [spec.window(layer) for layer in range(4)]

    assert windows(sliding_window=16, max_window_layers=2) == [None] * 4
    assert windows(use_sliding_window=True, sliding_window=16, max_window_layers=2) == [None, None, 16, 16]
    assert windows(use_sliding_window=True, sliding_window=16, max_window_layers=4) == [None] * 4
    assert windows(use_sliding_window=True, sliding_window=None, max_window_layers=0) == [None] * 4
    types = ["sliding_attention", "full_attention"] * 2
    assert windows(use_sliding_window=True, sliding_window=16, layer_types=types) == [16, None, 16, None]
    assert "layer_types" in refused("Qwen2ForCausalLM", num_hidden_layers=4, layer_types=types)
    assert "layer_types" in refused("Qwen2ForCausalLM", num_hidden_layers=5, layer_types=types)
    assert "chunked" in refused("Qwen2ForCausalLM", num_hidden_layers=1, layer_types=["chunked_attention"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_act": "gelu"}, ["'hidden_act'", "'gelu'"]),
        ({"quantization_config": {"bits": 4}}, ["'quantization_config'", "'bits': 4"]),
        ({"partial_rotary_factor": 0.5}, ["'partial_rotary_factor'", "0.5"]),
        ({"num_hidden_layers": "many"}, ["'num_hidden_layers'", "'many'"]),
        ({"num_attention_heads": True}, ["'num_attention_heads'", "True"]),
        ({"attention_bias": 1}, ["'attention_bias'", "1"]),
        ({"vocab_size": None}, ["'vocab_size'", "missing"]),
        ({"logit_scale": 2.0}, ["'logit_scale'", "2.0"]),
        ({"num_key_value_heads": 5}, ["32", "5"]),
        ({"rms_norm_eps": -1.0}, ["eps", "-1.0"]),
        ({"rope_interleaved": True}, ["'rope_interleaved'", "True"]),
        ({"rope_scaling": {"type": "linear"}}, ["rope_scaling", "'factor'", "missing"]),
        ({"rope_scaling": {"type": "su", "factor": 2.0}}, ["rope_scaling", "'su'", "longrope"]),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "temperature": 3}}, ["'temperature'", "3"]),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, ["factor", "0.5"]),
        ({"rope_scaling": {"type": "longrope", "long_factor": [1, "x"]}}, ["'"]),
        ({"rope_scaling": [1]}, ["'rope_scaling'", "[1]"]),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, ["'full_attention'"]),
    ],
)
def test_what_is_not_supported_is_refused_by_name_and_value(changes: dict[str, Any], said: list[str]) -> None:
    message = refused(**changes)
    for part in said:
        assert part in message


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("gpt2", {"activation_function": "quick_gelu"}, ["'activation_function'", "'quick_gelu'"]),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, ["'scale_attn_by_inverse_layer_idx'", "True"]),
        ("gpt2", {"scale_attn_weights": False}, ["'scale_attn_weights'", "False"]),
        ("gpt2", {"n_ctx": 77}, ["'n_ctx'", "77", "256"]),
        ("gpt2", {"add_cross_attention": True}, ["'add_cross_attention'", "True"]),
        ("gpt2", {"rope_theta": 10000.0}, ["'rope_theta'"]),
        ("opt", {"activation_function": "silu"}, ["'activation_function'", "'silu'"]),
        ("opt", {"enable_bias": False}, ["'enable_bias'", "False"]),
        ("opt", {"_remove_final_layer_norm": True}, ["'_remove_final_layer_norm'", "True"]),
        ("opt", {"layer_norm_elementwise_affine": False}, ["'layer_norm_elementwise_affine'", "False"]),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, ["'apply_residual_connection_post_layernorm'"]),
        ("bloom", {"n_inner": 100}, ["'n_inner'", "100", "256"]),
        ("bloom", {"hidden_act": "relu"}, ["'hidden_act'", "'relu'"]),
        ("baichuan-7b", {"rope_theta": 5e5}, ["'rope_theta'", "500000.0"]),
        ("baichuan-13b", {"rope_scaling": {"type": "linear", "factor": 2.0}}, ["'rope_scaling'"]),
        ("baichuan2-13b", {"hidden_act": "gelu"}, ["'hidden_act'", "'gelu'"]),
        ("gpt2", {"n_head": 5}, ["5 heads", "64"]),
        ("glm", {"hidden_act": "gelu"}, ["'hidden_act'", "'gelu'"]),
        ("glm", {"mlp_bias": True}, ["'mlp_bias'", "True"]),
        ("glm", {"sliding_window": 128}, ["'sliding_window'", "128"]),
        ("glm", {"rope_interleaved": True}, ["'rope_interleaved'", "True"]),
        ("glm4", {"hidden_act": "relu"}, ["'hidden_act'", "'relu'"]),
        ("glm4", {"use_qk_norm": True}, ["'use_qk_norm'", "True"]),
        ("glm4", {"num_key_value_heads": 3}, ["4", "3"]),
        ("glm4", {"rope_scaling": {"rope_type": "mrope", "mrope_section": [8, 12, 12]}}, ["'mrope'"]),
    ],
)
def test_what_the_other_families_refuse(
    name: str, changes: dict[str, Any], said: list[str], tiny_source: Callable[[str], Path]
) -> None:
    config = json.loads((tiny_source(name) / "config.json").read_text(encoding="utf-8"))
    with pytest.raises(UnsupportedModelError) as caught:
        families.read_spec({**config, **changes}, "config.json")
    for part in said:
        assert part in str(caught.value)


def test_the_published_config_of_gpt2_is_read() -> None:
    config = {
        "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
        "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12,
        "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": None, "summary_first_dropout": 0.1,
        "summary_proj_to_labels": True, "summary_type": "cls_index", "summary_use_proj": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}, "vocab_size": 50257,
    }  # fmt: skip
    spec = families.read_spec(config, "config.json")[1]
    assert (spec.mlp.intermediate_size, spec.mlp.activation, spec.tied) == (3072, "gelu_tanh", True)


def test_the_published_config_of_bloom_is_read() -> None:
    config = {
        "apply_residual_connection_post_layernorm": False, "attention_dropout": 0.0, "attention_softmax_in_fp32": True,
        "architectures": ["BloomModel"], "bias_dropout_fusion": True, "bos_token_id": 1, "eos_token_id": 2,
        "hidden_dropout": 0.0, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "masked_softmax_fusion": True,
        "model_type": "bloom", "n_embed": 1024, "n_inner": None, "n_layer": 24, "num_attention_heads": 16,
        "offset_alibi": 100, "pad_token_id": 3, "pretraining_tp": 1, "seq_length": 2048, "skip_bias_add": True,
        "skip_bias_add_qkv": False, "transformers_version": "4.20.0", "unk_token_id": 0, "use_cache": True,
        "vocab_size": 250880,
    }  # fmt: skip
    spec = families.read_spec(config, "config.json")[1]
    assert (spec.hidden_size, spec.mlp.intermediate_size, spec.attention.num_heads) == (1024, 4096, 16)


def test_the_four_baichuans_are_told_apart() -> None:
    common = {
        "architectures": ["BaichuanForCausalLM"], "hidden_act": "silu", "rms_norm_eps": 1e-06,
        "model_type": "baichuan", "model_max_length": 4096, "tie_word_embeddings": False,
    }  # fmt: skip
    small = {"hidden_size": 4096, "num_attention_heads": 32, "num_hidden_layers": 32, "intermediate_size": 11008}
    large = {"hidden_size": 5120, "num_attention_heads": 40, "num_hidden_layers": 40, "intermediate_size": 13696}
    small["max_position_embeddings"] = 4096
    for sizes, kind in ((small, "rope"), (large, "alibi")):
        for vocabulary, more, is_second in (
            (64000, {}, False),
            (125696, {}, True),
            (64000, {"z_loss_weight": 0}, True),
        ):
            config = {**common, **sizes, **more, "vocab_size": vocabulary}
            spec = families.read_spec(config, "config.json")[1]
            assert (spec.position.kind, spec.normalised_head, spec.max_positions) == (kind, is_second, 4096)


def test_a_setting_of_another_family_is_refused() -> None:
    assert "'attention_bias'" in refused("MistralForCausalLM", attention_bias=True)
    assert "'mlp_bias'" in refused("Qwen2ForCausalLM", mlp_bias=True)
    assert "'sliding_window'" in refused("LlamaForCausalLM", sliding_window=128)


def test_training_and_bookkeeping_settings_are_passed_over() -> None:
    harmless = {"pretraining_tp": 2, "attention_dropout": 0.1, "_name_or_path": "x", "unsloth_version": "1"}
    assert read(**harmless) == read()


def test_another_architecture_is_refused_with_those_that_there_are() -> None:
    message = refused("T5ForConditionalGeneration")
    for part in ("T5ForConditionalGeneration", "LlamaForCausalLM", "Qwen3ForCausalLM"):
        assert part in message
    with pytest.raises(UnsupportedModelError, match="architectures"):
        families.read_spec({}, "config.json")
    with pytest.raises(UnsupportedModelError, match="'t5'"):
        families.by_name("t5")


def test_the_older_spelling_of_a_scaling_is_read() -> None:
    for spelling in ({"type": "linear"}, {"rope_type": "linear"}):
        spec = read(rope_theta=500.0, rope_scaling={**spelling, "factor": 4})
        assert spec.position.scaling == LinearScaling(factor=4.0)
        assert spec.position.theta == 500.0
