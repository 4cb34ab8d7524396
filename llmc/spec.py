"""ModelSpec: everything that decides what a decoder computes, and nothing about who made it or what will run it.

A family's reader turns the authors' config into a spec; the reference decoder, the ONNX builder, the quantizers and
the sharding all follow from the spec alone. A switch stands here only when the decoder and the builder implement it:
what they cannot compute cannot be said, and an unknown key is refused.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from llmc.config import Strict


class Norm(Strict):
    """RMSNorm (Zhang and Sennrich 2019): x / sqrt(mean(x^2) + eps) * weight, the statistics in fp32."""

    kind: Literal["rms"] = "rms"
    eps: PositiveFloat


class LinearScaling(Strict):
    """All positions divided by `factor` (Chen et al. 2023, position interpolation)."""

    kind: Literal["linear"] = "linear"
    factor: Annotated[float, Field(ge=1)]


class DynamicScaling(Strict):
    """NTK-aware: beyond `original_max_positions` the base grows with the length of the context."""

    kind: Literal["dynamic"] = "dynamic"
    factor: Annotated[float, Field(ge=1)]
    original_max_positions: PositiveInt


class YarnScaling(Strict):
    """YaRN (Peng et al. 2023): low frequencies interpolated, high ones kept, a linear ramp between."""

    kind: Literal["yarn"] = "yarn"
    factor: Annotated[float, Field(ge=1)]
    original_max_positions: PositiveInt
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


class LongRopeScaling(Strict):
    """LongRoPE (Ding et al. 2024): a factor per frequency, another set beyond `original_max_positions`."""

    kind: Literal["longrope"] = "longrope"
    original_max_positions: PositiveInt
    attention_factor: float
    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]


class Llama3Scaling(Strict):
    """Llama 3.1: wavelengths over original/low_freq_factor divided by `factor`, under original/high_freq_factor kept,
    smooth between."""

    kind: Literal["llama3"] = "llama3"
    factor: Annotated[float, Field(ge=1)]
    low_freq_factor: PositiveFloat
    high_freq_factor: PositiveFloat
    original_max_positions: PositiveInt


Scaling = Annotated[
    LinearScaling | DynamicScaling | YarnScaling | LongRopeScaling | Llama3Scaling, Field(discriminator="kind")
]


class Rope(Strict):
    """Rotary position embedding (Su et al. 2021) of the whole head, the head's halves forming the pairs."""

    kind: Literal["rope"] = "rope"
    theta: PositiveFloat = 10000.0
    scaling: Scaling | None = None


class Attention(Strict):
    """Grouped-query attention.

    Attributes:
        qk_norm: Each head of q and k is normalised (with the model's norm) before the rotation.
        qkv_bias, o_bias: The projections have biases.
        window: A token sees itself and the `window - 1` before it; None sees all.
        full_layers: Layers that see all in spite of `window`.
    """

    num_heads: PositiveInt
    num_kv_heads: PositiveInt
    head_dim: PositiveInt
    qk_norm: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    window: PositiveInt | None = None
    full_layers: tuple[int, ...] = ()

    @model_validator(mode="after")
    def _heads_divide(self) -> Attention:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: the rotation needs pairs")
        return self


class Mlp(Strict):
    """down(activation(gate(x)) * up(x))."""

    intermediate_size: PositiveInt
    activation: Literal["silu"] = "silu"
    bias: bool = False


class ModelSpec(Strict):
    """A decoder.

    Attributes:
        family: Who made it: for people, and for exporting back; never branched on.
        vocab_size: Rows of the embedding and of the head.
        max_positions: The longest context that the model was made for, tokens.
        tied: The head is the embedding, and no `head.weight` exists.
    """

    family: str
    vocab_size: PositiveInt
    hidden_size: PositiveInt
    num_layers: PositiveInt
    max_positions: PositiveInt
    norm: Norm
    position: Rope
    attention: Attention
    mlp: Mlp
    tied: bool = False

    def window(self, layer: int) -> int | None:
        """The sliding window of a layer, None where it sees everything."""
        return None if layer in self.attention.full_layers else self.attention.window

    @property
    def q_size(self) -> int:
        """Width of all query heads together."""
        return self.attention.num_heads * self.attention.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads together; of the value heads, too."""
        return self.attention.num_kv_heads * self.attention.head_dim
