"""PEFT adapters of tiny models, of every kind that llmc meets, made and saved by PEFT itself."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# Name -> (tiny model, settings of LoraConfig).
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama", {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 16}),
    "all-linear": ("qwen2", {"target_modules": "all-linear", "r": 8, "lora_alpha": 12, "lora_dropout": 0.1}),
    "rslora": ("qwen3", {"target_modules": LINEARS, "r": 4, "use_rslora": True}),
    "dora": ("llama-bias", {"target_modules": LINEARS, "r": 4, "use_dora": True}),
    "patterns": (
        "llama",
        {
            "target_modules": LINEARS,
            "r": 4,
            "rank_pattern": {"q_proj": 8, r"layers\.1\.mlp\.up_proj": 2},
            "alpha_pattern": {"model.layers.0.self_attn.k_proj": 32, "down_proj": 3},
        },
    ),
    "one-layer": ("llama", {"target_modules": ["o_proj"], "layers_to_transform": [1]}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "conv1d-dora-rslora": (
        "gpt2-untied",
        {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "use_dora": True, "use_rslora": True},
    ),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "r": 4}),
    "embedding-dora": ("llama", {"target_modules": ["embed_tokens"], "r": 4, "use_dora": True}),
    "saved-whole": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head", "norm"]}),
    "biases": ("qwen2", {"target_modules": ["q_proj", "k_proj"], "bias": "all"}),
    "lora-biases": ("llama-bias", {"target_modules": ["q_proj", "up_proj"], "bias": "lora_only"}),
    "fused-by-heads": ("bloom", {"target_modules": ["query_key_value", "dense"]}),
    "fused-mlp": ("glm", {"target_modules": ["gate_up_proj", "o_proj"]}),
    "opt": ("opt", {"target_modules": ["fc1", "fc2", "q_proj", "out_proj"]}),
    "experts-left-alone": ("mixtral", {"target_modules": ["q_proj", "v_proj"]}),
    "tied-head-saved": ("llama-tied", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "tied-embedding": ("llama-tied", {"target_modules": ["embed_tokens", "q_proj"], "r": 4}),
}


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def make(name: str, base: Path, folder: Path, *, pickled: bool = False, **changes: Any) -> Any:
    """Train nothing, but draw every trainable tensor anew; save the adapter, and give the model that PEFT has."""
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(load(base), LoraConfig(task_type="CAUSAL_LM", **{**ADAPTERS[name][1], **changes}))
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(folder, safe_serialization=not pickled)
    return model.eval()
