"""A typed reader of a model's config: every setting is understood, known to be harmless, or refused.

A setting that is passed over in silence is a model that computes something else. So a family asks for each value by
name and type, and `done` refuses whatever nobody asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from llmc.errors import UnsupportedModelError

Choice = TypeVar("Choice")

# Settings that do not change what a trained decoder computes: bookkeeping, training, and old generation settings that
# transformers once kept in the config (generation_config.json has them now).
HARMLESS = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _commit_hash _from_model_config _name_or_path architectures
    attention_dropout attn_pdrop auto_map bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward
    cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype early_stopping embd_pdrop
    encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id hidden_dropout id2label initializer_range is_decoder keys_to_ignore_at_inference label2id
    length_penalty max_length min_length model_type no_repeat_ngram_size num_beam_groups num_beams num_labels
    num_return_sequences output_attentions output_hidden_states output_router_logits output_scores pad_token_id prefix
    pretraining_tp problem_type remove_invalid_values repetition_penalty resid_pdrop return_dict return_dict_in_generate
    router_aux_loss_coef router_jitter_noise sep_token_id suppress_tokens task_specific_params temperature
    tf_legacy_loss tokenizer_class top_k top_p torch_dtype torchscript transformers_version typical_p unsloth_fixed
    unsloth_version use_bfloat16 use_cache
    """.split()  # noqa: SIM905 - a list of 70 strings is no easier to read
)


class Reader:
    """One mapping of settings, read once through.

    Args:
        where: What it is, for errors ("config.json").
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.where = where
        self._values = values
        self._read: set[str] = set()

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: object) -> bool:
        """Whether a setting is there and not null."""
        return isinstance(key, str) and self._values.get(key) is not None

    def _take(self, key: str, kind: type | tuple[type, ...], expected: str, default: Any) -> Any:
        """A value of a type; null counts as absent, and a bool never as a number."""
        self._read.add(key)
        value = self._values.get(key)
        if value is None:
            if default is ...:
                raise UnsupportedModelError(f"{self.where}: '{key}' is missing; expected {expected}")
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise UnsupportedModelError(f"{self.where}: '{key}' is {value!r}, expected {expected}")
        return value

    def first(self, *spellings: str) -> str:
        """Of several names of one setting the one that is there; the first when none is."""
        return next((key for key in spellings if key in self), spellings[0])

    def integer(self, key: str, default: Any = ...) -> int:
        """A whole number; without a default it must be there."""
        value: int = self._take(key, int, "a whole number", default)
        return value

    def number(self, key: str, default: Any = ...) -> float:
        """A real number; without a default it must be there."""
        return float(self._take(key, (int, float), "a number", default))

    def optional_number(self, key: str) -> float | None:
        """A real number, None when absent."""
        return self.number(key) if key in self else self._take(key, (), "a number", None)

    def flag(self, key: str, *, default: bool = False) -> bool:
        """true or false."""
        value: bool = self._take(key, bool, "true or false", default)
        return value

    def text(self, key: str, default: Any = ...) -> str:
        """A string; without a default it must be there."""
        value: str = self._take(key, str, "a string", default)
        return value

    def choice(self, key: str, choices: Mapping[str, Choice], default: str) -> Choice:
        """A string that stands for something in a table."""
        met = self.text(key, default)
        if met not in choices:
            raise UnsupportedModelError(f"{self.where}: '{key}' is {met!r}; llmc supports {', '.join(choices)}")
        return choices[met]

    def numbers(self, key: str) -> tuple[float, ...]:
        """A list of real numbers."""
        values = self._take(key, list, "a list of numbers", ...)
        if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            raise UnsupportedModelError(f"{self.where}: '{key}' is {values!r}, expected a list of numbers")
        return tuple(float(value) for value in values)

    def integers(self, key: str) -> tuple[int, ...]:
        """A list of whole numbers, empty when absent."""
        values = self._take(key, list, "a list of whole numbers", [])
        if not all(isinstance(value, int) and not isinstance(value, bool) for value in values):
            raise UnsupportedModelError(f"{self.where}: '{key}' is {values!r}, expected a list of whole numbers")
        return tuple(values)

    def texts(self, key: str) -> tuple[str, ...] | None:
        """A list of strings, None when absent."""
        values = self._take(key, list, "a list of strings", None)
        return None if values is None else tuple(map(str, values))

    def window(self, key: str, absent: int | None) -> int | None:
        """A whole number that may be null, null being another thing than absent."""
        return absent if key not in self._values else self._take(key, int, "a whole number or null", None)

    def section(self, key: str) -> Reader | None:
        """A mapping inside, None when it is absent or empty."""
        values = self._take(key, Mapping, "an object", None)
        return Reader(values, f"{self.where}: {key}") if values else None

    def mapping(self, key: str) -> Mapping[str, Any]:
        """A mapping as it is, for a reader of another kind; it must be there."""
        values: Mapping[str, Any] = self._take(key, Mapping, "an object", ...)
        return values

    def note(self, *keys: str) -> None:
        """Take note of settings that mean nothing beside others of this model."""
        self._read.update(keys)

    def inside(self, key: str) -> Reader:
        """A reader whose section `key` is this."""
        return Reader({key: self._values}, self.where)

    def only(self, key: str, supported: Any, reason: str) -> None:
        """Take note of a setting of which only one value (or null) is supported."""
        self._read.add(key)
        value = self._values.get(key)
        if value is not None and value != supported:
            raise UnsupportedModelError(
                f"{self.where}: '{key}' is {value!r}; llmc supports {supported!r} alone ({reason})"
            )

    def done(self, harmless: frozenset[str] = frozenset()) -> None:
        """Refuse settings that nobody asked for.

        Raises:
            UnsupportedModelError: Naming the first, and its value.
        """
        for key, value in self._values.items():
            if key not in self._read and key not in harmless and value is not None:
                raise UnsupportedModelError(
                    f"{self.where}: llmc does not know the setting '{key}' (here {value!r}), and will not ignore it: "
                    "the model may compute something else than llmc would"
                )
