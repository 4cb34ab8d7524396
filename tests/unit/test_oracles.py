"""The oracles of tests/oracles.py where transformers can say the same in other words."""

from __future__ import annotations

import oracles
import pytest
import tiny
import torch
from torch import Tensor
from transformers import GlmConfig, GlmForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.models.bloom.modeling_bloom import _get_alibi_slopes


@pytest.mark.parametrize("name", ["baichuan-7b", "baichuan2-7b"])
@torch.inference_mode()
def test_baichuan_7b_is_llama(name: str) -> None:
    """With W_pack cut into three, and the head's rows divided by their lengths for Baichuan2."""
    oracle = tiny.TINY[name].build()
    state = dict(oracle.state_dict())
    for key in [key for key in state if "W_pack" in key]:
        for part, values in zip("qkv", state.pop(key).chunk(3), strict=True):
            state[key.replace("W_pack", f"{part}_proj")] = values
    if name == "baichuan2-7b":
        head = state["lm_head.weight"]
        state["lm_head.weight"] = head / head.norm(dim=1, keepdim=True)
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
    settings = {key: oracle.settings[key] for key in (*keys, "rms_norm_eps", "tie_word_embeddings")}
    llama = LlamaForCausalLM(LlamaConfig(**settings)).eval()
    llama.load_state_dict(state)
    tokens = torch.tensor([tiny.tokens(40)])
    torch.testing.assert_close(oracle(tokens).logits, llama(tokens).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("heads", [1, 2, 6, 12, 32, 40])
def test_slopes_of_the_published_recursion(heads: int) -> None:
    slopes = torch.tensor(oracles.alibi_slopes(heads))
    torch.testing.assert_close(slopes, _get_alibi_slopes(heads, torch.device("cpu")))


def renamed(oracle: oracles.Oracle, names: dict[str, str], cut: dict[str, dict[str, int]]) -> dict[str, Tensor]:
    """The tensors of an oracle under the names of transformers.

    Args:
        names: What is called otherwise there.
        cut: By a part of the new name: the pieces of what is one tensor here, and how many rows each has.
    """
    found = {}
    for name, values in oracle.state_dict().items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        part = next((part for part in cut if part in name), "")
        pieces = cut.get(part, {"": len(values)})
        for piece, rows in zip(pieces, values.split(list(pieces.values())), strict=True):
            found[name.replace(part, piece)] = rows
    return found


def qwen2(oracle: oracles.Oracle) -> Qwen2ForCausalLM:
    c = oracle.config
    names = {
        "transformer.wte": "model.embed_tokens", "transformer.ln_f": "model.norm", "transformer.h.": "model.layers.",
        "ln_1": "input_layernorm", "ln_2": "post_attention_layernorm", "attn.c_proj": "self_attn.o_proj",
        "attn.c_attn": "self_attn.c_attn", "mlp.w1": "mlp.up_proj", "mlp.w2": "mlp.gate_proj",
        "mlp.c_proj": "mlp.down_proj",
    }  # fmt: skip
    qkv = {f"{x}_proj": c.hidden_size for x in "qkv"}
    config = Qwen2Config(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size // 2,
        num_hidden_layers=c.num_hidden_layers, num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_attention_heads, rms_norm_eps=c.layer_norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": float(c.rotary_emb_base)},
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).eval()
    model.load_state_dict(renamed(oracle, names, {"c_attn": qkv}))
    return model


@pytest.mark.parametrize("name", ["qwen1", "qwen1-deep"])
@torch.inference_mode()
def test_qwen_1_is_qwen2_up_to_its_trained_length(name: str) -> None:
    oracle = tiny.TINY[name].build()
    model, trained = qwen2(oracle), oracle.config.seq_length
    tokens = torch.tensor([tiny.tokens(trained + 1)])
    torch.testing.assert_close(oracle(tokens[:, :-1]).logits, model(tokens[:, :-1]).logits, rtol=0, atol=1e-4)
    assert (oracle(tokens).logits - model(tokens).logits).abs().max() > 0.1
    oracle.config.use_dynamic_ntk = oracle.config.use_logn_attn = False
    torch.testing.assert_close(oracle(tokens).logits, model(tokens).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["chatglm3", "chatglm3-32k", "chatglm2-32k"])
@torch.inference_mode()
def test_chatglm2_is_glm(name: str) -> None:
    oracle = tiny.TINY[name].build()
    c = oracle.config
    names = {
        "transformer.embedding.word_embeddings": "model.embed_tokens", "transformer.output_layer": "lm_head",
        "transformer.encoder.final_layernorm": "model.norm", "transformer.encoder.": "model.",
        "self_attention.dense": "self_attn.o_proj", "self_attention": "self_attn",
        "mlp.dense_h_to_4h": "mlp.gate_up_proj", "mlp.dense_4h_to_h": "mlp.down_proj",
    }  # fmt: skip
    rows = [count * c.kv_channels for count in (c.num_attention_heads, *[c.multi_query_group_num] * 2)]
    rope = {"rope_type": "default", "rope_theta": 10000.0 * c.rope_ratio}
    if name == "chatglm2-32k":
        rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": c.rope_ratio}
    config = GlmConfig(
        vocab_size=c.padded_vocab_size, hidden_size=c.hidden_size, intermediate_size=c.ffn_hidden_size,
        num_hidden_layers=c.num_layers, num_attention_heads=c.num_attention_heads, head_dim=c.kv_channels,
        num_key_value_heads=c.multi_query_group_num, attention_bias=c.add_qkv_bias, pad_token_id=c.pad_token_id,
        rms_norm_eps=c.layernorm_epsilon, rope_parameters={**rope, "partial_rotary_factor": 0.5},
    )  # fmt: skip
    model = GlmForCausalLM(config).eval()
    model.load_state_dict(
        renamed(oracle, names, {"query_key_value": dict(zip(("q_proj", "k_proj", "v_proj"), rows, strict=True))})
    )
    tokens = torch.tensor([tiny.tokens(96)])
    torch.testing.assert_close(oracle(tokens).logits, model(tokens).logits, rtol=0, atol=1e-4)
