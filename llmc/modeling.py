"""The reference decoder as a model of transformers, for families that transformers has no class for.

    import llmc.modeling
    model = transformers.AutoModelForCausalLM.from_pretrained("my/export")

Importing registers `LlmcConfig` and `LlmcForCausalLM` with AutoConfig and AutoModelForCausalLM; no code comes with a
model. The config holds the ModelSpec, and tensors have their canonical names, so that `llmc convert` takes back what
`save_pretrained` wrote (converters/own.py).

Does not know: families, and rows padded on the left: positions are counted from a row's first token.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from llmc.errors import UserError
from llmc.model import Decoder, KVCache
from llmc.spec import ModelSpec


class LlmcConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]  # of transformers' __init_subclass__
    """A ModelSpec, and what transformers keeps beside it.

    Attributes:
        spec: The fields of llmc.spec.ModelSpec as plain values.
    """

    model_type = "llmc"

    def __init__(self, spec: dict[str, Any] | None = None, **settings: Any) -> None:
        self.spec = spec or {}
        # Head and embedding are one parameter in a tied decoder: there is nothing that transformers should tie.
        super().__init__(**settings | {"tie_word_embeddings": False})

    @property
    def model_spec(self) -> ModelSpec:
        """The spec itself."""
        return ModelSpec.model_validate_json(json.dumps(self.spec))

    @property
    def vocab_size(self) -> int:
        return int(self.spec["vocab_size"])

    @property
    def hidden_size(self) -> int:
        return int(self.spec["hidden_size"])

    @property
    def num_hidden_layers(self) -> int:
        return int(self.spec["num_layers"])

    @property
    def num_attention_heads(self) -> int:
        return int(self.spec["attention"]["num_heads"])

    @property
    def max_position_embeddings(self) -> int:
        return int(self.spec["max_positions"])


class _SharedCache(KVCache):
    """transformers' cache, as the decoder asks for one."""

    def __init__(self, theirs: Cache) -> None:
        super().__init__()
        self.theirs = theirs

    @classmethod
    def of(cls, theirs: Cache) -> _SharedCache:
        """The same one for as long as theirs is used, for what else the decoder keeps beside keys and values."""
        found: _SharedCache = vars(theirs).setdefault("llmc", cls(theirs))
        return found

    @property
    def length(self) -> int:
        return int(self.theirs.get_seq_length())

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.theirs.update(k, v, layer)
        return keys, values


class LlmcForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]
    """The decoder that a config's spec describes."""

    config_class = LlmcConfig
    base_model_prefix = "decoder"
    main_input_name = "input_ids"
    _no_split_modules = ["Layer"]

    def __init__(self, config: LlmcConfig) -> None:
        super().__init__(config)
        self.decoder = Decoder(config.model_spec)
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.decoder.embed

    def get_output_embeddings(self) -> torch.nn.Module | None:
        return self.decoder.head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """As transformers' own models: logits float32 [batch, new (or `logits_to_keep`), vocab], loss where labels are.

        Args:
            attention_mask: [batch, past + new], 0 where a row is padded, which it may be on the right, and only in a
                forward without a past.

        Raises:
            UserError: A row is padded in another place.
        """
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        _refuse_other_padding(attention_mask, past)
        cache = None if past_key_values is None else _SharedCache.of(past_key_values)
        hidden = self.decoder.hidden(input_ids, cache=cache)
        logits = self.decoder.logits(hidden[:, -logits_to_keep:])
        loss = None if labels is None else self.loss_function(logits, labels, vocab_size=self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)


def _refuse_other_padding(mask: Tensor | None, past: int) -> None:
    if mask is None or mask.ndim != 2 or bool(mask.all()):
        return
    is_on_the_right = bool((mask[:, 1:] <= mask[:, :-1]).all())
    if past or not is_on_the_right:
        raise UserError(
            "llmc's decoder counts positions from a row's first token: generate from rows of one length, or one by one "
            "(llmc serve batches rows of any length); for a loss, pad on the right"
        )


AutoConfig.register(LlmcConfig.model_type, LlmcConfig)
AutoModelForCausalLM.register(LlmcConfig, LlmcForCausalLM)
