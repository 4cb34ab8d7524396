"""Tiny random models of every family, made by transformers: the truth that the rest of the suite is compared with.

Every weight is drawn anew after building, norms and biases too, so that nothing passes by being one or zero, and
queries and keys are large enough for attention and positions to matter. Models with a scaled rotary embedding have an
original context (32) shorter than the longest (256, for dynamic 128), so that both sides of it can be reached; a
sliding window is 8 tokens. head_dim 16 and widths in multiples of 32 suit the kernels and whole groups of 32.

Knows: configs and weights. Does not know: anything of llmc.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

VOCAB_SIZE = 320
END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

BASE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


GPT2_BASE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 256,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


OPT_BASE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "ffn_dim": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "word_embed_proj_dim": 64,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


BLOOM_BASE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "n_layer": 2,
    "n_head": 4,
    "seq_length": 256,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


BAICHUAN_BASE: dict[str, Any] = {
    "architectures": ["BaichuanForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM"},
    "model_type": "baichuan",
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "vocab_size": VOCAB_SIZE,
    "model_max_length": 256,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


CHATGLM_BASE: dict[str, Any] = {
    "_name_or_path": "THUDM/chatglm3-6b",
    "architectures": ["ChatGLMModel"],
    "auto_map": {"AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration"},
    "model_type": "chatglm",
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True,
    "ffn_hidden_size": 96,
    "hidden_size": 64,
    "kv_channels": 32,
    "layernorm_epsilon": 1e-05,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 4,
    "num_layers": 2,
    "original_rope": True,
    "padded_vocab_size": VOCAB_SIZE,
    "post_layer_norm": True,
    "rmsnorm": True,
    "rope_ratio": 1.0,
    "seq_length": 256,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

# Random ids (see `tokens`) hold no bos_token_id: such a text has no prefix.
CHATGLM_6B_BASE: dict[str, Any] = {
    "_name_or_path": "THUDM/chatglm-6b",
    "architectures": ["ChatGLMModel"],
    "auto_map": {"AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration"},
    "model_type": "chatglm",
    "hidden_size": 64,
    "inner_hidden_size": 96,
    "layernorm_epsilon": 1e-05,
    "max_sequence_length": 256,
    "num_attention_heads": 4,
    "num_layers": 2,
    "position_encoding_2d": True,
    "pre_seq_len": None,
    "prefix_projection": False,
    "quantization_bit": 0,
    "vocab_size": VOCAB_SIZE,
    "bos_token_id": 1,
    "mask_token_id": 318,
    "gmask_token_id": 319,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

QWEN_BASE: dict[str, Any] = {
    "architectures": ["QWenLMHeadModel"],
    "auto_map": {"AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"},
    "model_type": "qwen",
    "hidden_size": 64,
    "intermediate_size": 192,
    "kv_channels": 16,
    "layer_norm_epsilon": 1e-06,
    "max_position_embeddings": 1024,
    "no_bias": True,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "seq_length": 256,
    "tie_word_embeddings": False,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "vocab_size": VOCAB_SIZE,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class Case:
    """One tiny model.

    Attributes:
        model_type: transformers' name of the family.
        config: What differs from `base`.
        seed: Of the weights.
        base: The sizes, as this family's config names them.
    """

    model_type: str
    config: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    base: dict[str, Any] = field(default_factory=lambda: BASE)

    def build(self) -> Any:
        """The model, in float32, ready to be called: a fresh one each time."""
        import torch
        from oracles import ORACLES
        from transformers import AutoConfig, AutoModelForCausalLM

        settings = {**self.base, **json.loads(json.dumps(self.config))}
        if self.model_type in ORACLES:
            model: Any = ORACLES[self.model_type](settings)
        else:
            config = AutoConfig.for_model(self.model_type, **settings)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        generator = torch.Generator().manual_seed(self.seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if name.endswith(("norm.weight", "layernorm.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight")):
                    parameter.copy_(1.2 + 0.4 * noise)
                elif any(part in name for part in ("embed", "wte.", "wpe.")):
                    parameter.copy_(0.4 * noise)
                else:
                    parameter.copy_(0.18 * noise)
            if "gmask_token_id" in settings:
                # Written by the model itself, the end of a prefix would be another prefix to whoever reads all again.
                head = model.transformer.word_embeddings if model.config.tied else model.lm_head
                head.weight[settings["bos_token_id"]] = 0
        model.generation_config.eos_token_id = [2, 0]
        return model.eval()


def _scaled(**rope: Any) -> Case:
    return Case("llama", {"rope_parameters": {"rope_theta": 10000.0, **rope}})


_YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32}
_QUARTER = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_WINDOW = {"use_sliding_window": True, "sliding_window": 8, "num_hidden_layers": 3}

TINY: dict[str, Case] = {
    "llama": Case("llama"),
    "llama-tied": Case("llama", {"tie_word_embeddings": True}),
    "llama-bias": Case("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": Case("llama", {"head_dim": 32}),
    "llama-multi-head": Case("llama", {"num_key_value_heads": 4, "num_hidden_layers": 3}),
    "llama-linear": _scaled(rope_type="linear", factor=2.0),
    "llama-dynamic": Case(
        "llama",
        {
            "max_position_embeddings": 32,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
        },
    ),
    "llama-yarn": _scaled(**_YARN),
    "llama-yarn-mscale": _scaled(**_YARN, mscale=0.707, mscale_all_dim=1.3, beta_fast=16.0, beta_slow=2.0),
    "llama-yarn-no-truncate": _scaled(**_YARN, truncate=False, attention_factor=1.25),
    "llama-longrope": _scaled(
        rope_type="longrope",
        factor=8.0,
        original_max_position_embeddings=32,
        short_factor=[1.0, 1.05, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6],
        long_factor=[1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.0],
    ),
    "llama-llama3": _scaled(
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=64,
    ),
    "mistral": Case("mistral", {"sliding_window": None, "head_dim": 32}),
    "mistral-window": Case("mistral", {"sliding_window": 8}),
    "qwen2": Case("qwen2"),
    "qwen2-window": Case("qwen2", {**_WINDOW, "max_window_layers": 1}),
    "qwen2.5-tied": Case(
        "qwen2",
        {
            "tie_word_embeddings": True,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        },
    ),
    "qwen3": Case("qwen3", {"head_dim": 32}),
    "qwen3-tied": Case("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "glm": Case("glm", {"head_dim": 32}),
    "glm-tied": Case("glm", {"head_dim": 64, "attention_bias": False, "tie_word_embeddings": True, **_QUARTER}),
    "chatglm3": Case("chatglm2", base=CHATGLM_BASE),
    "chatglm3-32k": Case("chatglm2", {"rope_ratio": 50.0, "num_layers": 3, "add_qkv_bias": False}, base=CHATGLM_BASE),
    "chatglm2-32k": Case("chatglm2", {"_name_or_path": "chatglm2-6b-32k", "rope_ratio": 4.0}, base=CHATGLM_BASE),
    "chatglm-6b": Case("chatglm", base=CHATGLM_6B_BASE),
    "chatglm-6b-deep": Case("chatglm", {"num_layers": 3, "num_attention_heads": 2}, base=CHATGLM_6B_BASE),
    # As PaddleNLP has it: its residual is the authors' at this depth alone.
    "chatglm-6b-tied": Case(
        "chatglm",
        {
            "num_layers": 28,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "inner_hidden_size": 64,
            "tie_word_embeddings": True,
        },
        base=CHATGLM_6B_BASE,
    ),
    "qwen1": Case("qwen", base=QWEN_BASE),
    "qwen1-deep": Case("qwen", {"num_hidden_layers": 3, "rotary_emb_base": 500.0}, base=QWEN_BASE),
    "gemma3": Case(
        "gemma3_text",
        {
            "head_dim": 16,
            "num_hidden_layers": 3,
            "query_pre_attn_scalar": 32,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
    "gemma3-tied": Case("gemma3_text", {"head_dim": 32, "sliding_window": 16, "tie_word_embeddings": True}),
    "glm4": Case("glm4", {"head_dim": 32, "num_hidden_layers": 3}),
    "mixtral": Case("mixtral", {"num_local_experts": 4}),
    "qwen2-moe": Case(
        "qwen2_moe",
        {
            **_EXPERTS,
            "num_experts": 6,
            "shared_expert_intermediate_size": 64,
            "mlp_only_layers": [1],
            "num_hidden_layers": 3,
        },
    ),
    "qwen2-moe-all": Case("qwen2_moe", {**_EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 64}),
    "qwen2-moe-window": Case(
        "qwen2_moe",
        {
            **_EXPERTS,
            **_WINDOW,
            "num_experts": 4,
            "shared_expert_intermediate_size": 32,
            "norm_topk_prob": True,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "qkv_bias": False,
        },
    ),
    "qwen3-moe": Case("qwen3_moe", {**_EXPERTS, "num_experts": 5, "head_dim": 32, "norm_topk_prob": True}),
    "qwen3-moe-sparse": Case(
        "qwen3_moe", {**_EXPERTS, "num_experts": 4, "head_dim": 16, "decoder_sparse_step": 2, "num_hidden_layers": 4}
    ),
    "mixtral-window": Case("mixtral", {"num_local_experts": 8, "num_experts_per_tok": 3, "sliding_window": 8}),
    "gpt2": Case("gpt2", base=GPT2_BASE),
    "gpt2-untied": Case(
        "gpt2",
        {"tie_word_embeddings": False, "n_inner": 96, "n_layer": 3, "activation_function": "gelu"},
        base=GPT2_BASE,
    ),
    "opt": Case("opt", base=OPT_BASE),
    "opt-350m": Case("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 32}, base=OPT_BASE),
    "opt-untied-gelu": Case("opt", {"tie_word_embeddings": False, "activation_function": "gelu"}, base=OPT_BASE),
    "bloom": Case("bloom", base=BLOOM_BASE),
    "bloom-6-heads": Case("bloom", {"hidden_size": 96, "n_head": 6, "n_layer": 3}, base=BLOOM_BASE),
    "bloom-untied": Case("bloom", {"tie_word_embeddings": False}, base=BLOOM_BASE),
    "baichuan-7b": Case(
        "baichuan",
        {"architectures": ["BaiChuanForCausalLM"], "max_position_embeddings": 256},
        base={key: value for key, value in BAICHUAN_BASE.items() if key != "model_max_length"},
    ),
    "baichuan-13b": Case("baichuan", {"hidden_size": 96, "num_attention_heads": 6}, base=BAICHUAN_BASE),
    "baichuan2-7b": Case("baichuan", {"max_position_embeddings": 256, "z_loss_weight": 0}, base=BAICHUAN_BASE),
    "baichuan2-13b": Case("baichuan", {"num_hidden_layers": 3, "z_loss_weight": 0}, base=BAICHUAN_BASE),
    "qwen3-bias-window": Case("qwen3", {**_WINDOW, "head_dim": 16, "max_window_layers": 2, "attention_bias": True}),
}


def save(case: Case, folder: Path, *, dtype: str = "float32", max_shard_size: str = "5GB") -> Path:
    """Write a Hugging Face folder with weights, config and tokenizer; returns `folder`.

    Args:
        dtype: A name of torch's, the weights' type in the file.
    """
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    case.build().to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=max_shard_size)
    save_tokenizer(folder)
    return folder


def load(folder: Path) -> Any:
    """The model of a Hugging Face folder."""
    import oracles
    from transformers import AutoModelForCausalLM

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] in oracles.ORACLES:
        return oracles.load(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


def save_tokenizer(folder: Path) -> None:
    """A byte-level BPE of 320 tokens with a ChatML template, in Hugging Face's files."""
    (folder / "tokenizer.json").write_text(_tokenizer_json(), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": IM_END,
        "pad_token": END_OF_TEXT,
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 256,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


@functools.cache
def _tokenizer_json() -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT, IM_START, IM_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "the quick brown fox jumps over the lazy dog and there the other user and the assistant system were in it"
    tokenizer.train_from_iterator([text] * 4, trainer)
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise RuntimeError(f"the tiny tokenizer has {tokenizer.get_vocab_size()} tokens, not {VOCAB_SIZE}")
    return str(tokenizer.to_str(pretty=True))


def tokens(count: int, seed: int = 0) -> list[int]:
    """Random ids, none of them special."""
    import random

    return [random.Random(seed * 1000 + index).randrange(3, VOCAB_SIZE) for index in range(count)]
