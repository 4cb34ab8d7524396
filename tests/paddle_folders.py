"""PaddleNLP folders, written as PaddleNLP's own code reads: no Paddle is installed to make them.

`names` and `config_of` repeat `_get_name_mappings` and the configs of PaddleNLP for each family (modeling.py and
configuration.py): Hugging Face's name, Paddle's name, and whether the two are transposed, or one is a third of the
other. They are not derived from llmc's rules.
"""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from llmc.converters import paddle

TURNED = "transpose"
Mapping = tuple[str, str, str | int]  # the third: TURNED, "" for the same, or which third of Hugging Face's


CHATGLM_6B = "chatglm-6b"


def kind_of(config: dict[str, Any]) -> str:
    """The `model_type`, which is the same in the configs of all ChatGLMs."""
    return CHATGLM_6B if config.get("position_encoding_2d") else str(config["model_type"])


def names(config: dict[str, Any]) -> list[Mapping]:
    """Every tensor of a model."""
    return {
        "baichuan": names_of_baichuan, "bloom": names_of_bloom, "chatglm": names_of_chatglm, "gpt2": names_of_gpt,
        "opt": names_of_opt, "qwen": names_of_qwen, CHATGLM_6B: names_of_chatglm_6b,
    }.get(kind_of(config), names_like_llama)(config)  # fmt: skip


def prefixed(theirs: str, paddles: str, found: list[Mapping]) -> list[Mapping]:
    return [(theirs + name, paddles + other, how) for name, other, how in found]


def same(*found: tuple[str, str]) -> list[Mapping]:
    return [(name, name, how) for name, how in found]


def biased(name: str, other: str) -> list[Mapping]:
    return [(f"{name}.weight", f"{other}.weight", TURNED), (f"{name}.bias", f"{other}.bias", "")]


def norm(name: str, other: str) -> list[Mapping]:
    return [(f"{name}.{kind}", f"{other}.{kind}", "") for kind in ("weight", "bias")]


def names_of_bloom(config: dict[str, Any]) -> list[Mapping]:
    found = [*same(("word_embeddings.weight", "")), *norm(*["word_embeddings_layernorm"] * 2), *norm("ln_f", "ln_f")]
    for layer in range(config["n_layer"]):
        at = f"h.{layer}."
        for module in ("query_key_value", "dense"):
            found += biased(f"{at}self_attention.{module}", f"{at}self_attention.{module}")
        for module in ("dense_h_to_4h", "dense_4h_to_h"):
            found += biased(f"{at}mlp.{module}", f"{at}mlp.{module}")
        for module in ("input_layernorm", "post_attention_layernorm"):
            found += norm(at + module, at + module)
    return prefixed("transformer.", "bloom.", found)


def names_of_gpt(config: dict[str, Any]) -> list[Mapping]:
    found: list[Mapping] = [
        ("wte.weight", "embeddings.word_embeddings.weight", ""),
        ("wpe.weight", "embeddings.position_embeddings.weight", ""),
        *norm("ln_f", "decoder.norm"),
    ]
    for layer in range(config["n_layer"]):
        at, to = f"h.{layer}.", f"decoder.layers.{layer}."
        modules = {"ln_1": "norm1", "ln_2": "norm2", "mlp.c_fc": "linear1", "mlp.c_proj": "linear2"}
        for module, other in (modules | {"attn.c_proj": "self_attn.out_proj"}).items():
            found += norm(at + module, to + other)  # Conv1D lies as Paddle's linears do
        for index, x in enumerate("qkv"):
            for kind in ("weight", "bias"):
                found.append((f"{at}attn.c_attn.{kind}", f"{to}self_attn.{x}_proj.{kind}", index))
    return prefixed("transformer.", "gpt.", found)


def names_of_opt(config: dict[str, Any]) -> list[Mapping]:
    found: list[Mapping] = [
        ("decoder.embed_tokens.weight", "embeddings.word_embeddings.weight", ""),
        ("decoder.embed_positions.weight", "embeddings.position_embeddings.weight", ""),
    ]
    if config["do_layer_norm_before"]:
        found += norm("decoder.final_layer_norm", "decoder.final_layer_norm")
    if config["word_embed_proj_dim"] != config["hidden_size"]:
        found.append(("decoder.project_in.weight", "embeddings.project_in.weight", TURNED))
        found.append(("decoder.project_out.weight", "decoder.project_out.weight", TURNED))
    for layer in range(config["num_hidden_layers"]):
        at = f"decoder.layers.{layer}."
        for x in ("q", "k", "v", "out"):
            found += biased(f"{at}self_attn.{x}_proj", f"{at}self_attn.{x}_proj")
        found += [*norm(f"{at}self_attn_layer_norm", f"{at}norm1"), *norm(f"{at}final_layer_norm", f"{at}norm2")]
        found += [*biased(f"{at}fc1", f"{at}linear1"), *biased(f"{at}fc2", f"{at}linear2")]
    return prefixed("model.", "opt.", found)


def names_of_qwen(config: dict[str, Any]) -> list[Mapping]:
    found = same(("wte.weight", ""), ("ln_f.weight", ""))
    for layer in range(config["num_hidden_layers"]):
        at = f"h.{layer}."
        found += same((f"{at}ln_1.weight", ""), (f"{at}ln_2.weight", ""), (f"{at}attn.c_attn.bias", ""))
        for module in ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj"):
            found += same((f"{at}{module}.weight", TURNED))
    return [*prefixed("transformer.", "qwen.", found), *same(("lm_head.weight", TURNED))]


def names_of_chatglm(config: dict[str, Any]) -> list[Mapping]:
    found = same(("embedding.word_embeddings.weight", ""), ("encoder.final_layernorm.weight", ""))
    for layer in range(config["num_layers"]):
        at = f"encoder.layers.{layer}."
        for module in ("input_layernorm", "post_attention_layernorm"):
            found += same((f"{at}{module}.weight", ""))
        found += same((f"{at}self_attention.query_key_value.bias", ""))
        for module in ("query_key_value", "dense"):
            found += same((f"{at}self_attention.{module}.weight", TURNED))
        for module in ("dense_h_to_4h", "dense_4h_to_h"):
            found += same((f"{at}mlp.{module}.weight", TURNED))
    return prefixed("transformer.", "chatglm_v2.", [*found, *same(("output_layer.weight", TURNED))])


def names_of_chatglm_6b(config: dict[str, Any]) -> list[Mapping]:
    found = [*same(("word_embeddings.weight", "")), *norm("final_layernorm", "final_layernorm")]
    for layer in range(config["num_layers"]):
        at = f"layers.{layer}."
        for module in ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"):
            found += biased(at + module, at + module)
        for module in ("input_layernorm", "post_attention_layernorm"):
            found += norm(at + module, at + module)
    return prefixed("transformer.", "chatglm.transformer.", found)


def names_of_baichuan(config: dict[str, Any]) -> list[Mapping]:
    """PaddleNLP runs it as a LLaMA with `alibi`."""
    found = same(("embed_tokens.weight", ""), ("norm.weight", ""))
    for layer in range(config["num_hidden_layers"]):
        at = f"layers.{layer}."
        for index, x in enumerate("qkv"):
            found.append((f"{at}self_attn.W_pack.weight", f"{at}self_attn.{x}_proj.weight", index))
        for module in ("self_attn.o_proj", *(f"mlp.{x}_proj" for x in ("gate", "up", "down"))):
            found += same((f"{at}{module}.weight", TURNED))
        found += same((f"{at}input_layernorm.weight", ""), (f"{at}post_attention_layernorm.weight", ""))
    return [*prefixed("model.", "llama.", found), *same(("lm_head.weight", TURNED))]


def names_like_llama(config: dict[str, Any]) -> list[Mapping]:
    kind = config["model_type"]
    inner: list[tuple[str, str]] = [("embed_tokens.weight", ""), ("norm.weight", "")]
    for layer in range(config["num_hidden_layers"]):
        at = f"layers.{layer}."
        inner += [(f"{at}self_attn.{name}_proj.weight", TURNED) for name in "qkvo"]
        inner += [(f"{at}{name}_layernorm.weight", "") for name in ("input", "post_attention")]
        if kind in ("qwen2", "qwen2_moe"):
            inner += [(f"{at}self_attn.{name}_proj.bias", "") for name in "qkv"]
        if kind == "mixtral":
            inner += [
                (f"{at}block_sparse_moe.experts.{expert}.w{index}.weight", TURNED)
                for expert in range(config["num_local_experts"])
                for index in (1, 2, 3)
            ]
            inner += [(f"{at}block_sparse_moe.gate.weight", TURNED)]
        elif kind == "qwen2_moe":
            modules = [f"experts.{expert}" for expert in range(config["num_experts"])] + ["shared_expert"]
            inner += [(f"{at}mlp.{one}.{x}_proj.weight", TURNED) for one in modules for x in ("gate", "up", "down")]
            inner += [(f"{at}mlp.{name}.weight", TURNED) for name in ("gate", "shared_expert_gate")]
        else:
            inner += [(f"{at}mlp.{name}_proj.weight", TURNED) for name in ("gate", "up", "down")]
    found = prefixed("model.", f"{kind}.", same(*inner))
    return found if config["tie_word_embeddings"] else [*found, *same(("lm_head.weight", TURNED))]


def state_of(source: Path) -> dict[str, np.ndarray]:
    """A Hugging Face folder's weights as PaddleNLP holds them."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    theirs, found, used = load_file(source / "model.safetensors"), {}, set()
    for hugging_face, name, how in names(config):
        value = theirs[hugging_face]
        used.add(hugging_face)
        if isinstance(how, int):
            value = value.T if config["model_type"] == "baichuan" else value
            value = np.split(value, 3, axis=-1)[how]
        found[name] = np.ascontiguousarray(value.T if how == TURNED else value)
    assert used == theirs.keys()
    return found


# Hugging Face's word -> PaddleNLP's, and what else PaddleNLP's config says.
WORDS: dict[str, dict[str, str]] = {
    "gpt2": {
        "n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
        "n_inner": "intermediate_size", "n_positions": "max_position_embeddings",
    },
    "opt": {
        "ffn_dim": "intermediate_size", "activation_function": "hidden_act", "do_layer_norm_before": "normalize_before",
    },
    "chatglm": {
        "num_layers": "num_hidden_layers", "padded_vocab_size": "vocab_size", "seq_length": "max_sequence_length",
    },
    CHATGLM_6B: {"num_layers": "num_hidden_layers"},
    "baichuan": {"model_max_length": "max_position_embeddings"},
}  # fmt: skip
CLASSES = {
    "gpt2": "GPTForCausalLM", "qwen": "QWenForCausalLM", "chatglm": "ChatGLMv2ForCausalLM",
    "baichuan": "LlamaForCausalLM", CHATGLM_6B: "ChatGLMForConditionalGeneration",
}  # fmt: skip
UNSAID: dict[str, tuple[str, ...]] = {
    "gpt2": ("activation_function", "layer_norm_epsilon", "tie_word_embeddings"),
    "opt": ("tie_word_embeddings",),
    CHATGLM_6B: ("_name_or_path", "tie_word_embeddings"),
    "chatglm": ("_name_or_path", "multi_query_attention", "original_rope", "rope_ratio", "tie_word_embeddings"),
}
ADDED: dict[str, dict[str, Any]] = {
    "gpt2": {
        "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "type_vocab_size": 16,
        "eol_token_id": 3, "intermediate_size": 256,
    },
    "opt": {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.0, "type_vocab_size": 16, "mp_degree": 1},
    "chatglm": {"interleaved_qkv": False},
    CHATGLM_6B: {"activation": "gelu", "attention_scale": True, "num_image_tokens": 0, "output_predict": True},
    "baichuan": {"alibi": True, "num_key_value_heads": 6, "rope_theta": 10000.0},
}  # fmt: skip


def config_of(source: Path) -> dict[str, Any]:
    """Its config as PaddleNLP saves it."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    kind = kind_of(config)
    config.pop("transformers_version", None)
    config.pop("auto_map", None)
    rope = config.pop("rope_parameters", None)
    if rope:
        config |= {"rope_theta": rope["rope_theta"], "rope_scaling_factor": 1.0, "rope_scaling_type": None}
    words = WORDS.get(kind, {})
    found = {words.get(key, key): value for key, value in config.items() if key not in UNSAID.get(kind, ())}
    return {
        **found,
        "architectures": [CLASSES.get(kind, config["architectures"][0])],
        "paddlenlp_version": "3.0.0b3",
        "alibi": False,
        "fuse_attention_qkv": False,
        **({} if kind in ("qwen", "bloom") else {"seq_length": 2048}),
        "use_recompute": False,
        "recompute_granularity": "full",
        "tensor_parallel_output": True,
        "use_flash_attention": False,
        **ADDED.get(kind, {}),
    }


def write(source: Path, folder: Path, *, form: str, state: dict[str, np.ndarray] | None = None) -> Path:
    """A PaddleNLP folder, its weights as `form` says."""
    state = state_of(source) if state is None else state
    folder.mkdir(exist_ok=True)
    for path in source.iterdir():
        if path.suffix in (".json", ".jinja") and path.name != "config.json":
            shutil.copy(path, folder)
    (folder / "config.json").write_text(json.dumps(config_of(source)), encoding="utf-8")
    if form == "safetensors":
        save_file(state, folder / "model.safetensors", metadata={"format": "np"})
    elif form == "shards":
        parts = {"model_state-00001-of-00002.pdparams": list(state)[::2]}
        parts["model_state-00002-of-00002.pdparams"] = list(state)[1::2]
        for file, inside in parts.items():
            dump({name: state[name] for name in inside}, folder / file)
        weight_map = {name: file for file, inside in parts.items() for name in inside}
        (folder / paddle.INDEX).write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    elif form == "named":
        dump({name: (f"linear_{index}.w_0", value) for index, (name, value) in enumerate(state.items())}, folder)
    else:
        dump({**state, "StructuredToParameterName@@": dict.fromkeys(state, "linear_0.w_0")}, folder)
    return folder


class Named:
    """A Paddle tensor, as paddle.save reduces it: a call of `tuple`."""

    def __init__(self, value: tuple[str, np.ndarray]) -> None:
        self.value = value

    def __reduce__(self) -> tuple[Any, ...]:
        return tuple, (self.value,)


def dump(state: dict[str, Any], path: Path, protocol: int = 4) -> None:
    """What paddle.save makes of a state, in which a pair is a tensor with a name of its own."""
    path = path / paddle.SINGLE if path.is_dir() else path
    state = {name: Named(value) if isinstance(value, tuple) else value for name, value in state.items()}
    with path.open("wb") as file:
        pickle.dump(state, file, protocol=protocol)
