"""PaddleNLP folders, written as PaddleNLP's own code reads: no Paddle is installed to make them.

`names` and `config_of` repeat `_get_name_mappings` and the configs of PaddleNLP for each family (modeling.py and
configuration.py): Hugging Face's name, Paddle's name, and whether the two are transposed, or one is a third of the
other. They are not derived from llmc's rules.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tiny
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from llmc.checkpoint import Checkpoint
from llmc.converters import cast, hf, paddle, pdparams
from llmc.converters.convert import convert
from llmc.errors import CheckpointError, LlmcError, UnsupportedModelError, UserError
from llmc.tensors import read_tensor

Folder = Callable[[str], Path]
LIKE_LLAMA = ("llama", "llama-tied", "mistral-window", "qwen2", "qwen2.5-tied", "mixtral")
OTHERS = (
    "chatglm-6b-tied",
    "baichuan-13b",
    "qwen1",
    "qwen1-deep",
    "chatglm3",
    "bloom",
    "bloom-6-heads",
    "gpt2",
    "opt",
    "opt-350m",
)
CASES = (*LIKE_LLAMA, "qwen2-moe-all", *OTHERS)

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
    path = path / paddle.SINGLE if path.is_dir() else path
    state = {name: Named(value) if isinstance(value, tuple) else value for name, value in state.items()}
    with path.open("wb") as file:
        pickle.dump(state, file, protocol=protocol)


@pytest.mark.parametrize("form", ["safetensors", "pdparams", "named", "shards"])
@pytest.mark.parametrize("name", CASES)
def test_it_is_the_model_that_hugging_face_has(name: str, form: str, tiny_source: Folder, tmp_path: Path) -> None:
    expected = hf.convert(tiny_source(name), tmp_path / "expected")
    found = convert(write(tiny_source(name), tmp_path / "paddle", form=form), tmp_path / "out")
    assert found.spec == expected.spec
    assert list(found) == list(expected)
    for tensor in expected:
        assert np.array_equal(found[tensor], read_tensor(expected.infos[tensor])), tensor
    assert found.manifest.parents[0].kind == "paddle"
    assert (tmp_path / "out/tokenizer.json").is_file()


@pytest.mark.parametrize("name", CASES)
def test_what_is_exported_is_what_paddlenlp_holds(name: str, tiny_source: Folder, tmp_path: Path) -> None:
    hf.convert(tiny_source(name), tmp_path / "ckpt")
    paddle.export(tmp_path / "ckpt", tmp_path / "paddle")
    met, state = load_file(tmp_path / "paddle/model.safetensors"), state_of(tiny_source(name))
    assert met.keys() == state.keys()
    for tensor, value in state.items():
        assert np.array_equal(met[tensor], value), tensor
    with safe_open(tmp_path / "paddle/model.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "np"}
    config = json.loads((tmp_path / "paddle/config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == config_of(tiny_source(name))["architectures"]
    expected = config_of(tiny_source(name))
    others = {"model_type", "paddlenlp_version", "dtype", "torch_dtype"}
    unused = set() if name == "mistral-window" else {"sliding_window", "max_window_layers", "layer_types"}
    common = config.keys() & expected.keys() - others - unused
    for key in common:
        assert config[key] == expected[key] or "token_id" in key, key
    assert len(common) > 8
    assert config["eos_token_id"] == [2, 0]
    assert not {"rope_parameters", "rope_scaling"} & config.keys()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", [*CASES, "llama-linear"])
def test_there_and_back_is_equal_to_the_bit(name: str, dtype: str, tmp_path: Path) -> None:
    one = hf.convert(tiny.save(tiny.TINY[name], tmp_path / "source", dtype=dtype), tmp_path / "one")
    paddle.export(tmp_path / "one", tmp_path / "paddle")
    two = convert(tmp_path / "paddle", tmp_path / "two")
    assert two.spec == one.spec
    assert two.manifest.files["model.safetensors"] == one.manifest.files["model.safetensors"]
    assert two.manifest.parents[0].kind == "export"
    hf.export(tmp_path / "two", tmp_path / "back")
    again = hf.convert(tmp_path / "back", tmp_path / "three")
    assert again.spec == one.spec


@pytest.mark.parametrize("block", [1, 1000, 20000])
def test_in_blocks_of_any_size(
    block: int, tiny_source: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tiny_source("llama"), tmp_path / "paddle", form="pdparams")
    whole = convert(tmp_path / "paddle", tmp_path / "whole", dtype="float16")
    monkeypatch.setattr(cast, "BLOCK_BYTES", block)
    found = convert(tmp_path / "paddle", tmp_path / "out", dtype="float16")
    assert found.manifest.files["model.safetensors"] == whole.manifest.files["model.safetensors"]


def test_bfloat16_is_uint16_in_a_pickle(tiny_source: Folder, tiny_checkpoint: Folder, tmp_path: Path) -> None:
    state = {name: value.astype(ml_dtypes.bfloat16) for name, value in state_of(tiny_source("llama")).items()}
    stored = {name: value.view(np.uint16) for name, value in state.items()}
    found = convert(write(tiny_source("llama"), tmp_path / "paddle", form="pdparams", state=stored), tmp_path / "out")
    expected = Checkpoint(tiny_checkpoint("llama"))
    for name in expected:
        assert np.array_equal(found[name], expected[name].astype(ml_dtypes.bfloat16)), name


def test_an_older_prefix_is_read_as_well(tiny_source: Folder, tiny_checkpoint: Folder, tmp_path: Path) -> None:
    state = {name.replace("llama.", "model."): value for name, value in state_of(tiny_source("llama")).items()}
    found = convert(write(tiny_source("llama"), tmp_path / "paddle", form="pdparams", state=state), tmp_path / "out")
    assert np.array_equal(
        found["layers.1.attn.k.weight"], Checkpoint(tiny_checkpoint("llama"))["layers.1.attn.k.weight"]
    )


def refused(kind: type[LlmcError], folder: Path) -> str:
    out = folder.parent / "out"
    with pytest.raises(kind) as caught:
        convert(folder, out)
    assert not out.exists()
    return str(caught.value)


@pytest.fixture
def folder(tiny_source: Folder, tmp_path: Path) -> Path:
    return write(tiny_source("llama"), tmp_path / "paddle", form="pdparams")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"alibi": 2}, "'alibi'"),
        ({"attention_bias": True}, "'attention_bias'"),
        ({"fuse_attention_qkv": True}, "'fuse_attention_qkv'"),
        ({"fuse_attention_ffn": True}, "'fuse_attention_ffn'"),
        ({"rope_scaling_type": "ntk", "rope_scaling_factor": 2.0}, "'ntk'"),
        ({"use_what_is_new": True}, "use_what_is_new"),
        ({"architectures": ["ErnieForCausalLM"]}, "ErnieForCausalLM"),
    ],
)
def test_settings_that_llmc_does_not_know(changes: dict[str, Any], said: str, folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")
    assert said in refused(UnsupportedModelError, folder)


def test_what_llmc_does_not_know_of_paddlenlp(tiny_checkpoint: Folder, tmp_path: Path) -> None:
    for name in ("qwen3", "gemma3", "glm4"):
        with pytest.raises(UnsupportedModelError, match="llama, mistral, mixtral, qwen2, qwen2_moe"):
            paddle.export(tiny_checkpoint(name), tmp_path / "back")
    for name, said in (
        ("llama-bias", "'attention_bias'"),
        ("llama-head-dim", "head size"),
        ("llama-yarn", "other than linear"),
        ("qwen2-moe", "'mlp_only_layers'"),
        ("qwen2-moe-window", "'use_sliding_window'"),
        ("qwen2-window", "'use_sliding_window'"),
        ("mixtral-window", "'sliding_window'"),
        ("gpt2-untied", "'tie_word_embeddings'"),
        ("opt-untied-gelu", "'tie_word_embeddings'"),
        ("bloom-untied", "'tie_word_embeddings'"),
        ("chatglm3-32k", "'rope_ratio'"),
        ("chatglm2-32k", "'_name_or_path'"),
        ("chatglm-6b", "'tie_word_embeddings'"),
        ("baichuan2-13b", "'z_loss_weight'"),
        ("baichuan2-7b", "'max_position_embeddings'"),
    ):
        with pytest.raises(UnsupportedModelError, match=said):
            paddle.export(tiny_checkpoint(name), tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_chatglm_6b_of_another_depth_would_not_be_the_same_there(tmp_path: Path) -> None:
    case = tiny.TINY["chatglm-6b-tied"]
    hf.convert(
        tiny.save(replace(case, config={**case.config, "num_layers": 3}), tmp_path / "source"), tmp_path / "ckpt"
    )
    with pytest.raises(UnsupportedModelError, match="'num_hidden_layers' 28 alone, not 3"):
        paddle.export(tmp_path / "ckpt", tmp_path / "out")
    write(tmp_path / "source", tmp_path / "paddle", form="safetensors")
    assert "'num_hidden_layers' is 3" in refused(UnsupportedModelError, tmp_path / "paddle")
    assert not (tmp_path / "out").exists()


def test_a_baichuan_7b_is_a_llama_there(tiny_checkpoint: Folder, tmp_path: Path) -> None:
    paddle.export(tiny_checkpoint("baichuan-7b"), tmp_path / "paddle")
    one, two = Checkpoint(tiny_checkpoint("baichuan-7b")), convert(tmp_path / "paddle", tmp_path / "back")
    assert two.spec == one.spec.model_copy(update={"family": "llama"})
    assert two.manifest.files["model.safetensors"] == one.manifest.files["model.safetensors"]


def test_a_head_that_was_saved_twice(tiny_source: Folder, tmp_path: Path) -> None:
    for name, head in (("gpt2", "lm_head.decoder.weight"), ("opt", "lm_head.decoder_weight")):
        state = state_of(tiny_source(name))
        state[head] = next(value for key, value in state.items() if "word_embeddings" in key)
        found = convert(
            write(tiny_source(name), tmp_path / name, form="pdparams", state=state), tmp_path / f"{name}-out"
        )
        assert found.spec.tied


def test_a_quantized_checkpoint_is_not_exported(tiny_checkpoint: Folder, tmp_path: Path) -> None:
    from llmc.quant.quantize import quantize
    from llmc.recipe import QuantRecipe, WeightFormat

    recipe = QuantRecipe(algorithm="rtn", weights=WeightFormat(bits=8, group_size=32))
    quantize(tiny_checkpoint("llama"), tmp_path / "int8", recipe)
    with pytest.raises(UserError, match="llmc export llama OUT"):
        paddle.export(tmp_path / "int8", tmp_path / "back")


def test_tensors_are_accounted_for(folder: Path, tiny_source: Folder) -> None:
    state = state_of(tiny_source("llama"))
    dump({**state, "llama.layers.0.what": np.zeros(3, np.float32)}, folder)
    assert "'llama.layers.0.what'" in refused(CheckpointError, folder)
    name = "llama.layers.1.mlp.down_proj.weight"
    dump({**state, name: np.ascontiguousarray(state[name].T)}, folder)
    assert f"'{name}' has shape [96, 64], expected [64, 96]" in refused(CheckpointError, folder)
    state.pop(name)
    dump(state, folder)
    assert f"'{name}' [64, 96] is missing" in refused(CheckpointError, folder)


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


class Evaluated:
    """What paddle.save makes of a LoDTensor: a call of `eval`."""

    def __reduce__(self) -> tuple[Any, ...]:
        return eval, ("data", {"data": np.zeros(3, np.float32)})


def test_what_a_pickle_may_not_ask_for(folder: Path, tmp_path: Path) -> None:
    looked = 0
    for value, said in (
        (Malicious(tmp_path / "pwned"), "posix.mkdir"),
        (Evaluated(), "builtins.eval"),
        (np.random.default_rng(), "numpy.random"),
        (Path("x"), "pathlib."),
        (slice(1), "builtins.slice"),
        (np.zeros((3, 4), np.float32, order="F"), "column by column"),
        (np.zeros(3, np.complex64), "c8"),
        (np.zeros(3, ">f4"), ">f4"),
        (np.array([{}]), "without"),
    ):
        dump({"x": value}, folder)
        message = refused(CheckpointError, folder)
        assert said in message, message
        assert "safe_serialization" in message
        looked += 1
    assert looked == 9
    assert not (tmp_path / "pwned").exists()


def test_a_state_is_given_to_arrays_alone(folder: Path) -> None:
    """BUILD on anything else could reach into llmc's own objects."""
    for body in (
        b"cnumpy\nndarray\n}(X\x01\x00\x00\x00aK\x01ub.",
        b"cnumpy.core.multiarray\n_reconstruct\nN}X\x01\x00\x00\x00aK\x01s\x86b.",
    ):
        (folder / paddle.SINGLE).write_bytes(b"\x80\x02" + body)
        assert "a state for a" in refused(CheckpointError, folder)


@pytest.mark.parametrize("value", [3, "text", [1], None])
def test_what_is_no_array_is_named(value: Any, folder: Path) -> None:
    dump({"x": value}, folder)
    assert "'x'" in refused(CheckpointError, folder)
    with (folder / paddle.SINGLE).open("wb") as file:
        pickle.dump(value, file, protocol=4)
    assert "expected arrays by name" in refused(CheckpointError, folder)


def test_damage_at_any_place_is_an_error_or_seen(folder: Path, tmp_path: Path) -> None:
    whole = (folder / paddle.SINGLE).read_bytes()
    generator = np.random.default_rng(0)
    failed = 0
    for _ in range(300):
        raw = bytearray(whole)
        for place in generator.integers(0, len(raw) if generator.random() < 0.5 else 400, size=2):
            raw[place] = generator.integers(0, 256)
        (tmp_path / "x.pdparams").write_bytes(raw[: generator.integers(1, len(raw) + 1)] if failed % 2 else raw)
        try:
            pdparams.read_file(tmp_path / "x.pdparams")
        except CheckpointError:
            failed += 1
    assert failed > 50


def test_missing_files(folder: Path) -> None:
    (folder / paddle.SINGLE).unlink()
    assert paddle.SINGLE in refused(CheckpointError, folder)
    (folder / paddle.INDEX).write_text(json.dumps({"weight_map": {"x": "../y"}}), encoding="utf-8")
    assert "index" in refused(CheckpointError, folder)
    (folder / paddle.INDEX).write_text(json.dumps({"weight_map": {"x": "y.pdparams"}}), encoding="utf-8")
    assert "y.pdparams is missing" in refused(CheckpointError, folder)
