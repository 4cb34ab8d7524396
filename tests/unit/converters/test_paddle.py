"""PaddleNLP folders, both ways: tests/paddle_folders.py says what is in one, llmc's rules are what is tested."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tiny
from paddle_folders import config_of, dump, state_of, write
from safetensors import safe_open
from safetensors.numpy import load_file

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
