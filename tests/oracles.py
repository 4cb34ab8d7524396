"""Models that transformers does not have, written down straight from their authors' published formulas.

Independent of llmc, and of transformers but for the settings of generation. Tensors have the authors' names; nothing
is cached, fused or fast. An oracle is called, generates and is saved as a model of transformers is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
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


def rotate_neighbours(x: Tensor, base: float, divided: float = 1.0) -> Tensor:
    """Rotary positions of x [batch, heads, length, size], neighbours forming the pairs; positions `divided` first."""
    size, length = x.shape[-1], x.shape[-2]
    frequencies = 1.0 / base ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    angles = torch.outer(torch.arange(length, dtype=torch.float32) / divided, frequencies)
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], size // 2, 2))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


class ChatGLM2Attention(nn.Module):
    """The first half of each head rotates; `multi_query_group_num` groups of heads share a key and a value."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.heads, self.groups = config.num_attention_heads, config.multi_query_group_num
        self.size = config.kv_channels
        width = self.heads * self.size
        fused = width + 2 * self.groups * self.size
        self.query_key_value = nn.Linear(config.hidden_size, fused, bias=config.add_qkv_bias)
        self.dense = nn.Linear(width, config.hidden_size, bias=False)
        # The configs of ChatGLM2-32k and ChatGLM3-32k have the same keys, and their code does not do the same.
        divides = "chatglm2" in config._name_or_path
        self.rope = (10000.0, config.rope_ratio) if divides else (10000.0 * config.rope_ratio, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        counts = (self.heads, self.groups, self.groups)
        parts = self.query_key_value(x).split([count * self.size for count in counts], dim=-1)
        q, k, v = (
            part.view(batch, length, count, self.size).transpose(1, 2)
            for part, count in zip(parts, counts, strict=True)
        )
        half = self.size // 2
        q, k = (torch.cat((rotate_neighbours(y[..., :half], *self.rope), y[..., half:]), dim=-1) for y in (q, k))
        k, v = (y.repeat_interleave(self.heads // self.groups, dim=1) for y in (k, v))
        scores = q @ k.transpose(-1, -2) / math.sqrt(self.size) + causal(length)
        out: Tensor = self.dense((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return out


class ChatGLM2Mlp(nn.Module):
    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 2 * config.ffn_hidden_size, bias=False)
        self.dense_4h_to_h = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.dense_h_to_4h(x).chunk(2, dim=-1)
        out: Tensor = self.dense_4h_to_h(gate * gate.sigmoid() * up)
        return out


class ChatGLM2Layer(nn.Module):
    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.layernorm_epsilon)
        self.self_attention = ChatGLM2Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.layernorm_epsilon)
        self.mlp = ChatGLM2Mlp(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attention(self.input_layernorm(x))
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class ChatGLM2(Oracle):
    """ChatGLM2, ChatGLM3 and GLM-4-9B. A `rope_ratio` multiplies the rotary base; in a "chatglm2" divides positions."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        c = self.config
        self.transformer = nn.Module()
        self.transformer.embedding = nn.Module()
        self.transformer.embedding.word_embeddings = nn.Embedding(c.padded_vocab_size, c.hidden_size)
        self.transformer.encoder = nn.Module()
        self.transformer.encoder.layers = nn.ModuleList(ChatGLM2Layer(c) for _ in range(c.num_layers))
        self.transformer.encoder.final_layernorm = RMSNorm(c.hidden_size, c.layernorm_epsilon)
        self.transformer.output_layer = nn.Linear(c.hidden_size, c.padded_vocab_size, bias=False)

    def logits(self, tokens: Tensor) -> Tensor:
        x = self.transformer.embedding.word_embeddings(tokens)
        for layer in self.transformer.encoder.layers:
            x = layer(x)
        out: Tensor = self.transformer.output_layer(self.transformer.encoder.final_layernorm(x))
        return out


class QwenAttention(nn.Module):
    """Beyond the trained length `seq_length`, where it is switched on, the rotary base and the queries grow."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.config = config
        width = config.kv_channels * config.num_attention_heads
        self.c_attn = nn.Linear(config.hidden_size, 3 * width)
        self.c_proj = nn.Linear(config.hidden_size, width, bias=False)

    def base(self, length: int) -> float:
        """Dynamic NTK: its alpha is 1 up to the trained length, 3 up to twice of it, 7 up to four times..."""
        c = self.config
        alpha = max(2 ** math.ceil(math.log2(length / c.seq_length) + 1) - 1, 1) if c.use_dynamic_ntk else 1
        grown: float = c.rotary_emb_base * alpha ** (c.kv_channels / (c.kv_channels - 2))
        return grown

    def log_n(self, length: int) -> Tensor:
        """[length, 1]: the logarithm of each position to the base of the trained length, at least 1."""
        places = torch.arange(1, length + 1, dtype=torch.float32)[:, None]
        grown = (places.log() / math.log(self.config.seq_length)).clamp(min=1)
        return grown if self.config.use_logn_attn else torch.ones_like(grown)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, hidden = x.shape
        heads = self.config.num_attention_heads
        q, k, v = (y.view(batch, length, heads, -1).transpose(1, 2) for y in self.c_attn(x).split(hidden, dim=-1))
        q, k = (rotate_halves(y, self.base(length)) for y in (q, k))
        scores = (q * self.log_n(length)) @ k.transpose(-1, -2) / math.sqrt(hidden // heads) + causal(length)
        out: Tensor = self.c_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return out


class QwenMlp(nn.Module):
    """The second matrix is the gate. `intermediate_size` counts both."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        half = config.intermediate_size // 2
        self.w1 = nn.Linear(config.hidden_size, half, bias=False)
        self.w2 = nn.Linear(config.hidden_size, half, bias=False)
        self.c_proj = nn.Linear(half, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.w2(x)
        out: Tensor = self.c_proj(self.w1(x) * (gate * gate.sigmoid()))
        return out


class QwenBlock(nn.Module):
    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.ln_1 = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.attn = QwenAttention(config)
        self.ln_2 = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mlp = QwenMlp(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class Qwen(Oracle):
    """Qwen 1."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.config = SimpleNamespace(**{"use_dynamic_ntk": True, "use_logn_attn": True} | config)
        c = self.config
        self.transformer = nn.Module()
        self.transformer.wte = nn.Embedding(c.vocab_size, c.hidden_size)
        self.transformer.h = nn.ModuleList(QwenBlock(c) for _ in range(c.num_hidden_layers))
        self.transformer.ln_f = RMSNorm(c.hidden_size, c.layer_norm_epsilon)
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)

    def logits(self, tokens: Tensor) -> Tensor:
        x = self.transformer.wte(tokens)
        for block in self.transformer.h:
            x = block(x)
        out: Tensor = self.lm_head(self.transformer.ln_f(x))
        return out


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * x * (1 + 0.044715 * x * x)))


def rotate_at(x: Tensor, places: list[int]) -> Tensor:
    """Rotary positions of x [heads, length, size] at `places`, the frequencies rounded to float16 by their authors."""
    size = x.shape[-1]
    frequencies = (1.0 / 10000 ** (torch.arange(0, size, 2).float() / size)).half().float()
    angles = torch.tensor(places, dtype=torch.float32)[:, None] * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    turned = torch.cat((-x[..., size // 2 :], x[..., : size // 2]), dim=-1)
    return x * angles.cos() + turned * angles.sin()


class GLMBlock(nn.Module):
    """The residual stream goes on from what was normalised, times sqrt(2 * 28)."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.layernorm_epsilon
        self.heads = config.num_attention_heads
        self.input_layernorm = nn.LayerNorm(hidden, eps=eps)
        self.attention = nn.Module()
        self.attention.query_key_value = nn.Linear(hidden, 3 * hidden)
        self.attention.dense = nn.Linear(hidden, hidden)
        self.post_attention_layernorm = nn.LayerNorm(hidden, eps=eps)
        self.mlp = nn.Module()
        self.mlp.dense_h_to_4h = nn.Linear(hidden, config.inner_hidden_size)
        self.mlp.dense_4h_to_h = nn.Linear(config.inner_hidden_size, hidden)

    def attend(self, x: Tensor, seen: Tensor, first: list[int], second: list[int]) -> Tensor:
        """x [length, hidden]; seen bool [length, length]."""
        length, hidden = x.shape
        size = hidden // self.heads
        q, k, v = self.attention.query_key_value(x).view(length, self.heads, 3 * size).transpose(0, 1).split(size, -1)
        half = size // 2
        q, k = (torch.cat((rotate_at(y[..., :half], first), rotate_at(y[..., half:], second)), -1) for y in (q, k))
        scores = (q @ k.transpose(-1, -2) / math.sqrt(size)).masked_fill(~seen, -torch.inf)
        out: Tensor = self.attention.dense((scores.softmax(-1) @ v).transpose(0, 1).reshape(length, hidden))
        return out

    def forward(self, x: Tensor, seen: Tensor, first: list[int], second: list[int]) -> Tensor:
        alpha = math.sqrt(2 * 28)
        x = self.input_layernorm(x)
        x = self.post_attention_layernorm(alpha * x + self.attend(x, seen, first, second))
        out: Tensor = alpha * x + self.mlp.dense_4h_to_h(gelu_tanh(self.mlp.dense_h_to_4h(x)))
        return out


class ChatGLM(Oracle):
    """ChatGLM-6B. What is before the first `bos_token_id` sees itself whole; a text without one has nothing before."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        c = self.config
        c.num_hidden_layers = c.num_layers
        self.transformer = nn.Module()
        self.transformer.word_embeddings = nn.Embedding(c.vocab_size, c.hidden_size)
        self.transformer.layers = nn.ModuleList(GLMBlock(c) for _ in range(c.num_layers))
        self.transformer.final_layernorm = nn.LayerNorm(c.hidden_size, eps=c.layernorm_epsilon)
        c.tied = config.get("tie_word_embeddings", False)
        if not c.tied:
            self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)

    def logits(self, tokens: Tensor) -> Tensor:
        return torch.stack([self._row(row) for row in tokens])

    def _row(self, row: Tensor) -> Tensor:
        ids, c, length = row.tolist(), self.config, len(row)
        context = ids.index(c.bos_token_id) if c.bos_token_id in ids else 0
        marks = [ids.index(mark) for mark in (c.gmask_token_id, c.mask_token_id) if mark in ids[:context]]
        mask = [*marks, max(context - 1, 0)][0]
        first = [*range(context), *[mask] * (length - context)]
        second = [*[0] * context, *range(1, length - context + 1)]
        seen = torch.ones(length, length).tril().bool()
        seen[:, :context] = True
        x = self.transformer.word_embeddings(row)
        for layer in self.transformer.layers:
            x = layer(x, seen, first, second)
        head = self.transformer.word_embeddings if c.tied else self.lm_head
        return functional.linear(self.transformer.final_layernorm(x), head.weight)


def chatglm(config: dict[str, Any]) -> Oracle:
    """The same `model_type` is in the configs of all ChatGLMs."""
    return ChatGLM(config) if config.get("position_encoding_2d") else ChatGLM2(config)


ORACLES: dict[str, Callable[[dict[str, Any]], Oracle]] = {
    "baichuan": Baichuan,
    "chatglm": chatglm,
    "chatglm2": ChatGLM2,
    "qwen": Qwen,
}
