"""The decoder of before LLaMA, that GPT-2, OPT, BLOOM and ChatGLM-6B share: LayerNorm, biases everywhere, no gate.

Their configs have a name each for the same size, so sizes come as arguments.
"""

from __future__ import annotations

from typing import Any, Literal

from llmc.converters.reader import HARMLESS, Reader
from llmc.converters.rules import SAME, Op, Rule
from llmc.errors import UnsupportedModelError
from llmc.spec import Attention, Mlp, ModelSpec, Norm, Position, Prefix

Activation = Literal["gelu", "gelu_tanh", "relu"]

# transformers' names (activations.py); the first of each kind is the one to write.
ACTIVATIONS: dict[str, Activation] = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
}
WRITTEN: dict[str, str] = {kind: name for name, kind in reversed(ACTIVATIONS.items())}


def weight_and_bias(ours: str | tuple[str, ...], theirs: str, op: Op = SAME, bias_op: Op = SAME) -> tuple[Rule, Rule]:
    """The two rules of a linear or a LayerNorm; `ours` and `theirs` without `.weight`."""
    parts = (ours,) if isinstance(ours, str) else ours
    weight, bias = (tuple(f"{part}.{kind}" for part in parts) for kind in ("weight", "bias"))
    return Rule(weight, f"{theirs}.weight", op), Rule(bias, f"{theirs}.bias", bias_op)


def read_classic(
    reader: Reader,
    family: str,
    *,
    sizes: tuple[int, int, int],
    intermediate_size: int,
    max_positions: int,
    position: Position,
    eps: float,
    activation: Activation,
    norm_order: Literal["before", "after"] = "before",
    embedding_norm: bool = False,
    embedding_size: int | None = None,
    residual_scale: float | None = None,
    prefix: Prefix | None = None,
    tied: bool = True,
    harmless: frozenset[str] = frozenset(),
) -> ModelSpec:
    """Read what is common, take the rest from the arguments, and refuse what is left over.

    Args:
        sizes: Hidden size, layers, heads.
        tied: Where the config does not say.
        harmless: Settings of this family that change nothing.

    Raises:
        UnsupportedModelError: A setting is missing, misspelt, of the wrong type or of an unsupported value.
    """
    hidden_size, num_layers, num_heads = sizes
    if num_heads < 1 or hidden_size % num_heads:
        raise UnsupportedModelError(f"{reader.where}: {num_heads} heads cannot share a hidden size of {hidden_size}")
    reader.only("is_encoder_decoder", False, "there is no encoder")
    reader.only("add_cross_attention", False, "there is no encoder")
    spec = ModelSpec(
        family=family,
        vocab_size=reader.integer("vocab_size"),
        hidden_size=hidden_size,
        num_layers=num_layers,
        max_positions=max_positions,
        norm=Norm(kind="layer", eps=eps, order=norm_order, embedding=embedding_norm, residual_scale=residual_scale),
        position=position,
        attention=Attention(
            num_heads=num_heads, num_kv_heads=num_heads, head_dim=hidden_size // num_heads, qkv_bias=True, o_bias=True
        ),
        mlp=Mlp(intermediate_size=intermediate_size, activation=activation, gated=False, bias=True),
        tied=reader.flag("tie_word_embeddings", default=tied),
        embedding_size=embedding_size,
        prefix=prefix,
    )
    reader.done(HARMLESS | harmless)
    return spec


def write_classic(spec: ModelSpec, architecture: str, **settings: Any) -> dict[str, Any]:
    """A config from which the family makes this spec.

    Args:
        architecture: transformers' class; its `model_type` is the spec's family.
        settings: The sizes, and what else the family's config says, in its own words.
    """
    return {
        "architectures": [architecture],
        "model_type": spec.family,
        "vocab_size": spec.vocab_size,
        "tie_word_embeddings": spec.tied,
        **settings,
    }
