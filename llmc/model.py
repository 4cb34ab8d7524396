"""The reference decoder: what every engine, converter and quantizer is compared with.

    tokens ─► embed ─► layer 0 ─► ... ─► layer n-1 ─► norm ─► head ─► logits

    layer:    x ─┬─► attn_norm ─► attn ─(+)─┬─► mlp_norm ─► mlp ─(+)─►
                 └──────────────────────┘   └─────────────────┘

    attn:     ─┬─► q ─► [q_norm] ─► rotate ─────────────┐
               ├─► k ─► [k_norm] ─► rotate ─► [int8] ─► cache ─► softmax(q k^T / sqrt(d) + mask) v ─► o ─►
               └─► v ──────────────────────► [int8] ─► cache

    mlp:      ─┬─► gate ─► silu ─(x)─► down ─►
               └─► up ──────────┘

Parameters carry the canonical names of llmc/names.py, and every switch is a field of ModelSpec. It is written to be
read and to be right, not to be fast; the arithmetic is that of transformers, to 1e-5 on logits.

Does not know: families, text, sampling.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from llmc import names, rope
from llmc.checkpoint import Checkpoint
from llmc.errors import CheckpointError
from llmc.quant import pack
from llmc.spec import ModelSpec


class KVCache:
    """Keys (after the rotation) and values of the tokens seen so far, of a batch whose rows are equally long.

    Sequences of different lengths have a cache each.
    """

    def __init__(self) -> None:
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def length(self) -> int:
        """Tokens held."""
        return self._layers[0][0].shape[2] if self._layers else 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values [batch, kv_heads, new, head_dim] to a layer.

        Returns:
            All keys and values of the layer, [batch, kv_heads, length, head_dim].
        """
        if layer in self._layers:
            old_k, old_v = self._layers[layer]
            k, v = torch.cat((old_k, k), dim=2), torch.cat((old_v, v), dim=2)
        self._layers[layer] = k, v
        return k, v


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, the statistics in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions, see the drawing above.

    `k_scale` and `v_scale` (float32 [kv_size], None without an int8 cache) make it compute with the keys and values
    that such a cache would give back.
    """

    def __init__(self, spec: ModelSpec, layer: int) -> None:
        super().__init__()
        switches = spec.attention
        self.layer, self.head_dim, self.window = layer, switches.head_dim, spec.window(layer)
        self.q = nn.Linear(spec.hidden_size, spec.q_size, bias=switches.qkv_bias)
        self.k = nn.Linear(spec.hidden_size, spec.kv_size, bias=switches.qkv_bias)
        self.v = nn.Linear(spec.hidden_size, spec.kv_size, bias=switches.qkv_bias)
        self.o = nn.Linear(spec.q_size, spec.hidden_size, bias=switches.o_bias)
        self.q_norm = RMSNorm(switches.head_dim, spec.norm.eps) if switches.qk_norm else None
        self.k_norm = RMSNorm(switches.head_dim, spec.norm.eps) if switches.qk_norm else None
        self.k_scale: Tensor | None
        self.v_scale: Tensor | None
        self.register_buffer("k_scale", None)
        self.register_buffer("v_scale", None)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], cache: KVCache | None) -> Tensor:
        """x [batch, new, hidden]; rotation: cos and sin of the new positions, [new, head_dim / 2]."""
        q, k, v = self._heads(self.q(x)), self._heads(self.k(x)), self._heads(self.v(x))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, *rotation), rotate(k, *rotation)
        if self.k_scale is not None and self.v_scale is not None:
            k, v = through_int8(k, self.k_scale), through_int8(v, self.v_scale)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        mask = visible(q.shape[2], k.shape[2], self.window, x.device)
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        out: Tensor = self.o(mixed.transpose(1, 2).flatten(2))
        return out

    def _heads(self, x: Tensor) -> Tensor:
        """[batch, new, heads * head_dim] -> [batch, heads, new, head_dim]"""
        return x.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (first half, second half) of x [..., new, head_dim] by its angle [new, head_dim / 2]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def visible(new: int, length: int, window: int | None, device: torch.device | None = None) -> Tensor:
    """Which of `length` keys each of the last `new` positions may look at: bool [new, length]."""
    keys = torch.arange(length, device=device)
    queries = keys[length - new :, None]
    mask = keys <= queries
    return mask if window is None else mask & (keys > queries - window)


def through_int8(x: Tensor, scale: Tensor) -> Tensor:
    """What an int8 cache gives back of x [batch, kv_heads, new, head_dim]; scale [kv_heads * head_dim]."""
    by_channel = scale.view(x.shape[1], 1, x.shape[3])
    return (x / by_channel).round().clamp(-128, 127) * by_channel


class Mlp(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        inner, bias = spec.mlp.intermediate_size, spec.mlp.bias
        self.gate = nn.Linear(spec.hidden_size, inner, bias=bias)
        self.up = nn.Linear(spec.hidden_size, inner, bias=bias)
        self.down = nn.Linear(inner, spec.hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(functional.silu(self.gate(x)) * self.up(x))
        return out


class Layer(nn.Module):
    """Attention and MLP, each normalised before and added to the residual stream after."""

    def __init__(self, spec: ModelSpec, layer: int) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(spec.hidden_size, spec.norm.eps)
        self.attn = Attention(spec, layer)
        self.mlp_norm = RMSNorm(spec.hidden_size, spec.norm.eps)
        self.mlp = Mlp(spec)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], cache: KVCache | None) -> Tensor:
        x = x + self.attn(self.attn_norm(x), rotation, cache)
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


class Decoder(nn.Module):
    """The decoder that a ModelSpec describes, with freshly drawn weights (see `load` for a checkpoint's)."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embed = nn.Embedding(spec.vocab_size, spec.hidden_size)
        self.layers = nn.ModuleList(Layer(spec, layer) for layer in range(spec.num_layers))
        self.norm = RMSNorm(spec.hidden_size, spec.norm.eps)
        self.head = None if spec.tied else nn.Linear(spec.hidden_size, spec.vocab_size, bias=False)

    def forward(self, tokens: Tensor, *, cache: KVCache | None = None, context: int | None = None) -> Tensor:
        """Logits of every token.

        Rows of different lengths are padded on the right with any token: no token sees what comes after it, so the
        rows' own logits stay as they are, and those of the padding mean nothing.

        Args:
            tokens: int64 [batch, new].
            cache: What the same rows have computed before; the new tokens are added to it.
            context: Tokens of the whole context, for rope scalings that depend on it. By default all tokens up to
                now, as transformers has it; to compute in chunks what a whole forward gives, pass the whole length.

        Returns:
            float32 [batch, new, vocab_size].
        """
        return self.logits(self.hidden(tokens, cache=cache, context=context))

    def hidden(self, tokens: Tensor, *, cache: KVCache | None = None, context: int | None = None) -> Tensor:
        """As `forward`, up to the head: [batch, new, hidden_size]."""
        x, rotation = self.enter(tokens, cache.length if cache else 0, context)
        for layer in self.layers:
            x = layer(x, rotation, cache)
        return self.leave(x)

    def enter(self, tokens: Tensor, past: int = 0, context: int | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """What goes into the first layer, and the rotation that every layer gets.

        Args:
            past: Tokens before these.
        """
        x = self.embed(tokens)
        cos, sin = rope.rotary_table(self.spec, past + tokens.shape[1], context=context)
        return x, (torch.from_numpy(cos[past:]).to(x), torch.from_numpy(sin[past:]).to(x))

    def leave(self, x: Tensor) -> Tensor:
        """What comes out of the last layer, made ready for the head."""
        out: Tensor = self.norm(x)
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """The head: [..., hidden_size] -> float32 [..., vocab_size]."""
        weight = self.embed.weight if self.head is None else self.head.weight
        return functional.linear(hidden, weight).float()

    def simulate_kv_cache(self, scales: dict[str, Tensor]) -> None:
        """Compute as with an int8 KV cache.

        Args:
            scales: `layers.N.attn.k_scale` and `.v_scale` of every layer, float32 [kv_size].
        """
        for name, scale in scales.items():
            module, _, buffer = name.rpartition(".")
            self.get_submodule(module).register_buffer(buffer, scale)


def load(checkpoint: Checkpoint) -> Decoder:
    """The decoder of a checkpoint in float32, without gradients; packed weights are unpacked to what they stand for.

    Memory: one float32 copy of the model, and one tensor as it is stored.

    Raises:
        CheckpointError: A tensor cannot be read, or holds a value that is not finite.
    """
    with torch.device("meta"):
        decoder = Decoder(checkpoint.spec)
    state = {name: tensor(checkpoint, name) for name in names.tensors(checkpoint.spec)}
    decoder.load_state_dict(state, strict=True, assign=True)
    if checkpoint.recipe and checkpoint.recipe.kv_cache:
        decoder.simulate_kv_cache(
            {name: torch.from_numpy(checkpoint[name]) for name in checkpoint if name.endswith(("k_scale", "v_scale"))}
        )
    return decoder.requires_grad_(False).eval()


def tensor(checkpoint: Checkpoint, name: str) -> Tensor:
    """One tensor of the unquantized model in float32; see `load`."""
    module = name.removesuffix(".weight")
    weight_format = checkpoint.recipe.format_of(module) if checkpoint.recipe else None
    if weight_format is None or f"{module}.qweight" not in checkpoint:
        values = checkpoint[name].astype("float32", copy=False)
    else:
        zero = None if weight_format.symmetric else checkpoint[f"{module}.zero"]
        qweight, scale = checkpoint[f"{module}.qweight"], checkpoint[f"{module}.scale"]
        values = pack.dequantize(qweight, scale, zero, weight_format, names.tensors(checkpoint.spec)[name][1])
    # Extremes carry every NaN and infinity, and need no memory.
    if not np.isfinite((values.min(), values.max())).all():
        raise CheckpointError(f"{checkpoint.folder}: '{name}' holds values that are not finite")
    return torch.from_numpy(values)
