"""How PaddleNLP keeps each family: its class, its names of tensors and of settings. A family is a row of the table.

Source: `_get_name_mappings`, the modules and the configs of each family in PaddleNLP 2 and 3
(paddlenlp/transformers/*/modeling.py and configuration.py).

Knows: names. Does not know: files, nor that linears lie as [in, out] in them (paddle.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from llmc.converters.classic_decoder import weight_and_bias
from llmc.converters.families import (
    baichuan,
    bloom,
    chatglm,
    chatglm2,
    gpt2,
    llama,
    mistral,
    mixtral,
    opt,
    qwen,
    qwen2,
    qwen2_moe,
)
from llmc.converters.rules import Family, Rule

HEAD = "lm_head."


@dataclass(frozen=True, slots=True)
class Layout:
    """A family in PaddleNLP.

    Attributes:
        family: As its authors publish it.
        architectures: Its class there, and names that older versions had for it.
        rules: All tensors by their names there, every linear as [out, in].
        words: Settings that have another name there: theirs -> the authors'. One under its own name is said there
            where others mean something else by it.
        said: Settings of PaddleNLP's config that have this value in every model of this family.
        fixed: The authors' settings that PaddleNLP has no word for: the value that its models compute with.
        harmless: Settings that change nothing in this family.
        dropped: Globs over its names of tensors that carry nothing.
    """

    family: Family
    architectures: tuple[str, ...]
    rules: tuple[Rule, ...]
    words: dict[str, str] = field(default_factory=dict)
    said: dict[str, Any] = field(default_factory=dict)
    fixed: dict[str, Any] = field(default_factory=dict)
    harmless: frozenset[str] = frozenset()
    dropped: tuple[str, ...] = ()

    @property
    def model_type(self) -> str:
        """What its tensors begin with, and what it is called in a config."""
        return self.rules[0].theirs.partition(".")[0]


def renamed(rules: Iterable[Rule], old: str, new: str) -> tuple[Rule, ...]:
    """Rules with another beginning of their names, the head's apart."""
    return tuple(
        rule if rule.theirs.startswith(HEAD) else replace(rule, theirs=new + rule.theirs.removeprefix(old))
        for rule in rules
    )


def _like_llama(family: Family, **fixed: Any) -> Layout:
    prefix = f"{family.name}."
    dropped = tuple(prefix + glob.removeprefix("model.") for glob in family.dropped)
    rules = renamed(family.rules, "model.", prefix)
    return Layout(family, family.architectures[:1], rules, fixed=fixed, dropped=dropped)


def _classic_rules(prefix: str, last_norm: str) -> tuple[Rule, ...]:
    """GPT and OPT, which are one decoder there."""
    ours, theirs = "layers.{layer}.", f"{prefix}.decoder.layers.{{layer}}."
    modules = {f"attn.{name}": f"self_attn.{name}_proj" for name in "qkv"} | {"attn.o": "self_attn.out_proj"}
    modules |= {"attn_norm": "norm1", "mlp.up": "linear1", "mlp.down": "linear2", "mlp_norm": "norm2"}
    return (
        Rule("embed.weight", f"{prefix}.embeddings.word_embeddings.weight"),
        Rule("embed_in.weight", f"{prefix}.embeddings.project_in.weight"),
        Rule("positions.weight", f"{prefix}.embeddings.position_embeddings.weight"),
        *(rule for name, module in modules.items() for rule in weight_and_bias(ours + name, theirs + module)),
        *weight_and_bias("norm", f"{prefix}.decoder.{last_norm}"),
        Rule("embed_out.weight", f"{prefix}.decoder.project_out.weight"),
        Rule("head.weight", f"{HEAD}decoder_weight"),
    )


# The head is the embedding itself, whatever the config says; some versions saved it twice, under either name.
_TIED: dict[str, Any] = {"fixed": {"tie_word_embeddings": True}, "dropped": (f"{HEAD}decoder*weight",)}
_OF_TRAINING = frozenset(
    """
    attention_probs_dropout_prob eol_token_id fused_linear hidden_dropout_prob mp_degree num_partitions
    tie_word_embeddings type_vocab_size use_fused_dropout_add
    """.split()  # noqa: SIM905 - as in reader.py
)

LAYOUTS: dict[str, Layout] = {
    layout.family.name: layout
    for layout in (
        _like_llama(llama.FAMILY, attention_bias=False, mlp_bias=False),
        _like_llama(mistral.FAMILY),
        _like_llama(mixtral.FAMILY, sliding_window=None),
        _like_llama(qwen2.FAMILY, use_sliding_window=False),
        _like_llama(qwen2_moe.FAMILY, use_sliding_window=False, qkv_bias=True, mlp_only_layers=[]),
        Layout(  # the 13B with its linear biases; the 7B is a LLaMA there
            baichuan.FAMILY,
            ("LlamaForCausalLM",),
            renamed(llama.RULES, "model.", "llama."),
            words={"max_position_embeddings": "model_max_length"},
            said={"alibi": True},
            fixed={"max_position_embeddings": None, "z_loss_weight": None},
            harmless=frozenset({"max_sequence_length", "num_key_value_heads", "rope_theta"}),
        ),
        Layout(
            qwen.FAMILY,
            ("QWenForCausalLM", "QWenLMHeadModel"),
            renamed(qwen.RULES, "transformer.", "qwen."),
            words={"seq_length": "seq_length"},
            fixed={"tie_word_embeddings": False},
        ),
        Layout(  # it scales the residual by the layers that there are, and the authors always by 28
            chatglm.FAMILY,
            ("ChatGLMForConditionalGeneration",),
            renamed(chatglm.RULES, "transformer.", "chatglm.transformer."),
            words={"num_hidden_layers": "num_layers"},
            said={
                "activation": "gelu",
                "attention_scale": True,
                "num_hidden_layers": 28,
                "num_image_tokens": 0,
                "position_encoding_2d": True,
            },
            fixed={"position_encoding_2d": True, "tie_word_embeddings": True},
            harmless=frozenset({"output_predict"}),
            dropped=("lm_head.weight", "*.rotary_embeddings.inv_freq"),
        ),
        Layout(
            chatglm2.FAMILY,
            ("ChatGLMv2ForCausalLM",),
            renamed(chatglm2.RULES, "transformer.", "chatglm_v2."),
            words={
                "num_hidden_layers": "num_layers",
                "vocab_size": "padded_vocab_size",
                "max_sequence_length": "seq_length",
            },
            said={"interleaved_qkv": False},
            fixed={
                "_name_or_path": "THUDM/chatglm3-6b",
                "multi_query_attention": True,
                "original_rope": True,
                "rope_ratio": 1.0,
                "tie_word_embeddings": False,
            },
            harmless=frozenset({"_name_or_path", "seq_length"}),
            dropped=("chatglm_v2.rotary_pos_emb.inv_freq",),
        ),
        Layout(
            bloom.FAMILY,
            ("BloomForCausalLM", "BloomLMHeadModel"),
            renamed(bloom.RULES, "transformer.", "bloom."),
            words={"seq_length": "seq_length"},
            harmless=_OF_TRAINING,
            **_TIED,
        ),
        Layout(
            gpt2.FAMILY,
            ("GPTForCausalLM", "GPTLMHeadModel", "GPT2LMHeadModel"),
            _classic_rules("gpt", "norm"),
            words={
                "hidden_size": "n_embd",
                "intermediate_size": "n_inner",
                "max_position_embeddings": "n_positions",
                "num_attention_heads": "n_head",
                "num_hidden_layers": "n_layer",
            },
            # Its code calls every activation with approximate=True, and every norm with this epsilon.
            said={"hidden_act": "gelu", "hidden_activation": "gelu", "normalize_before": True},
            fixed={**_TIED["fixed"], "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5},
            harmless=_OF_TRAINING,
            dropped=_TIED["dropped"],
        ),
        Layout(
            opt.FAMILY,
            ("OPTForCausalLM",),
            _classic_rules("opt", "final_layer_norm"),
            words={
                "hidden_act": "activation_function",
                "intermediate_size": "ffn_dim",
                "normalize_before": "do_layer_norm_before",
            },
            harmless=_OF_TRAINING,
            **_TIED,
        ),
    )
}
