"""ModelSpec: everything that decides what a decoder computes, and nothing about who made it or what will run it.

A family's reader turns the authors' config into a spec; the reference decoder, the ONNX builder, the quantizers and
the sharding all follow from the spec alone. A switch stands here only when the decoder and the builder implement it:
what they cannot compute cannot be said, and an unknown key is refused.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from llmc.config import Strict


class Norm(Strict):
    """The statistics are in fp32.

    rms: x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019).
    layer: (x - mean(x)) / sqrt(variance(x) + eps) * weight + bias (Ba et al. 2016).

    Attributes:
        embedding: The embeddings are normalised as well, before the first layer.
        plus_one: A weight is stored as its difference from one.
        order: Of each attention and each MLP the input is normalised, and so is what the last layer gives ("before");
            or the sum of its output and the residual stream is, and nothing at the end ("after", as in Vaswani et al.
            2017); or as "before", and its output as well before it is added ("both").
        residual_scale: Outputs are added to the normalised input times this, in place of the input as it came
            (DeepNorm, Wang et al. 2022, as GLM-130B has it, Zeng et al. 2022); None: to the input.
    """

    kind: Literal["rms", "layer"] = "rms"
    eps: PositiveFloat
    embedding: bool = False
    plus_one: bool = False
    order: Literal["before", "after", "both"] = "before"
    residual_scale: PositiveFloat | None = None

    @model_validator(mode="after")
    def _only_rms_plus_one(self) -> Norm:
        if self.plus_one and self.kind != "rms":
            raise ValueError(f"'plus_one' does not go with a norm of kind '{self.kind}'")
        return self

    @model_validator(mode="after")
    def _only_a_normalised_input_is_scaled(self) -> Norm:
        if self.residual_scale and self.order != "before":
            raise ValueError(f"'residual_scale' does not go with norms that stand '{self.order}'")
        return self


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
    """Rotary position embedding (Su et al. 2021).

    Attributes:
        fraction: How much of a head is turned: its first dimensions.
        interleaved: Neighbours form the pairs; else the halves of what is turned do.
        window_theta: The base in layers with a sliding window, where nothing is scaled; None: they are as the others.
        axes: Of two, the first half of the pairs turns by a token's place in the prefix, the other by its place behind
            it (llmc/prefix.py); both have the same frequencies.
        half: Frequencies are rounded to float16, as ChatGLM-6B's authors keep them.
    """

    kind: Literal["rope"] = "rope"
    theta: PositiveFloat = 10000.0
    scaling: Scaling | None = None
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    interleaved: bool = False
    window_theta: PositiveFloat | None = None
    axes: Literal[1, 2] = 1
    half: bool = False

    def size(self, head_dim: int) -> int:
        """How many dimensions of a head are turned."""
        return int(head_dim * self.fraction)


class Learned(Strict):
    """A vector for each position, added to the token's embedding.

    Attributes:
        offset: The row of the first position; those before it are never used.
    """

    kind: Literal["learned"] = "learned"
    offset: NonNegativeInt = 0


class Alibi(Strict):
    """Attention with linear biases (Press et al. 2022): a score falls with the distance to its key, by a slope of its
    head (llmc/alibi.py)."""

    kind: Literal["alibi"] = "alibi"


class Prefix(Strict):
    """A prefix that sees itself whole: all tokens before the first `end`. That and all after it see what stands before
    them, as ever (GLM, Du et al. 2022, 2.1). Text without an `end` has no prefix.

    Attributes:
        end: A token.
        marks: Tokens that stand for what is to be written. The first of them that the prefix holds says where on the
            first of two axes the tokens behind the prefix stand; without one it is the prefix's last place.
    """

    end: NonNegativeInt
    marks: tuple[NonNegativeInt, ...] = ()


Position = Annotated[Rope | Learned | Alibi, Field(discriminator="kind")]


class Attention(Strict):
    """Grouped-query attention.

    Attributes:
        qk_norm: Each head of q and k is normalised (with the model's norm) before the rotation.
        qkv_bias, o_bias: The projections have biases.
        scale: Of the scores; None is 1 / sqrt(head_dim).
        window: A token sees itself and the `window - 1` before it; None sees all.
        full_layers: Layers that see all in spite of `window`.
    """

    num_heads: PositiveInt
    num_kv_heads: PositiveInt
    head_dim: PositiveInt
    qk_norm: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    scale: PositiveFloat | None = None
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
    """down(activation(gate(x)) * up(x)), or, when not gated, down(activation(up(x))).

    `gelu` is exact, `gelu_tanh` its approximation (Hendrycks and Gimpel 2016).
    """

    intermediate_size: PositiveInt
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    gated: bool = True
    bias: bool = False


class Moe(Strict):
    """A mixture of experts in place of the MLP: each token goes through the `top_k` experts of the highest scores, and
    the softmax of all scores weighs what they give (Shazeer et al. 2017; Fedus et al. 2021).

    Attributes:
        intermediate_size: Of an expert, which is an MLP with the model's activation.
        renormalise: The weights of the chosen experts are divided by their sum.
        shared_size: The intermediate size of one more expert, which every token goes through, times the sigmoid of a
            score of its own; None where there is none.
        dense_layers: Layers that have a plain MLP all the same.
    """

    num_experts: PositiveInt
    top_k: PositiveInt
    intermediate_size: PositiveInt
    renormalise: bool = True
    shared_size: PositiveInt | None = None
    dense_layers: tuple[int, ...] = ()

    @model_validator(mode="after")
    def _enough_experts(self) -> Moe:
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k {self.top_k} is more than num_experts {self.num_experts}")
        return self


class Score(Strict):
    """A head that gives scores in place of logits, as of a reward model or a classifier.

    Attributes:
        labels: How many scores.
        pad: A text's scores are those of its last token that is not this one; None: of its last.
    """

    labels: PositiveInt
    pad: NonNegativeInt | None = None


class ModelSpec(Strict):
    """A decoder.

    Attributes:
        family: Who made it: for people, and for exporting back; never branched on.
        vocab_size: Rows of the embedding and of the head.
        max_positions: The longest context that the model was made for, tokens.
        tied: The head is the embedding, and no `head.weight` exists.
        normalised_head: Each row of the head is divided by its Euclidean length.
        embedding_size: Width of the embedding and of the head, where linears lead from it to the hidden size and back;
            None where it is the hidden size.
        embedding_scale: Embeddings are multiplied by it.
        prefix: What of a text sees itself whole; None where no token sees what comes after it.
        score: The scoring head that stands in the head's place, if one does.
    """

    family: str
    vocab_size: PositiveInt
    hidden_size: PositiveInt
    num_layers: PositiveInt
    max_positions: PositiveInt
    norm: Norm
    position: Position
    attention: Attention
    mlp: Mlp
    moe: Moe | None = None
    tied: bool = False
    normalised_head: bool = False
    embedding_size: PositiveInt | None = None
    embedding_scale: PositiveFloat = 1.0
    prefix: Prefix | None = None
    score: Score | None = None

    @model_validator(mode="after")
    def _one_head(self) -> ModelSpec:
        if self.score and (self.tied or self.normalised_head):
            raise ValueError("'score' stands in the head's place: it does not go with 'tied' and 'normalised_head'")
        return self

    @model_validator(mode="after")
    def _experts_are_gated(self) -> ModelSpec:
        if self.moe and (self.mlp.bias or not self.mlp.gated):
            raise ValueError("experts are gated and have no biases: 'moe' does not go with such an 'mlp'")
        return self

    @model_validator(mode="after")
    def _turned_in_pairs(self) -> ModelSpec:
        if isinstance(self.position, Rope):
            size = self.position.size(self.attention.head_dim)
            if size < 2 or size % (2 * self.position.axes):
                raise ValueError(f"{size} of {self.attention.head_dim} dimensions of a head cannot be turned in pairs")
        return self

    @model_validator(mode="after")
    def _prefixes(self) -> ModelSpec:
        if self.prefix and self.attention.window is not None:
            raise ValueError("a prefix that sees itself whole does not go with a sliding window")
        if self.prefix is None and isinstance(self.position, Rope) and self.position.axes == 2:
            raise ValueError("positions on two axes are those of a model with a prefix")
        return self

    def experts(self, layer: int) -> Moe | None:
        """The mixture of experts of a layer, None where it has a plain MLP."""
        return None if self.moe is None or layer in self.moe.dense_layers else self.moe

    def rope_of(self, layer: int) -> Rope:
        """The rotary embedding of a layer, if positions are rotary at all."""
        rope = self.rope
        if rope.window_theta is None or self.window(layer) is None:
            return rope
        return rope.model_copy(update={"theta": rope.window_theta, "scaling": None, "window_theta": None})

    def window(self, layer: int) -> int | None:
        """The sliding window of a layer, None where it sees everything."""
        return None if layer in self.attention.full_layers else self.attention.window

    @property
    def rope(self) -> Rope:
        """The rotary embedding.

        Raises:
            ValueError: The model has another kind of positions.
        """
        if not isinstance(self.position, Rope):
            raise ValueError(f"positions of kind '{self.position.kind}' turn nothing")
        return self.position

    @property
    def q_size(self) -> int:
        """Width of all query heads together."""
        return self.attention.num_heads * self.attention.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads together; of the value heads, too."""
        return self.attention.num_kv_heads * self.attention.head_dim
