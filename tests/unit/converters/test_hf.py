from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file

from llmc import json_file
from llmc import manifest as manifests
from llmc.checkpoint import Checkpoint
from llmc.converters import hf, pickled
from llmc.converters.convert import convert
from llmc.errors import CheckpointError, ManifestError, UnsupportedModelError, UserError
from llmc.manifest import Manifest

Source = Callable[[str], Path]


@pytest.fixture
def source(tiny_source: Source, tmp_path: Path) -> Path:
    """A folder that a test may spoil."""
    return Path(shutil.copytree(tiny_source("qwen2"), tmp_path / "source"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_torch(path)
    return found


def save_weights(folder: Path, values: dict[str, torch.Tensor]) -> None:
    save_file(values, folder / "model.safetensors", metadata={"format": "pt"})


def edit(path: Path, **changes: Any) -> None:
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**values, **changes}), encoding="utf-8")


def refused(source: Path, out: Path, kind: type[Exception] = CheckpointError, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        hf.convert(source, out, **options)
    assert sorted(path.name for path in out.parent.iterdir() if path != source) == []
    return str(caught.value)


def test_what_a_checkpoint_holds(source: Path, tmp_path: Path) -> None:
    found = hf.convert(source, tmp_path / "out")
    theirs = load_file(source / "model.safetensors")
    assert found.spec.family == "qwen2"
    assert np.array_equal(found["layers.1.attn.k.bias"], theirs["model.layers.1.self_attn.k_proj.bias"])
    assert len(found.infos) == len(theirs)
    out = tmp_path / "out"
    assert (out / "source/config.json").read_bytes() == (source / "config.json").read_bytes()
    assert (out / "source/generation_config.json").read_bytes() == (source / "generation_config.json").read_bytes()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    manifests.verify(out, found.manifest)
    (parent,) = found.manifest.parents
    sha256 = manifests.sha256_of(source / "config.json")
    assert (parent.kind, parent.name, parent.sha256) == ("hf", "source", sha256)
    assert found.manifest.settings == {"dtype": "keep"}


def test_twice_gives_the_same_bytes(source: Path, tmp_path: Path) -> None:
    one, two = hf.convert(source, tmp_path / "one"), hf.convert(source, tmp_path / "two")
    assert one.manifest == two.manifest


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_types(stored: str, dtype: str, tmp_path: Path) -> None:
    source = tiny.save(tiny.TINY["llama"], tmp_path / "source", dtype=stored)
    found = hf.convert(source, tmp_path / "out", dtype=dtype)
    expected = weights(source)["model.layers.0.mlp.down_proj.weight"].to(getattr(torch, dtype))
    met = found["layers.0.mlp.down.weight"]
    assert str(met.dtype) == dtype
    assert np.array_equal(met.view(np.uint8), expected.view(torch.uint8).numpy())


def test_keep_leaves_each_tensor_in_its_own_type(source: Path, tmp_path: Path) -> None:
    values = {name: v.bfloat16() if v.ndim == 2 else v for name, v in weights(source).items()}
    save_weights(source, values)
    found = hf.convert(source, tmp_path / "out")
    assert {str(info.dtype) for info in found.infos.values()} == {"bfloat16", "float32"}


def test_a_value_beyond_the_new_type_is_refused(source: Path, tmp_path: Path) -> None:
    values = weights(source)
    values["model.norm.weight"][3] = 1e6
    save_weights(source, values)
    message = refused(source, tmp_path / "out", dtype="float16")
    assert "model.norm.weight" in message
    assert "bfloat16" in message


def test_infinities_stay_what_they_are(source: Path, tmp_path: Path) -> None:
    values = weights(source)
    values["model.norm.weight"][3] = float("inf")
    save_weights(source, values)
    assert np.isinf(hf.convert(source, tmp_path / "out", dtype="float16")["norm.weight"][3])


def test_a_type_that_there_is_not(source: Path, tmp_path: Path) -> None:
    assert "float8" in refused(source, tmp_path / "out", UserError, dtype="float8")


def test_float64_needs_a_cast_and_integers_are_refused(source: Path, tmp_path: Path) -> None:
    values = weights(source)
    save_weights(source, {**values, "model.norm.weight": values["model.norm.weight"].double()})
    assert "float64" in refused(source, tmp_path / "out")
    save_weights(source, {**values, "model.norm.weight": values["model.norm.weight"].to(torch.int8)})
    assert "int8" in refused(source, tmp_path / "out", dtype="float32")


def test_missing_unknown_and_misshapen_tensors_are_named(source: Path, tmp_path: Path) -> None:
    values = weights(source)
    name = "model.layers.1.self_attn.v_proj.bias"
    save_weights(source, {key: value for key, value in values.items() if key != name})
    assert name in refused(source, tmp_path / "out")
    save_weights(source, {**values, "model.layers.2.extra": torch.zeros(2)})
    assert "'model.layers.2.extra'" in refused(source, tmp_path / "out")
    save_weights(source, {**values, name: torch.zeros(5)})
    message = refused(source, tmp_path / "out")
    assert "[5]" in message
    assert "[32]" in message


def test_sharded_sources(tiny_source: Source, tmp_path: Path) -> None:
    source = tiny.save(tiny.TINY["qwen2"], tmp_path / "source", max_shard_size="100KB")
    assert len(list(source.glob("model-*.safetensors"))) > 2
    found = hf.convert(source, tmp_path / "out")
    whole = hf.convert(tiny_source("qwen2"), tmp_path / "whole")
    assert found.manifest.files["model.safetensors"] == whole.manifest.files["model.safetensors"]
    missing = sorted(source.glob("model-*.safetensors"))[1]
    missing.unlink()
    with pytest.raises(CheckpointError, match=f"{missing.name} is missing"):
        hf.convert(source, tmp_path / "again")


def test_tied_sources_may_hold_the_head_as_well(tiny_source: Source, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_source("llama-tied"), tmp_path / "source"))
    values = weights(source)
    assert "lm_head.weight" not in values
    embedding = values["model.embed_tokens.weight"]
    save_weights(source, {**values, "lm_head.weight": embedding.clone()})
    found = hf.convert(source, tmp_path / "same")
    assert found.spec.tied
    assert "head.weight" not in found


def test_a_model_saved_without_its_head_is_the_same(tiny_source: Source, tmp_path: Path) -> None:
    """As GPT-2 was published: no `transformer.` before the names, and the causal mask among the tensors."""
    source = Path(shutil.copytree(tiny_source("gpt2"), tmp_path / "source"))
    values = {name.removeprefix("transformer."): value for name, value in weights(source).items()}
    values["h.1.attn.bias"], values["h.1.attn.masked_bias"] = torch.ones(1, 1, 8, 8), torch.tensor(-1e4)
    save_weights(source, values)
    found, expected = hf.convert(source, tmp_path / "a"), hf.convert(tiny_source("gpt2"), tmp_path / "b")
    assert list(found) == list(expected)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    hf.export(tmp_path / "a", tmp_path / "back")
    assert weights(tmp_path / "back").keys() == weights(tiny_source("gpt2")).keys()
    del values["h.1.mlp.c_fc.bias"]
    save_weights(source, values)
    with pytest.raises(CheckpointError, match=r"'transformer\.h\.1\.mlp\.c_fc\.bias'.*missing"):
        hf.convert(source, tmp_path / "c")


def test_remote_code_is_not_run_and_that_is_said(
    tiny_source: Source, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = Path(shutil.copytree(tiny_source("baichuan-7b"), tmp_path / "source"))
    (source / "modeling_baichuan.py").write_text("raise SystemExit('this was run')\n", encoding="utf-8")
    hf.convert(source, tmp_path / "out")
    assert "'auto_map' names code that came with the model: llmc does not run it" in caplog.text


def test_a_head_that_differs_is_not_tied_whatever_the_config_says(
    tiny_source: Source, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import AutoModelForCausalLM

    source = Path(shutil.copytree(tiny_source("llama-tied"), tmp_path / "source"))
    values = weights(source)
    head = values["model.embed_tokens.weight"] + 1
    save_weights(source, {**values, "lm_head.weight": head})
    found = hf.convert(source, tmp_path / "out")
    assert not found.spec.tied
    assert np.array_equal(found["head.weight"], head.numpy())
    assert "tied" in caplog.text
    theirs = AutoModelForCausalLM.from_pretrained(source)
    assert torch.equal(theirs.lm_head.weight, head)
    hf.export(tmp_path / "out", tmp_path / "back")
    assert set(weights(tmp_path / "back")) == set(values) | {"lm_head.weight"}


def to_bin(source: Path, *, shards: int = 1) -> dict[str, torch.Tensor]:
    values = weights(source)
    (source / "model.safetensors").unlink()
    if shards == 1:
        torch.save(values, source / pickled.SINGLE)
        return values
    names = [f"pytorch_model-{index + 1:05}-of-{shards:05}.bin" for index in range(shards)]
    weight_map = {tensor: names[index % shards] for index, tensor in enumerate(values)}
    for name in names:
        torch.save({tensor: values[tensor] for tensor in values if weight_map[tensor] == name}, source / name)
    (source / pickled.INDEX).write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    return values


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", ["keep", "bfloat16"])
def test_pickled_sources(source: Path, tmp_path: Path, shards: int, dtype: str) -> None:
    expected = hf.convert(source, tmp_path / "expected", dtype=dtype)
    to_bin(source, shards=shards)
    found = hf.convert(source, tmp_path / "out", dtype=dtype)
    assert found.manifest.files["model.safetensors"] == expected.manifest.files["model.safetensors"]
    assert "torch" in found.manifest.tools


def test_safetensors_are_preferred_to_pickles(source: Path, tmp_path: Path) -> None:
    (source / pickled.SINGLE).write_bytes(b"not even a pickle")
    assert "torch" not in hf.convert(source, tmp_path / "out").manifest.tools


def test_tensors_that_share_a_storage(tmp_path: Path) -> None:
    base = torch.arange(24, dtype=torch.float32).reshape(6, 4)
    torch.save({"whole": base, "part": base[2:4], "half": base.bfloat16()}, tmp_path / "x.bin")
    infos = pickled.read_file(tmp_path / "x.bin")
    from llmc.tensors import read_tensor

    assert np.array_equal(read_tensor(infos["part"]), base[2:4].numpy())
    assert np.array_equal(read_tensor(infos["half"]).astype(np.float32), base.numpy())


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_malicious_pickle_is_refused_and_not_run(source: Path, tmp_path: Path) -> None:
    values = to_bin(source)
    torch.save({**values, "evil": Malicious(tmp_path / "pwned")}, source / pickled.SINGLE)
    assert "run code" in refused(source, tmp_path / "out")
    assert not (tmp_path / "pwned").exists()


def test_pickles_that_cannot_be_read_in_place_are_refused(source: Path, tmp_path: Path) -> None:
    values, path = to_bin(source), source / pickled.SINGLE
    torch.save(values, path, _use_new_zipfile_serialization=False)
    assert "PyTorch 1.6" in refused(source, tmp_path / "out")
    path.write_bytes(pickle.dumps({"x": 1}))
    assert str(path) in refused(source, tmp_path / "out")
    torch.save({**values, "model.norm.weight": torch.zeros(4, 3).T}, path)
    assert "row by row" in refused(source, tmp_path / "out")
    torch.save({**values, "step": 3}, path)
    assert "'step'" in refused(source, tmp_path / "out")
    torch.save([1, 2], path)
    assert "list" in refused(source, tmp_path / "out")
    torch.save(values, path)
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(tmp_path / "packed", "w", zipfile.ZIP_DEFLATED) as packed:
        for name in archive.namelist():
            packed.writestr(name, archive.read(name))
    (tmp_path / "packed").replace(path)
    assert "compressed" in refused(source, tmp_path / "out")


def test_an_index_may_not_lead_out_of_the_folder(source: Path, tmp_path: Path) -> None:
    to_bin(source, shards=2)
    index = json.loads((source / pickled.INDEX).read_text(encoding="utf-8"))
    index["weight_map"]["model.norm.weight"] = "../pytorch_model.bin"
    (source / pickled.INDEX).write_text(json.dumps(index), encoding="utf-8")
    assert "plain file name" in refused(source, tmp_path / "out")


def test_sources_that_are_none(tmp_path: Path, source: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        convert(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "file").write_text("hello", encoding="utf-8")
    with pytest.raises(UserError, match="GGUF"):
        convert(tmp_path / "file", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no config\.json"):
        convert(tmp_path / "empty", tmp_path / "out")
    (source / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights"):
        convert(source, tmp_path / "out")
    (source / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        convert(source, tmp_path / "out")
    (source / "config.json").write_text("[]", encoding="utf-8")
    with pytest.raises(CheckpointError, match="list"):
        convert(source, tmp_path / "out")


def test_an_unsupported_setting_names_the_file(source: Path, tmp_path: Path) -> None:
    edit(source / "config.json", hidden_act="gelu")
    message = refused(source, tmp_path / "out", UnsupportedModelError)
    assert str(source / "config.json") in message
    assert "'gelu'" in message


def test_an_existing_folder_is_replaced_only_when_told_to(source: Path, tmp_path: Path) -> None:
    hf.convert(source, tmp_path / "out")
    with pytest.raises(UserError, match="--overwrite"):
        hf.convert(source, tmp_path / "out")
    hf.convert(source, tmp_path / "out", dtype="bfloat16", overwrite=True)
    assert str(Checkpoint(tmp_path / "out").infos["norm.weight"].dtype) == "bfloat16"


def test_a_training_run_is_converted_from_its_model(source: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(source, run / "model")
    manifests.seal(run, Manifest(kind="run", tools=manifests.tools()))
    found = convert(run, tmp_path / "out")
    assert found.manifest.parents == (manifests.parent(run),)
    assert found.manifest.parents[0].kind == "run"
    edit(run / "model" / "config.json", vocab_size=1)
    with pytest.raises(ManifestError, match="changed"):
        convert(run, tmp_path / "again")


def test_an_artifact_that_needs_no_converting_says_so(source: Path, tmp_path: Path) -> None:
    hf.convert(source, tmp_path / "out")
    with pytest.raises(UserError, match="needs no converting"):
        convert(tmp_path / "out", tmp_path / "again")


def test_a_folder_without_generation_config_gets_the_ids_of_its_config(source: Path, tmp_path: Path) -> None:
    (source / "generation_config.json").unlink()
    hf.convert(source, tmp_path / "out")
    assert json_file.read(tmp_path / "out/generation_config.json") == {"eos_token_id": 2, "pad_token_id": 0}
    assert not (tmp_path / "out/source/generation_config.json").exists()


def test_a_folder_without_tokenizer_is_converted_with_a_warning(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (source / name).unlink()
    hf.convert(source, tmp_path / "out")
    assert "no tokenizer" in caplog.text


@pytest.mark.parametrize("text", ["{}", "{nope", "[]"])
def test_a_damaged_tokenizer_leaves_nothing_behind(text: str, source: Path, tmp_path: Path) -> None:
    (source / "tokenizer.json").write_text(text, encoding="utf-8")
    assert f"{source / 'tokenizer.json'} is not a tokenizer" in refused(source, tmp_path / "out")


def test_an_older_tokenizer_that_cannot_be_read_leaves_nothing_behind(source: Path, tmp_path: Path) -> None:
    (source / "tokenizer.json").rename(source / "vocab.json")
    assert "AutoTokenizer" in refused(source, tmp_path / "out")
    (source / "tokenizer.model").write_bytes(b"this is no sentencepiece model")
    assert "tokenizer.model" in refused(source, tmp_path / "out")


def test_exporting_what_was_cast_names_the_new_type(source: Path, tmp_path: Path) -> None:
    hf.convert(source, tmp_path / "out", dtype="bfloat16")
    hf.export(tmp_path / "out", tmp_path / "back")
    config = json_file.read(tmp_path / "back/config.json")
    assert config == {**json_file.read(source / "config.json"), "dtype": "bfloat16"}


def test_a_quantized_checkpoint_is_not_exported(source: Path, tmp_path: Path) -> None:
    from llmc.quant.quantize import quantize
    from llmc.recipe import QuantRecipe, WeightFormat

    hf.convert(source, tmp_path / "ckpt")
    quantize(
        tmp_path / "ckpt", tmp_path / "small", QuantRecipe(algorithm="rtn", weights=WeightFormat(bits=8, group_size=32))
    )
    with pytest.raises(UserError) as caught:
        hf.export(tmp_path / "small", tmp_path / "back")
    assert "llmc export ckpt" in str(caught.value)
    assert not (tmp_path / "back").exists()


def test_an_export_can_be_overwritten_and_converted_again(source: Path, tmp_path: Path) -> None:
    hf.convert(source, tmp_path / "one")
    hf.export(tmp_path / "one", tmp_path / "back")
    with pytest.raises(UserError, match="--overwrite"):
        hf.export(tmp_path / "one", tmp_path / "back")
    hf.export(tmp_path / "one", tmp_path / "back", overwrite=True)
    again = convert(tmp_path / "back", tmp_path / "two")
    assert again.manifest.parents[0].kind == "export"
    one = Checkpoint(tmp_path / "one").manifest.files["model.safetensors"]
    assert again.manifest.files["model.safetensors"] == one


MEASURE = """
import sys
from pathlib import Path

def kilobytes(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))

from llmc.converters import gguf, hf, pickled  # what is imported is not what converting costs
if sys.argv[4] == "bin":
    import torch
before = kilobytes("VmRSS")
hf.convert(Path(sys.argv[1]), Path(sys.argv[2]), dtype=sys.argv[3])
print(kilobytes("VmHWM") - before)
"""


def large_source(folder: Path, form: str) -> int:
    """A random model of 1 GB with tensors over 100 MB; returns the bytes of the largest."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "vocab_size": 64000, "num_hidden_layers": 12}
    config = {**sizes, "num_attention_heads": 8, "num_key_value_heads": 8, "architectures": ["LlamaForCausalLM"]}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    from llmc.converters import families
    from llmc.converters.rules import source_names
    from llmc.names import tensors

    family, spec = families.read_spec(config, folder)
    names = source_names(family.rules, spec)
    values = {names[name]: torch.rand(shape, dtype=torch.float32) for name, shape in tensors(spec).items()}
    assert sum(value.nbytes for value in values.values()) > 1e9
    if form == "bin":
        torch.save(values, folder / pickled.SINGLE)
    else:
        save_weights(folder, values)
    return max(value.nbytes for value in values.values())


@pytest.mark.slow
@pytest.mark.parametrize(("form", "dtype"), [("safetensors", "keep"), ("safetensors", "bfloat16"), ("bin", "keep")])
def test_memory_stays_under_the_largest_tensor_and_300_mb(tmp_path: Path, form: str, dtype: str) -> None:
    largest = large_source(tmp_path / "source", form)
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "source"), str(tmp_path / "out"), dtype, form]
    output = subprocess.run(command, capture_output=True, text=True, check=True)
    grown = int(output.stdout) * 1024
    assert grown < largest + 300e6, f"grew by {grown / 1e6:.0f} MB, the largest tensor is {largest / 1e6:.0f} MB"
