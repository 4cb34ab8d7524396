"""PaddleNLP folders, written as PaddleNLP's own code reads: no Paddle is installed to make them.

`NAMES` repeats `_get_name_mappings` of PaddleNLP's modeling.py for each family: Hugging Face's name, Paddle's name,
and whether the two are transposed; it is not derived from llmc's rules.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
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
CASES = {name: tiny.TINY[name] for name in ("llama", "llama-tied", "qwen2", "qwen2.5-tied", "mixtral")} | {
    "qwen2-moe-all": tiny.Case(
        "qwen2_moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 64,
        },
    )
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, tiny_source: Folder) -> Folder:
    """Name of a case -> its Hugging Face folder."""
    root = tmp_path_factory.mktemp("paddle-source")

    def find(name: str) -> Path:
        if name in tiny.TINY:
            return tiny_source(name)
        return root / name if (root / name).exists() else tiny.save(CASES[name], root / name)

    return find


def names(config: dict[str, Any]) -> Iterator[tuple[str, str, bool]]:
    """Hugging Face's name, PaddleNLP's, and whether they are transposed."""
    kind, inner = config["model_type"], []
    for layer in range(config["num_hidden_layers"]):
        at = f"layers.{layer}."
        inner += [(f"{at}self_attn.{name}_proj.weight", True) for name in "qkvo"]
        inner += [(f"{at}{name}_layernorm.weight", False) for name in ("input", "post_attention")]
        if kind in ("qwen2", "qwen2_moe"):
            inner += [(f"{at}self_attn.{name}_proj.bias", False) for name in "qkv"]
        if kind == "mixtral":
            inner += [
                (f"{at}block_sparse_moe.experts.{expert}.w{index}.weight", True)
                for expert in range(config["num_local_experts"])
                for index in (1, 2, 3)
            ]
            inner += [(f"{at}block_sparse_moe.gate.weight", True)]
        elif kind == "qwen2_moe":
            modules = [f"experts.{expert}" for expert in range(config["num_experts"])] + ["shared_expert"]
            inner += [(f"{at}mlp.{module}.{x}_proj.weight", True) for module in modules for x in ("gate", "up", "down")]
            inner += [(f"{at}mlp.{name}.weight", True) for name in ("gate", "shared_expert_gate")]
        else:
            inner += [(f"{at}mlp.{name}_proj.weight", True) for name in ("gate", "up", "down")]
    inner += [("embed_tokens.weight", False), ("norm.weight", False)]
    for name, is_turned in inner:
        yield f"model.{name}", f"{kind}.{name}", is_turned
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", "lm_head.weight", True


def state_of(source: Path) -> dict[str, np.ndarray]:
    """A Hugging Face folder's weights as PaddleNLP holds them."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    theirs, found = load_file(source / "model.safetensors"), {}
    for hugging_face, name, is_turned in names(config):
        value = theirs.pop(hugging_face)
        found[name] = np.ascontiguousarray(value.T) if is_turned else value
    assert not theirs
    return found


def config_of(source: Path) -> dict[str, Any]:
    """Its config as PaddleNLP saves it."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config.pop("transformers_version")
    rope = config.pop("rope_parameters")
    return {
        **config,
        "rope_theta": rope["rope_theta"],
        "rope_scaling_factor": 1.0,
        "rope_scaling_type": None,
        "paddlenlp_version": "3.0.0b3",
        "alibi": False,
        "fuse_attention_qkv": False,
        "seq_length": 2048,
        "use_recompute": False,
        "recompute_granularity": "full",
        "tensor_parallel_output": True,
        "use_flash_attention": False,
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
def test_it_is_the_model_that_hugging_face_has(name: str, form: str, source: Folder, tmp_path: Path) -> None:
    expected = hf.convert(source(name), tmp_path / "expected")
    found = convert(write(source(name), tmp_path / "paddle", form=form), tmp_path / "out")
    assert found.spec == expected.spec
    assert list(found) == list(expected)
    for tensor in expected:
        assert np.array_equal(found[tensor], read_tensor(expected.infos[tensor])), tensor
    assert found.manifest.parents[0].kind == "paddle"
    assert (tmp_path / "out/tokenizer.json").is_file()


@pytest.mark.parametrize("name", CASES)
def test_what_is_exported_is_what_paddlenlp_holds(name: str, source: Folder, tmp_path: Path) -> None:
    hf.convert(source(name), tmp_path / "ckpt")
    paddle.export(tmp_path / "ckpt", tmp_path / "paddle")
    met, expected = load_file(tmp_path / "paddle/model.safetensors"), state_of(source(name))
    assert met.keys() == expected.keys()
    for tensor, value in expected.items():
        assert np.array_equal(met[tensor], value), tensor
    with safe_open(tmp_path / "paddle/model.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "np"}
    config = json.loads((tmp_path / "paddle/config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == config_of(source(name))["architectures"]
    assert config["rope_theta"] == config_of(source(name))["rope_theta"]
    assert config["eos_token_id"] == [2, 0]
    assert not {"rope_parameters", "rope_scaling"} & config.keys()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", [*CASES, "llama-linear"])
def test_there_and_back_is_equal_to_the_bit(name: str, dtype: str, tmp_path: Path) -> None:
    one = hf.convert(tiny.save(CASES.get(name) or tiny.TINY[name], tmp_path / "source", dtype=dtype), tmp_path / "one")
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
        ({"alibi": True}, "'alibi'"),
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
    for name in ("gpt2", "bloom", "qwen3"):
        with pytest.raises(UnsupportedModelError, match="llama, mixtral, qwen2, qwen2_moe"):
            paddle.export(tiny_checkpoint(name), tmp_path / "back")
    for name, said in (
        ("llama-bias", "biases"),
        ("llama-head-dim", "head size"),
        ("llama-yarn", "other than linear"),
        ("qwen2-moe", "without experts"),
        ("qwen2-moe-window", "without biases"),
        ("qwen2-window", "windows"),
    ):
        with pytest.raises(UnsupportedModelError, match=said):
            paddle.export(tiny_checkpoint(name), tmp_path / "back")
    assert not (tmp_path / "back").exists()


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
