"""Models that transformers does not have, written down straight from their authors' published formulas.

Independent of llmc, and of transformers but for the settings of generation. Tensors have the authors' names; nothing
is cached, fused or fast. An oracle is called, generates and is saved as a model of transformers is.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class Oracle(nn.Module):
    """What the tests ask of a model; a subclass computes `logits`."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        from transformers import GenerationConfig

        self.settings = config
        self.config = SimpleNamespace(**config)
        self.generation_config = GenerationConfig(pad_token_id=config["pad_token_id"])

    def logits(self, tokens: Tensor) -> Tensor:
        """[batch, length] -> [batch, length, vocab]"""
        raise NotImplementedError

    def forward(self, tokens: Tensor, use_cache: bool = False) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits(tokens))

    def generate(self, tokens: Tensor, *, max_new_tokens: int, **_: Any) -> Tensor:
        """Greedy."""
        for _step in range(max_new_tokens):
            tokens = torch.cat((tokens, self.logits(tokens)[:, -1:].argmax(-1)), dim=1)
        return tokens

    def save_pretrained(self, folder: Path, **_: Any) -> None:
        from safetensors.torch import save_file

        dtype = str(next(self.parameters()).dtype).removeprefix("torch.")
        save_file(dict(self.named_parameters()), folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps({**self.settings, "torch_dtype": dtype}, indent=2))
        self.generation_config.save_pretrained(folder)


def load(folder: Path) -> Oracle:
    """The oracle of a folder, by its config."""
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = ORACLES[config["model_type"]](config)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x / (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt())


def rotate_halves(x: Tensor, theta: float) -> Tensor:
    """Rotary positions of x [batch, heads, length, size], the halves of the head forming the pairs."""
    size, length = x.shape[-1], x.shape[-2]
    frequencies = 1.0 / theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    angles = torch.arange(length, dtype=torch.float32)[:, None] * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    turned = torch.cat((-x[..., size // 2 :], x[..., : size // 2]), dim=-1)
    return x * angles.cos() + turned * angles.sin()


def causal(length: int) -> Tensor:
    """What is added to scores [length, length]: nothing up to the diagonal, minus infinity beyond."""
    return torch.full((length, length), -torch.inf).triu(1)


def alibi_slopes(heads: int) -> list[float]:
    """Press et al. 2022, the recursion that they publish."""

    def of_a_power(count: int) -> list[float]:
        start = 2 ** (-(2 ** -(math.log2(count) - 3)))
        return [start * start**index for index in range(count)]

    if math.log2(heads).is_integer():
        return of_a_power(heads)
    below = 2 ** math.floor(math.log2(heads))
    return of_a_power(below) + alibi_slopes(2 * below)[0::2][: heads - below]


class BaichuanAttention(nn.Module):
    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.W_pack = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.rotates = hasattr(config, "max_position_embeddings")

    def forward(self, x: Tensor) -> Tensor:
        batch, length, hidden = x.shape
        parts = self.W_pack(x).view(batch, length, 3, self.heads, hidden // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = parts.unbind()
        bias = causal(length)
        if self.rotates:
            q, k = rotate_halves(q, 10000.0), rotate_halves(k, 10000.0)
        else:
            slopes = torch.tensor(alibi_slopes(self.heads))
            bias = bias + slopes[:, None, None] * torch.arange(length)
        scores = q @ k.transpose(-1, -2) / math.sqrt(hidden // self.heads) + bias
        mixed = scores.softmax(-1) @ v
        out: Tensor = self.o_proj(mixed.transpose(1, 2).reshape(batch, length, hidden))
        return out


class BaichuanMlp(nn.Module):
    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x)
        out: Tensor = self.down_proj(gate * gate.sigmoid() * self.up_proj(x))
        return out


class BaichuanLayer(nn.Module):
    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.self_attn = BaichuanAttention(config)
        self.mlp = BaichuanMlp(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Baichuan(Oracle):
    """Baichuan and Baichuan2, 7B (rotary, with `max_position_embeddings`) and 13B (linear biases).

    Baichuan2 (whose config has `z_loss_weight`) divides each row of the head by its length.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(self.config.vocab_size, self.config.hidden_size)
        self.model.layers = nn.ModuleList(BaichuanLayer(self.config) for _ in range(self.config.num_hidden_layers))
        self.model.norm = RMSNorm(self.config.hidden_size, self.config.rms_norm_eps)
        self.lm_head = nn.Linear(self.config.hidden_size, self.config.vocab_size, bias=False)

    def logits(self, tokens: Tensor) -> Tensor:
        x = self.model.embed_tokens(tokens)
        for layer in self.model.layers:
            x = layer(x)
        weight = self.lm_head.weight
        if "z_loss_weight" in self.settings:
            weight = functional.normalize(weight)
        return functional.linear(self.model.norm(x), weight)


ORACLES: dict[str, type[Oracle]] = {"baichuan": Baichuan}
