"""What converting costs in memory, for the formats that turn tensors into others; test_hf.py has the plain ones."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import save_file

from llmc.converters import families, hf
from llmc.converters.convert import convert
from llmc.converters.rules import source_names
from llmc.names import tensors
from llmc.quant.quantize import quantize
from llmc.recipe import QuantRecipe, WeightFormat

MEASURE = """
import sys
from pathlib import Path

def kilobytes(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))

from llmc.converters import convert, gguf, gguf_writer, hf, own, paddle, peft  # importing is not what converting costs
from llmc.converters.layouts import awq
from llmc.checkpoint import Checkpoint
import gguf as _
before = kilobytes("VmRSS")
kind, source, base, out = sys.argv[1], *map(Path, sys.argv[2:])
if kind == "paddle":
    paddle.convert(source, out)
elif kind == "export":
    paddle.export(source, out)
elif kind == "own":
    found = Checkpoint(source)
    hf.write(found, own.form(found.spec), found.spec, out)
elif kind == "from-gguf":
    gguf.convert(source / "model.gguf", out)
elif kind.startswith("gguf-"):
    gguf_writer.export(source, out, kind=kind.removeprefix("gguf-"))
elif kind == "pack":
    awq.export(source, out)
elif kind == "unpack":
    hf.convert(source, out)
else:
    peft.convert(source, out, base=base, dtype=kind)
print(kilobytes("VmHWM") - before)
"""

CONFIG = {
    "hidden_size": 1024, "intermediate_size": 2048, "vocab_size": 64000, "num_hidden_layers": 12,
    "num_attention_heads": 8, "num_key_value_heads": 8, "architectures": ["LlamaForCausalLM"],
}  # fmt: skip
LARGEST = 4 * 64000 * 1024


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Of a random model of 1 GB, whose largest tensors are its embedding and its head."""
    family, spec = families.read_spec(CONFIG, folder)
    names = source_names(family.rules, spec)
    values = {names[name]: torch.rand(shape) for name, shape in tensors(spec).items()}
    assert sum(value.nbytes for value in values.values()) > 1e9
    assert max(value.nbytes for value in values.values()) == LARGEST
    return values


def grown(kind: str, source: Path, base: Path, out: Path) -> int:
    """By how many bytes a process grows that converts."""
    command = [sys.executable, "-c", MEASURE, kind, str(source), str(base), str(out)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) * 1024


@pytest.mark.slow
def test_an_adapter_of_every_matrix(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    values = weights(base)
    save_file(values, base / "model.safetensors", metadata={"format": "pt"})
    (base / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    changes: dict[str, torch.Tensor] = {}
    for name, value in values.items():
        at = "base_model.model." + name.removesuffix(".weight")
        if "embed" in name:
            changes[f"{at}.lora_embedding_A"] = torch.rand(16, value.shape[0])
            changes[f"{at}.lora_embedding_B"] = torch.rand(value.shape[1], 16)
            changes[f"{at}.lora_magnitude_vector"] = torch.rand(value.shape[1])
        elif value.ndim == 2:
            changes[f"{at}.lora_A.weight"] = torch.rand(16, value.shape[1])
            changes[f"{at}.lora_B.weight"] = torch.rand(value.shape[0], 16)
            changes[f"{at}.lora_magnitude_vector"] = torch.rand(value.shape[0])
    save_file(changes, adapter / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 16, "lora_alpha": 16, "use_dora": True}
    (adapter / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    for dtype in ("keep", "bfloat16"):
        assert grown(dtype, adapter, base, tmp_path / dtype) < LARGEST + 300e6


@pytest.mark.slow
def test_transposed_both_ways(tmp_path: Path) -> None:
    folder = tmp_path / "paddle"
    folder.mkdir()
    state = {
        name.replace("model.", "llama."): (value.T if value.ndim == 2 and "embed" not in name else value).numpy().copy()
        for name, value in weights(folder).items()
    }
    with (folder / "model_state.pdparams").open("wb") as file:
        pickle.dump(state, file, protocol=4)
    del state
    (folder / "config.json").write_text(json.dumps({**CONFIG, "paddlenlp_version": None}), encoding="utf-8")
    assert grown("paddle", folder, folder, tmp_path / "checkpoint") < LARGEST + 300e6
    assert grown("export", tmp_path / "checkpoint", folder, tmp_path / "back") < LARGEST + 300e6


@pytest.mark.slow
def test_gguf_both_ways(tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    save_file(weights(folder), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    tiny.save_tokenizer(folder)
    convert(folder, tmp_path / "checkpoint")
    for kind in ("f32", "f16", "q8_0", "q4_0"):
        assert grown(f"gguf-{kind}", tmp_path / "checkpoint", folder, tmp_path / kind) < LARGEST + 300e6
        assert grown("from-gguf", tmp_path / kind, folder, tmp_path / f"from-{kind}") < LARGEST + 300e6
    assert grown("own", tmp_path / "checkpoint", folder, tmp_path / "own") < LARGEST + 300e6


def test_packed_weights_both_ways(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    save_file(weights(folder), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    hf.convert(folder, tmp_path / "checkpoint")
    recipe = QuantRecipe(algorithm="rtn", weights=WeightFormat(bits=4, group_size=32, symmetric=False))
    quantize(tmp_path / "checkpoint", tmp_path / "quantized", recipe)
    # The embedding, the largest, is written as float32.
    assert grown("pack", tmp_path / "quantized", folder, tmp_path / "packed") < LARGEST + 300e6
    assert grown("unpack", tmp_path / "packed", folder, tmp_path / "back") < LARGEST + 300e6
