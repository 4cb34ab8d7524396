"""The config of Gemma 3's text models: two rotary embeddings, layers with and without a window by turns."""

from __future__ import annotations

import math
from typing import Any

from llmc.converters.decoder_config import FULL, SLIDING
from llmc.converters.reader import HARMLESS, Reader
from llmc.converters.rope_config import read_rope, write_rope
from llmc.errors import UnsupportedModelError
from llmc.spec import Attention, Mlp, ModelSpec, Norm, Rope

# What transformers takes when a config does not say.
_THETA, _WINDOW_THETA = 1e6, 1e4
_ONLY = {
    "add_cross_attention": False, "attention_bias": False, "attn_logit_softcapping": None,
    "final_logit_softcapping": None, "hidden_activation": "gelu_pytorch_tanh", "is_encoder_decoder": False,
    "use_bidirectional_attention": False,
}  # fmt: skip


def read_gemma3(reader: Reader, family: str) -> ModelSpec:
    """The spec of such a config.

    Raises:
        UnsupportedModelError: A setting is missing, unknown, or has a value that no published model has.
    """
    for key, value in _ONLY.items():
        reader.only(key, value, "as in every published Gemma 3")
    position, reach = _rope(reader, reader.integer("max_position_embeddings"))
    hidden_size, types = reader.integer("hidden_size"), _layer_types(reader)
    window = reader.window("sliding_window", 4096)
    spec = ModelSpec(
        family=family,
        vocab_size=reader.integer("vocab_size"),
        hidden_size=hidden_size,
        num_layers=len(types),
        max_positions=reach,
        norm=Norm(eps=reader.number("rms_norm_eps", 1e-6), order="both", plus_one=True),
        position=position,
        attention=Attention(
            num_heads=reader.integer("num_attention_heads"),
            num_kv_heads=reader.integer("num_key_value_heads"),
            head_dim=reader.integer("head_dim", 256),
            qk_norm=True,
            scale=reader.number("query_pre_attn_scalar", 256) ** -0.5,
            window=window if SLIDING in types else None,
            full_layers=tuple(layer for layer, kind in enumerate(types) if kind == FULL) if SLIDING in types else (),
        ),
        mlp=Mlp(intermediate_size=reader.integer("intermediate_size"), activation="gelu_tanh"),
        tied=reader.flag("tie_word_embeddings", default=True),
        embedding_scale=math.sqrt(hidden_size),
    )
    reader.done(HARMLESS | {"cache_implementation", "_sliding_window_pattern"})
    return spec


def _layer_types(reader: Reader) -> tuple[str, ...]:
    count, pattern = reader.integer("num_hidden_layers"), reader.integer("sliding_window_pattern", 6)
    types = reader.texts("layer_types") or tuple(SLIDING if (i + 1) % pattern else FULL for i in range(count))
    if len(types) != count or set(types) - {SLIDING, FULL}:
        raise UnsupportedModelError(
            f"{reader.where}: 'layer_types' is {list(types)}; expected {SLIDING!r} or {FULL!r} for each of "
            f"{count} layers"
        )
    return types


def _rope(reader: Reader, max_positions: int) -> tuple[Rope, int]:
    """transformers 5 has a section for each type of layer; before, the layers with a window had a base alone."""
    window_theta, new = reader.number("rope_local_base_freq", _WINDOW_THETA), reader.section("rope_parameters")
    if new is None:
        rope, reach = read_rope(reader, max_positions, Rope(theta=_THETA))
        return rope.model_copy(update={"window_theta": window_theta}), reach
    full, sliding = new.section(FULL), new.section(SLIDING)
    new.done()
    rope, reach = Rope(theta=_THETA), max_positions
    if full:
        rope, reach = read_rope(full.inside("rope_parameters"), max_positions, rope)
    if sliding:
        sliding.only("rope_type", "default", "as in every published Gemma 3")
        window_theta = sliding.number("rope_theta", window_theta)
        sliding.done()
    return rope.model_copy(update={"window_theta": window_theta}), reach


def write_gemma3(spec: ModelSpec) -> dict[str, Any]:
    """What `write_decoder` does not say of such a spec."""
    types = [FULL if spec.window(layer) is None else SLIDING for layer in range(spec.num_layers)]
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "layer_types": types,
        "query_pre_attn_scalar": round(spec.attention.scale**-2) if spec.attention.scale else spec.attention.head_dim,
        "rope_local_base_freq": spec.rope.window_theta,
        "sliding_window": spec.attention.window,
        **write_rope(spec),
    }
