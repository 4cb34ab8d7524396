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


class Renamed(Oracle):
    """A model of transformers with its tensors under their authors' names, some of them stacked into one."""

    def __init__(self, config: dict[str, Any], twin: Any, tensors: dict[str, list[str]]) -> None:
        """`tensors`: authors' name -> transformers' names, top to bottom."""
        super().__init__(config)
        self._twin, self._tensors = [twin.eval()], tensors  # in a list: no submodule, so that its names are not ours
        state = twin.state_dict()
        for name, parts in tensors.items():
            *path, last = name.split(".")
            module: nn.Module = self
            for part in path:
                if part not in dict(module.named_children()):
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            module.register_parameter(last, nn.Parameter(torch.cat([state.pop(part) for part in parts])))
        if state:
            raise RuntimeError(f"nobody gave {sorted(state)} an authors' name")

    def logits(self, tokens: Tensor) -> Tensor:
        twin, own = self._twin[0], dict(self.named_parameters())
        state = twin.state_dict()
        for name, parts in self._tensors.items():
            for part, values in zip(parts, own[name].split([len(state[part]) for part in parts]), strict=True):
                state[part].copy_(values)
        out: Tensor = twin(tokens, use_cache=False).logits
        return out


class ChatGLM2(Renamed):
    """ChatGLM2, ChatGLM3: GLM-4 of transformers. A `rope_ratio` is ChatGLM3's, or in a "chatglm2" divides positions."""

    def __init__(self, config: dict[str, Any]) -> None:
        from transformers import GlmConfig, GlmForCausalLM

        c = SimpleNamespace(**config)
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
        if "chatglm2" in c._name_or_path:
            rope |= {"rope_type": "linear", "factor": c.rope_ratio}
        else:
            rope["rope_theta"] *= c.rope_ratio
        theirs = GlmConfig(
            vocab_size=c.padded_vocab_size, hidden_size=c.hidden_size, intermediate_size=c.ffn_hidden_size,
            num_hidden_layers=c.num_layers, num_attention_heads=c.num_attention_heads, head_dim=c.kv_channels,
            num_key_value_heads=c.multi_query_group_num, attention_bias=c.add_qkv_bias, pad_token_id=c.pad_token_id,
            rms_norm_eps=c.layernorm_epsilon, max_position_embeddings=c.seq_length, rope_parameters=rope,
        )  # fmt: skip
        tensors = {"transformer.embedding.word_embeddings.weight": ["model.embed_tokens.weight"]}
        for layer in range(c.num_layers):
            at, to = f"transformer.encoder.layers.{layer}", f"model.layers.{layer}"
            for kind in ("weight", "bias") if c.add_qkv_bias else ("weight",):
                tensors[f"{at}.self_attention.query_key_value.{kind}"] = [
                    f"{to}.self_attn.{x}_proj.{kind}" for x in "qkv"
                ]
            tensors |= {
                f"{at}.input_layernorm.weight": [f"{to}.input_layernorm.weight"],
                f"{at}.self_attention.dense.weight": [f"{to}.self_attn.o_proj.weight"],
                f"{at}.post_attention_layernorm.weight": [f"{to}.post_attention_layernorm.weight"],
                f"{at}.mlp.dense_h_to_4h.weight": [f"{to}.mlp.gate_up_proj.weight"],
                f"{at}.mlp.dense_4h_to_h.weight": [f"{to}.mlp.down_proj.weight"],
            }
        tensors["transformer.encoder.final_layernorm.weight"] = ["model.norm.weight"]
        tensors["transformer.output_layer.weight"] = ["lm_head.weight"]
        super().__init__(config, GlmForCausalLM(theirs), tensors)


class Qwen(Renamed):
    """Qwen 1, up to its trained length: Qwen2 of transformers."""

    def __init__(self, config: dict[str, Any]) -> None:
        from transformers import Qwen2Config, Qwen2ForCausalLM

        c = SimpleNamespace(**config)
        theirs = Qwen2Config(
            vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size // 2,
            num_hidden_layers=c.num_hidden_layers, num_attention_heads=c.num_attention_heads,
            num_key_value_heads=c.num_attention_heads, rms_norm_eps=c.layer_norm_epsilon, pad_token_id=c.pad_token_id,
            max_position_embeddings=c.seq_length, head_dim=c.kv_channels,
            rope_parameters={"rope_type": "default", "rope_theta": c.rotary_emb_base},
        )  # fmt: skip
        tensors = {"transformer.wte.weight": ["model.embed_tokens.weight"]}
        for layer in range(c.num_hidden_layers):
            at, to = f"transformer.h.{layer}", f"model.layers.{layer}"
            tensors |= {
                f"{at}.ln_1.weight": [f"{to}.input_layernorm.weight"],
                f"{at}.attn.c_attn.weight": [f"{to}.self_attn.{x}_proj.weight" for x in "qkv"],
                f"{at}.attn.c_attn.bias": [f"{to}.self_attn.{x}_proj.bias" for x in "qkv"],
                f"{at}.attn.c_proj.weight": [f"{to}.self_attn.o_proj.weight"],
                f"{at}.ln_2.weight": [f"{to}.post_attention_layernorm.weight"],
                f"{at}.mlp.w1.weight": [f"{to}.mlp.up_proj.weight"],
                f"{at}.mlp.w2.weight": [f"{to}.mlp.gate_proj.weight"],
                f"{at}.mlp.c_proj.weight": [f"{to}.mlp.down_proj.weight"],
            }
        tensors["transformer.ln_f.weight"] = ["model.norm.weight"]
        tensors["lm_head.weight"] = ["lm_head.weight"]
        super().__init__(config, Qwen2ForCausalLM(theirs), tensors)


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
        out: Tensor = self.lm_head(self.transformer.final_layernorm(x))
        return out


def chatglm(config: dict[str, Any]) -> Oracle:
    """The same `model_type` is in the configs of all ChatGLMs."""
    return ChatGLM(config) if config.get("position_encoding_2d") else ChatGLM2(config)


ORACLES: dict[str, Callable[[dict[str, Any]], Oracle]] = {
    "baichuan": Baichuan,
    "chatglm": chatglm,
    "chatglm2": ChatGLM2,
    "qwen": Qwen,
}
