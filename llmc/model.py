"""The reference decoder: what every engine, converter and quantizer is compared with.

    tokens ─► embed ─► [embed_in] ─► [embed_norm] ─► [+ positions] ─► layer 0 ─► ... ─► layer n-1 ─┐
                                                      logits ◄─ head ◄─ [embed_out] ◄─ [norm] ◄────┘

    layer:    x ─┬─► attn_norm ─► attn ─► [attn_post_norm] ─(+)─┬─► mlp_norm ─► mlp ─► [mlp_post_norm] ─(+)─►
                 └───────────────────────────────────────────┘   └─────────────────────────────────────┘
    or:       x ─┬─► attn ─(+)─► attn_norm ─┬─► mlp ─(+)─► mlp_norm ─►
                 └──────────┘               └─────────┘
    or:       x ─► attn_norm ─┬─► attn ─(+)─► mlp_norm ─┬─► mlp ─(+)─►
                              └─(* scale)┘              └─(* scale)┘

    attn:     ─┬─► q ─► [q_norm] ─► [rotate] ─────────────┐
               ├─► k ─► [k_norm] ─► [rotate] ─► [8bit] ─► cache ─► softmax(q k^T / sqrt(d) + mask) v ─► o ─►
               └─► v ────────────────────────► [8bit] ─► cache

    moe:      the mlp of each token's experts, weighed by their scores, in place of one mlp

    mlp:      ─┬─► gate ─► activation ─(x)─► down ─►        or  ─► up ─► activation ─► down ─►
               └─► up ────────────────┘

Parameters carry the canonical names of llmc/names.py, and every switch is a field of ModelSpec. It is written to be
read and to be right, not to be fast; the arithmetic is that of transformers, to 1e-5 on logits.

Does not know: families, text, sampling.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from llmc import alibi, names, prefix, rope, rounding
from llmc.checkpoint import Checkpoint
from llmc.errors import CheckpointError
from llmc.prefix import Span
from llmc.quant import pack
from llmc.recipe import KVCacheFormat
from llmc.rounding import Linear, Rounding
from llmc.spec import Alibi, Learned, ModelSpec, Moe, Rope

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": functools.partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
}

# cos and sin of the positions of the new tokens, [new, pairs] or [batch, 1, new, pairs]; None where no head is turned.
Rotation = tuple[Tensor, Tensor] | None


class Place(NamedTuple):
    """Where the new tokens stand, for one layer.

    Attributes:
        prefix: How many of each row's first tokens every token sees, int64 [batch]; None where it sees what stands
            before it alone.
    """

    rotation: Rotation
    prefix: Tensor | None = None


class KVCache:
    """Keys (after the rotation) and values of the tokens seen so far, of a batch whose rows are equally long.

    Sequences of different lengths have a cache each.

    Attributes:
        spans: The prefix of each row; empty before the first tokens, which must hold it whole.
    """

    def __init__(self) -> None:
        self.spans: tuple[Span, ...] = ()
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def length(self) -> int:
        """Tokens held."""
        return self._layers[0][0].shape[2] if self._layers else 0

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        self._layers = {layer: (k[:, :, :length], v[:, :, :length]) for layer, (k, v) in self._layers.items()}

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

    def __init__(self, size: int, eps: float, *, plus_one: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size) if plus_one else torch.ones(size))
        self.eps, self.plus_one = eps, plus_one

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        if self.plus_one:
            return (wide * (1 + self.weight.float())).to(x.dtype)
        return self.weight * wide.to(x.dtype)


def norm(spec: ModelSpec, size: int) -> nn.Module:
    """The model's kind of norm over `size` features."""
    rms = functools.partial(RMSNorm, plus_one=spec.norm.plus_one)
    kinds: dict[str, Callable[[int, float], nn.Module]] = {"rms": rms, "layer": nn.LayerNorm}
    return kinds[spec.norm.kind](size, spec.norm.eps)


class Attention(nn.Module):
    """Grouped-query attention, see the drawing above.

    With a `cache_format` it computes with the keys and values that such a cache would give back; `k_scale` and
    `v_scale` (float32 [kv_size]) are its stored scales, None where it has none.
    """

    def __init__(self, spec: ModelSpec, layer: int) -> None:
        super().__init__()
        switches = spec.attention
        self.layer, self.head_dim, self.window = layer, switches.head_dim, spec.window(layer)
        self.has_alibi = isinstance(spec.position, Alibi)
        self.scale = switches.scale
        self.interleaved = isinstance(spec.position, Rope) and spec.position.interleaved
        self.q = Linear(spec.hidden_size, spec.q_size, bias=switches.qkv_bias)
        self.k = Linear(spec.hidden_size, spec.kv_size, bias=switches.qkv_bias)
        self.v = Linear(spec.hidden_size, spec.kv_size, bias=switches.qkv_bias)
        self.o = Linear(spec.q_size, spec.hidden_size, bias=switches.o_bias)
        self.q_norm = norm(spec, switches.head_dim) if switches.qk_norm else None
        self.k_norm = norm(spec, switches.head_dim) if switches.qk_norm else None
        self.cache_format: KVCacheFormat | None = None
        self.k_scale: Tensor | None
        self.v_scale: Tensor | None
        self.register_buffer("k_scale", None)
        self.register_buffer("v_scale", None)

    def forward(self, x: Tensor, place: Place, cache: KVCache | None) -> Tensor:
        """x [batch, new, hidden]."""
        q, k, v = self._heads(self.q(x)), self._heads(self.k(x)), self._heads(self.v(x))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if place.rotation is not None:
            q, k = (rotate(y, *place.rotation, interleaved=self.interleaved) for y in (q, k))
        if self.cache_format is not None:
            k, v = (through_cache(y, scale, self.cache_format) for y, scale in ((k, self.k_scale), (v, self.v_scale)))
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        mask = visible(q.shape[2], k.shape[2], self.window, x.device)
        if place.prefix is not None:
            mask = mask | (torch.arange(k.shape[2], device=x.device) < place.prefix[:, None, None, None])
        if self.has_alibi:
            mask = linear_biases(q.shape[1], mask).to(x)
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale, enable_gqa=True)
        out: Tensor = self.o(mixed.transpose(1, 2).flatten(2))
        return out

    def _heads(self, x: Tensor) -> Tensor:
        """[batch, new, heads * head_dim] -> [batch, heads, new, head_dim]"""
        return x.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Turn the pairs of x [..., new, head_dim] by their angles [..., new, pairs]; what is in no pair stays."""
    first, second, rest = pairs(x, cos.shape[-1], interleaved=interleaved)
    turned = first * cos - second * sin, second * cos + first * sin
    return from_pairs(*turned, rest, interleaved=interleaved)


def pairs(x: Tensor, count: int, *, interleaved: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The first and the second of each of the `count` pairs of a head that are turned, and the dimensions that stay."""
    turned, rest = x[..., : 2 * count], x[..., 2 * count :]
    first, second = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, dim=-1)
    return first, second, rest


def from_pairs(first: Tensor, second: Tensor, rest: Tensor, *, interleaved: bool) -> Tensor:
    """The inverse of `pairs`."""
    turned = torch.stack((first, second), -1).flatten(-2) if interleaved else torch.cat((first, second), dim=-1)
    return torch.cat((turned, rest), dim=-1)


def visible(new: int, length: int, window: int | None, device: torch.device | None = None) -> Tensor:
    """Which of `length` keys each of the last `new` positions may look at: bool [new, length]."""
    keys = torch.arange(length, device=device)
    queries = keys[length - new :, None]
    mask = keys <= queries
    return mask if window is None else mask & (keys > queries - window)


def linear_biases(num_heads: int, mask: Tensor) -> Tensor:
    """ALiBi: what is added to scores [..., heads, new, length], minus infinity where `mask` [..., new, length] is not.

    A mask of several rows has 1 in the place of heads.
    """
    new, length = mask.shape[-2:]
    keys = torch.arange(length, device=mask.device)
    distances = keys[length - new :, None] - keys
    slopes = torch.from_numpy(alibi.slopes(num_heads)).to(mask.device)
    return torch.where(mask, -slopes[:, None, None] * distances, -torch.inf)


def through_cache(x: Tensor, scale: Tensor | None, form: KVCacheFormat) -> Tensor:
    """What a cache gives back of x [batch, kv_heads, new, head_dim].

    Args:
        scale: float32 [kv_heads * head_dim]; None where it follows from x.
    """
    if scale is None:
        wide = x.abs().amax(-1, keepdim=True) / form.highest
        wide = torch.where(wide > 0, wide, torch.ones_like(wide))
    else:
        wide = scale.view(x.shape[1], 1, x.shape[3])
    codes = x / wide
    if form.kind == "fp8":
        return codes.clamp(-form.highest, form.highest).to(torch.float8_e4m3fn).to(x.dtype) * wide
    return codes.round().clamp(-form.highest - 1, form.highest) * wide


class Mlp(nn.Module):
    """down(activation(gate(x)) * up(x)), or down(activation(up(x)))."""

    def __init__(self, spec: ModelSpec, inner: int) -> None:
        super().__init__()
        bias = spec.mlp.bias
        self.activation = ACTIVATIONS[spec.mlp.activation]
        self.gate = Linear(spec.hidden_size, inner, bias=bias) if spec.mlp.gated else None
        self.up = Linear(spec.hidden_size, inner, bias=bias)
        self.down = Linear(inner, spec.hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            out: Tensor = self.down(self.activation(self.up(x)))
        else:
            out = self.down(self.activation(self.gate(x)) * self.up(x))
        return out


class Mixture(nn.Module):
    """The experts that a router chooses for each token, see `llmc.spec.Moe`."""

    def __init__(self, spec: ModelSpec, moe: Moe) -> None:
        super().__init__()
        self.top_k, self.renormalise = moe.top_k, moe.renormalise
        self.router = nn.Linear(spec.hidden_size, moe.num_experts, bias=False)
        self.experts = nn.ModuleList(Mlp(spec, moe.intermediate_size) for _ in range(moe.num_experts))
        self.shared = Mlp(spec, moe.shared_size) if moe.shared_size else None
        self.shared_gate = nn.Linear(spec.hidden_size, 1, bias=False) if moe.shared_size else None

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        weights, chosen = self.router(rows).float().softmax(-1).topk(self.top_k)
        if self.renormalise:
            weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(rows)
        for index, expert in enumerate(self.experts):
            row, place = torch.where(chosen == index)
            out = out.index_add(0, row, expert(rows[row]) * weights[row, place, None].to(x.dtype))
        if self.shared is not None and self.shared_gate is not None:
            out = out + self.shared_gate(rows).sigmoid() * self.shared(rows)
        return out.view_as(x)


class Layer(nn.Module):
    """Attention and MLP (or a mixture of them), each added to the residual stream, and normalised before or after."""

    def __init__(self, spec: ModelSpec, layer: int) -> None:
        super().__init__()
        self.norms_after, self.residual_scale = spec.norm.order == "after", spec.norm.residual_scale
        self.attn_norm = norm(spec, spec.hidden_size)
        self.attn = Attention(spec, layer)
        self.mlp_norm = norm(spec, spec.hidden_size)
        self.attn_post_norm = norm(spec, spec.hidden_size) if spec.norm.order == "both" else nn.Identity()
        self.mlp_post_norm = norm(spec, spec.hidden_size) if spec.norm.order == "both" else nn.Identity()
        moe = spec.experts(layer)
        self.mixer = "moe" if moe else "mlp"
        self.add_module(self.mixer, Mixture(spec, moe) if moe else Mlp(spec, spec.mlp.intermediate_size))

    def forward(self, x: Tensor, place: Place, cache: KVCache | None) -> Tensor:
        mixer = self.get_submodule(self.mixer)
        if self.norms_after:
            x = self.attn_norm(x + self.attn(x, place, cache))
            out: Tensor = self.mlp_norm(x + mixer(x))
        elif self.residual_scale:
            x = self.attn_norm(x)
            x = self.mlp_norm(x * self.residual_scale + self.attn(x, place, cache))
            out = x * self.residual_scale + mixer(x)
        else:
            x = x + self.attn_post_norm(self.attn(self.attn_norm(x), place, cache))
            out = x + self.mlp_post_norm(mixer(self.mlp_norm(x)))
        return out


class Decoder(nn.Module):
    """The decoder that a ModelSpec describes, with freshly drawn weights (see `load` for a checkpoint's)."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        hidden, width = spec.hidden_size, spec.embedding_size or spec.hidden_size
        self.embed = nn.Embedding(spec.vocab_size, width)
        self.embed_in = nn.Linear(width, hidden, bias=False) if spec.embedding_size else None
        self.embed_norm = norm(spec, hidden) if spec.norm.embedding else None
        if isinstance(spec.position, Learned):
            self.positions = nn.Embedding(spec.position.offset + spec.max_positions, hidden)
        self.layers = nn.ModuleList(Layer(spec, layer) for layer in range(spec.num_layers))
        self.norm = norm(spec, hidden) if spec.norm.order != "after" else None
        self.embed_out = nn.Linear(hidden, width, bias=False) if spec.embedding_size else None
        self.head = None if spec.tied or spec.score else nn.Linear(width, spec.vocab_size, bias=False)
        self.score = nn.Linear(width, spec.score.labels, bias=False) if spec.score else None

    def forward(self, tokens: Tensor, *, cache: KVCache | None = None, context: int | None = None) -> Tensor:
        """Logits of every token.

        Rows of different lengths are padded on the right with any token (but the end of a prefix, where the model
        has these): no token sees what comes after it or after the prefix, so the rows' own logits stay as they are,
        and those of the padding mean nothing.

        Args:
            tokens: int64 [batch, new].
            cache: What the same rows have computed before; the new tokens are added to it. The first must hold the
                whole prefix and its end, where there is one.
            context: Tokens of the whole context, for rope scalings that depend on it. By default all tokens up to
                now, as transformers has it; to compute in chunks what a whole forward gives, pass the whole length.

        Returns:
            float32 [batch, new, vocab_size], or [batch, new, labels] of a scoring head.
        """
        return self.logits(self.hidden(tokens, cache=cache, context=context))

    def hidden(self, tokens: Tensor, *, cache: KVCache | None = None, context: int | None = None) -> Tensor:
        """As `forward`, up to what the head reads: [batch, new, hidden_size (or embedding_size)]."""
        x, places = self.enter(tokens, cache, context)
        for layer, place in zip(self.layers, places, strict=True):
            x = layer(x, place, cache)
        return self.leave(x)

    def spans(self, tokens: Tensor) -> tuple[Span, ...]:
        """The prefix of each row, int64 [batch, length]."""
        return tuple(prefix.find(self.spec.prefix, row) for row in tokens.cpu().numpy())

    def enter(
        self, tokens: Tensor, cache: KVCache | None = None, context: int | None = None
    ) -> tuple[Tensor, list[Place]]:
        """What goes into the first layer, and where the tokens stand for each layer; see `forward`."""
        past = cache.length if cache else 0
        spans = cache.spans if cache and past else self.spans(tokens)
        if cache:
            cache.spans = spans
        length = past + tokens.shape[1]
        x = self.embed(tokens) * self.spec.embedding_scale
        if self.embed_in is not None:
            x = self.embed_in(x)
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        if isinstance(self.spec.position, Learned):
            offset = self.spec.position.offset
            x = x + self.positions(torch.arange(past + offset, length + offset, device=tokens.device))
        sees = torch.tensor([span.length for span in spans], device=x.device) if self.spec.prefix else None
        return x, [Place(rotation, sees) for rotation in self._rotations(spans, past, length, context, like=x)]

    def leave(self, x: Tensor) -> Tensor:
        """What comes out of the last layer, made ready for the head."""
        out: Tensor = x if self.norm is None else self.norm(x)
        return out if self.embed_out is None else self.embed_out(out)

    def _rotations(
        self, spans: Sequence[Span], past: int, length: int, context: int | None, *, like: Tensor
    ) -> list[Rotation]:
        """Of each layer; they share what is the same."""
        if not isinstance(self.spec.position, Rope):
            return [None] * self.spec.num_layers
        ropes = [self.spec.rope_of(layer) for layer in range(self.spec.num_layers)]
        made: dict[Rope, Rotation] = {}
        for one in dict.fromkeys(ropes):
            # On the second of two axes, tokens without a prefix stand one place further.
            tables = rope.rotary_table(self.spec, length + one.axes - 1, context=context or length, of=one)
            cos, sin = (torch.from_numpy(_of_tokens(table, one, spans, past, length)).to(like) for table in tables)
            made[one] = cos, sin
        return [made[one] for one in ropes]

    def logits(self, hidden: Tensor) -> Tensor:
        """The head: [..., hidden_size (or embedding_size)] -> float32 [..., vocab_size (or labels)]."""
        if self.score is not None:
            return functional.linear(hidden, self.score.weight).float()
        weight = self.embed.weight if self.head is None else self.head.weight
        if self.spec.normalised_head:
            weight = functional.normalize(weight)
        return functional.linear(hidden, weight).float()

    def simulate_kv_cache(self, form: KVCacheFormat, scales: Mapping[str, Tensor]) -> None:
        """Compute as with a KV cache of that format.

        Args:
            scales: `layers.N.attn.k_scale` and `.v_scale` of some layers, float32 [kv_size]; none for dynamic ones.
        """
        for module in self.modules():
            if isinstance(module, Attention):
                module.cache_format = form
        for name, scale in scales.items():
            module_name, _, buffer = name.rpartition(".")
            self.get_submodule(module_name).register_buffer(buffer, scale)

    def round_inputs(self, roundings: Mapping[str, Rounding]) -> None:
        """Compute as with rounded activations, by the names of linears."""
        for name, each in roundings.items():
            self.get_submodule(name).rounding = each  # type: ignore[assignment]


def _of_tokens(table: rope.Floats, of: Rope, spans: Sequence[Span], past: int, length: int) -> rope.Floats:
    """The rows of a rotary table for tokens `past` to `length`: [new, pairs], or of two axes [batch, 1, new, pairs]."""
    if of.axes == 1:
        return table[past:]
    rows = [np.concatenate([table[axis] for axis in prefix.places(span, past, length - past)], -1) for span in spans]
    return np.stack(rows)[:, None]


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
        scales = [name for name in checkpoint if name.endswith((".k_scale", ".v_scale"))]
        decoder.simulate_kv_cache(
            checkpoint.recipe.kv_cache, {name: torch.from_numpy(checkpoint[name]) for name in scales}
        )
    decoder.round_inputs(rounding.read(checkpoint, names.matrices(checkpoint.spec)))
    return decoder.requires_grad_(False).eval()


def tensor(checkpoint: Checkpoint, name: str) -> Tensor:
    """One tensor of the unquantized model in float32; see `load`."""
    module = name.removesuffix(".weight")
    weight_format = checkpoint.recipe.format_of(module) if checkpoint.recipe else None
    if weight_format is None or f"{module}.qweight" not in checkpoint:
        values = checkpoint[name].astype("float32", copy=False)
    else:
        qweight, scale = checkpoint[f"{module}.qweight"], checkpoint[f"{module}.scale"]
        zero, order, scale_2 = (checkpoint.get(f"{module}.{kind}") for kind in ("zero", "input_order", "scale_2"))
        columns = names.tensors(checkpoint.spec)[name][1]
        values = pack.dequantize(qweight, scale, zero, weight_format, columns, order=order, scale_2=scale_2)
    # Extremes carry every NaN and infinity, and need no memory.
    if not np.isfinite((values.min(), values.max())).all():
        raise CheckpointError(f"{checkpoint.folder}: '{name}' holds values that are not finite")
    return torch.from_numpy(values)
