"""The config that LLaMA introduced and its relatives share: read into a spec, and written from one.

What differs between the relatives comes as arguments: defaults of settings that may be missing, and switches that
the family has and others lack.
"""

from __future__ import annotations

from typing import Any, Literal

from llmc.converters.reader import HARMLESS, Reader
from llmc.converters.rope_config import PLAIN, read_rope, write_rope
from llmc.errors import UnsupportedModelError
from llmc.spec import Alibi, Attention, Mlp, ModelSpec, Moe, Norm, Rope

SLIDING, FULL = "sliding_attention", "full_attention"


def read_decoder(
    reader: Reader,
    family: str,
    *,
    num_kv_heads: int | None,
    max_positions: int,
    head_dim: int | None = None,
    window: tuple[int | None, tuple[int, ...]] = (None, ()),
    qk_norm: bool = False,
    qkv_bias: bool = False,
    o_bias: bool = False,
    mlp_bias: bool = False,
    eps: float = 1e-6,
    rope: Rope = PLAIN,
    norms: Literal["before", "both"] = "before",
    moe: Moe | None = None,
    alibi: bool = False,
    normalised_head: bool = False,
) -> ModelSpec:
    """Read what is common, take the rest from the arguments, and refuse what is left over.

    Args:
        num_kv_heads, head_dim: When the config does not say; None means as many as `num_attention_heads`, and hidden
            size over heads.
        max_positions, eps, rope: When the config does not say.
        window: The sliding window and the layers that see all in spite of it.
        alibi: There is none, and linear biases in its place.

    Raises:
        UnsupportedModelError: A setting is missing, misspelt, of the wrong type or of an unsupported value.
    """
    hidden_size, num_heads = reader.integer("hidden_size"), reader.integer("num_attention_heads")
    position, reach = _read_position(reader, max_positions, rope, alibi=alibi)
    _refuse_what_none_has(reader)
    spec = ModelSpec(
        family=family,
        vocab_size=reader.integer("vocab_size"),
        hidden_size=hidden_size,
        num_layers=reader.integer("num_hidden_layers"),
        max_positions=reach,
        norm=Norm(eps=reader.number("rms_norm_eps", eps), order=norms),
        position=position,
        attention=Attention(
            num_heads=num_heads,
            num_kv_heads=reader.integer("num_key_value_heads", num_kv_heads or num_heads),
            head_dim=reader.integer("head_dim", head_dim or hidden_size // num_heads),
            qk_norm=qk_norm,
            qkv_bias=qkv_bias,
            o_bias=o_bias,
            window=window[0],
            full_layers=window[1],
        ),
        mlp=Mlp(intermediate_size=reader.integer("intermediate_size"), bias=mlp_bias),
        moe=moe,
        tied=reader.flag("tie_word_embeddings"),
        normalised_head=normalised_head,
    )
    reader.done(HARMLESS)
    return spec


def _read_position(reader: Reader, max_positions: int, rope: Rope, *, alibi: bool) -> tuple[Rope | Alibi, int]:
    """The kind of positions, and the longest context in tokens."""
    if alibi:
        return Alibi(), max_positions
    return read_rope(reader, reader.integer("max_position_embeddings", max_positions), rope)


def _refuse_what_none_has(reader: Reader) -> None:
    """Settings that some config of these families may carry, at values that none of their decoders computes."""
    activation = reader.text("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise UnsupportedModelError(f"{reader.where}: 'hidden_act' is {activation!r}; llmc supports 'silu' alone")
    reader.only("rope_interleaved", False, "the head's halves form the pairs")
    reader.only("use_mrope", False, "positions are one number")
    reader.only("is_encoder_decoder", False, "there is no encoder")
    reader.only("add_cross_attention", False, "there is no encoder")


def read_layer_windows(reader: Reader) -> tuple[int | None, tuple[int, ...]]:
    """Qwen's sliding window: none unless `use_sliding_window`, and none in the first `max_window_layers` layers.

    transformers 5 spells the layers out in `layer_types`, which then decides.

    Returns:
        The window, and the layers that see all in spite of it.
    """
    num_layers = reader.integer("num_hidden_layers")
    used, window = reader.flag("use_sliding_window"), reader.window("sliding_window", 4096)
    first = reader.integer("max_window_layers", 28)
    types = reader.texts("layer_types")
    window = window if used else None
    if types is None:
        types = tuple(SLIDING if window and layer >= first else FULL for layer in range(num_layers))
    if len(types) != num_layers or set(types) - {SLIDING, FULL}:
        raise UnsupportedModelError(
            f"{reader.where}: 'layer_types' is {list(types)}; expected {SLIDING!r} or {FULL!r} for each of "
            f"{num_layers} layers"
        )
    if SLIDING not in types:
        return None, ()
    if window is None:
        raise UnsupportedModelError(
            f"{reader.where}: 'layer_types' has {SLIDING!r}, but 'use_sliding_window' and 'sliding_window' give none"
        )
    return window, tuple(layer for layer, kind in enumerate(types) if kind == FULL)


def write_layer_windows(spec: ModelSpec) -> dict[str, Any]:
    """The inverse of `read_layer_windows`, in both spellings where the older one can say it."""
    full = [spec.window(layer) is None for layer in range(spec.num_layers)]
    return {
        "use_sliding_window": spec.attention.window is not None,
        "sliding_window": spec.attention.window,
        "max_window_layers": [*full, False].index(False),
        "layer_types": [FULL if is_full else SLIDING for is_full in full],
    }


def read_experts(reader: Reader, *, shared_size: int | None = None) -> Moe:
    """Qwen's experts: in every `decoder_sparse_step`th layer that is not one of `mlp_only_layers`."""
    layers, dense = range(reader.integer("num_hidden_layers")), reader.integers("mlp_only_layers")
    step = reader.integer("decoder_sparse_step", 1)
    if step < 1:
        raise UnsupportedModelError(f"{reader.where}: 'decoder_sparse_step' is {step}, expected 1 or more")
    return Moe(
        # transformers 5 writes Qwen3's number under the first name, which is Mixtral's.
        num_experts=reader.integer("num_local_experts" if "num_local_experts" in reader else "num_experts"),
        top_k=reader.integer("num_experts_per_tok"),
        intermediate_size=reader.integer("moe_intermediate_size"),
        renormalise=reader.flag("norm_topk_prob"),
        shared_size=shared_size,
        dense_layers=tuple(layer for layer in layers if layer in dense or (layer + 1) % step),
    )


def write_experts(spec: ModelSpec) -> dict[str, Any]:
    """The inverse of `read_experts`."""
    if spec.moe is None:
        return {}
    return {
        "num_experts": spec.moe.num_experts,
        "num_experts_per_tok": spec.moe.top_k,
        "moe_intermediate_size": spec.moe.intermediate_size,
        "norm_topk_prob": spec.moe.renormalise,
        "mlp_only_layers": list(spec.moe.dense_layers),
    }


def write_decoder(spec: ModelSpec, architecture: str, **settings: Any) -> dict[str, Any]:
    """A config from which `read_decoder` makes this spec.

    Args:
        architecture: transformers' class; its `model_type` is the spec's family.
        settings: What this family has and others lack.
    """
    return {
        "architectures": [architecture],
        "model_type": spec.family,
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.mlp.intermediate_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.attention.num_heads,
        "num_key_value_heads": spec.attention.num_kv_heads,
        "head_dim": spec.attention.head_dim,
        "hidden_act": spec.mlp.activation,
        "rms_norm_eps": spec.norm.eps,
        "tie_word_embeddings": spec.tied,
        **write_rope(spec),
        **settings,
    }
