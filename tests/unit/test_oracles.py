"""The oracles of tests/oracles.py where transformers can say the same in other words."""

from __future__ import annotations

import oracles
import pytest
import tiny
import torch
from transformers import LlamaConfig, LlamaForCausalLM
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
