from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_gguf
import torch
from safetensors.torch import load_file

from llmc import manifest as manifests
from llmc.checkpoint import Checkpoint
from llmc.converters import gguf, gguf_file, hf
from llmc.converters.convert import convert
from llmc.errors import CheckpointError, UnsupportedModelError
from llmc.spec import Llama3Scaling, Rope, YarnScaling

Folder = Callable[[str], Path]

# GGUF's keys have no words for these, or llama.cpp would compute something else.
UNSAYABLE = {
    *("llama-dynamic", "llama-longrope", "llama-yarn-mscale", "llama-yarn-no-truncate"),
    *("qwen2-window", "qwen3-bias-window", "qwen2-moe", "qwen2-moe-window", "qwen3-moe-sparse", "gpt2-untied"),
    *("glm", "glm-tied", "chatglm3", "chatglm3-32k", "chatglm2-32k", "qwen1-deep"),
    *(name for name in tiny.TINY if name.startswith("gemma3")),
    *("baichuan-7b", "baichuan-13b", "baichuan2-7b", "baichuan2-13b"),
}
SAYABLE = [name for name in tiny_gguf.CASES if name not in UNSAYABLE]
# Families that are another one in a GGUF file; Mistral and Mixtral with a window say so.
READ_AS = {"mistral": "llama", "qwen": "qwen2", "chatglm2": "glm"}


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Name of a case -> the checkpoint made of its Hugging Face folder."""
    root = tmp_path_factory.mktemp("gguf-originals")

    def checkpoint(name: str) -> Path:
        if not (root / name).exists():
            hf.convert(tiny.save(tiny_gguf.CASES[name], root / f"{name}-source"), root / name)
        return root / name

    return checkpoint


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor([tiny.tokens(40)])).logits
    return found


@pytest.mark.parametrize("name", SAYABLE)
def test_tensors_and_spec_are_those_of_the_hugging_face_model(name: str, original: Folder, tmp_path: Path) -> None:
    found = convert(tiny_gguf.save(tiny_gguf.CASES[name], tmp_path / "m.gguf"), tmp_path / "out")
    expected = Checkpoint(original(name))
    assert list(found.infos) == list(expected.infos)
    for tensor in expected:
        # Gemma's norms have their one added and taken away again, in float32.
        atol = 2**-22 if expected.spec.norm.plus_one and "norm" in tensor else 0
        np.testing.assert_allclose(found[tensor], expected[tensor], rtol=0, atol=atol, err_msg=tensor)
    family = expected.spec.family if expected.spec.attention.window else READ_AS.get(expected.spec.family)
    position = found.spec.position
    if isinstance(position, Rope) and isinstance(position.scaling, YarnScaling):
        assert isinstance(expected.spec.rope.scaling, YarnScaling)
        assert position.scaling.attention_factor == pytest.approx(expected.spec.rope.scaling.attention_factor)
        position = expected.spec.position
    wanted = expected.spec.model_copy(update={"family": family or expected.spec.family})
    assert found.spec.model_copy(update={"position": position}) == wanted


@pytest.mark.parametrize("name", SAYABLE)
def test_transformers_computes_the_same_with_what_is_exported(name: str, tmp_path: Path) -> None:
    case = tiny_gguf.CASES[name]
    convert(tiny_gguf.save(case, tmp_path / "m.gguf"), tmp_path / "out")
    hf.export(tmp_path / "out", tmp_path / "back")
    expected = logits(case.build())
    size = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(logits(tiny.load(tmp_path / "back")), expected, rtol=0, atol=1e-5 * size)


def test_experts_in_tensors_of_their_own_are_read_as_well(original: Folder, tmp_path: Path) -> None:
    """As llama.cpp wrote Mixtral before 2024."""
    import gguf as package

    path = tiny_gguf.save(tiny_gguf.CASES["mixtral"], tmp_path / "stacked.gguf")
    stacked = gguf_file.read(path)
    writer = package.GGUFWriter(tmp_path / "m.gguf", "llama")
    for key, value in stacked.metadata.items():
        if key != "general.architecture":
            tiny_gguf.add(writer, key, value)
    for tensor in package.GGUFReader(path).tensors:
        parts = {tensor.name: tensor.data}
        if "_exps" in tensor.name:
            parts = {tensor.name.replace("_exps", f".{number}"): values for number, values in enumerate(tensor.data)}
        for name, values in parts.items():
            writer.add_tensor(name, np.array(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found, expected = convert(tmp_path / "m.gguf", tmp_path / "out"), Checkpoint(original("mixtral"))
    assert found.spec == expected.spec
    assert all(np.array_equal(found[tensor], expected[tensor]) for tensor in expected)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1", "F16", "BF16"])
@pytest.mark.parametrize("name", ["llama-bias", "qwen2", "qwen3-tied"])
def test_every_kind_of_number_is_what_the_gguf_package_makes_of_it(name: str, kind: str, tmp_path: Path) -> None:
    from gguf import GGMLQuantizationType, quants

    found = convert(tiny_gguf.save(tiny.TINY[name], tmp_path / "m.gguf", kind=kind), tmp_path / "out")
    hf.export(tmp_path / "out", tmp_path / "back")
    stored = load_file(tmp_path / "back/model.safetensors")
    model, kept = tiny.TINY[name].build().state_dict(), {"F16": torch.float16, "BF16": torch.bfloat16}
    for tensor, met in stored.items():
        original = model[tensor].numpy()
        if original.ndim == 1:
            assert met.dtype == torch.float32
            assert torch.equal(met, model[tensor]), tensor
            continue
        assert met.dtype == kept.get(kind, torch.float32)
        # Rows move and blocks lie within rows, so a permuted row is quantized as it would be in its place.
        number = GGMLQuantizationType[kind]
        expected = quants.dequantize(quants.quantize(original, number), number)
        assert np.array_equal(met.float().numpy(), expected), tensor
    assert found.manifest.settings == {"dtype": "keep"}


def test_transformers_reads_the_same_tensors_from_the_file(tmp_path: Path) -> None:
    """Its own GGUF reader is a second opinion on permutation and dequantization."""
    from transformers import AutoModelForCausalLM

    path = tiny_gguf.save(tiny.TINY["llama"], tmp_path / "m.gguf", kind="Q8_0")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).state_dict()
    convert(path, tmp_path / "out")
    hf.export(tmp_path / "out", tmp_path / "back")
    ours = load_file(tmp_path / "back/model.safetensors")
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def test_another_type_is_cast_to(tmp_path: Path) -> None:
    path = tiny_gguf.save(tiny.TINY["qwen2"], tmp_path / "m.gguf", kind="Q8_0")
    whole, half = convert(path, tmp_path / "whole"), convert(path, tmp_path / "half", dtype="float16")
    assert {str(info.dtype) for info in half.infos.values()} == {"float16"}
    assert np.array_equal(half["layers.1.attn.q.weight"], whole["layers.1.attn.q.weight"].astype(np.float16))


def test_the_parent_is_the_file(tmp_path: Path) -> None:
    path = tiny_gguf.save(tiny.TINY["qwen2"], tmp_path / "m.gguf")
    (parent,) = convert(path, tmp_path / "out").manifest.parents
    assert (parent.kind, parent.name, parent.sha256) == ("gguf", "m.gguf", manifests.sha256_of(path))
    assert not (tmp_path / "out/source").exists()


def test_a_float32_setting_is_written_as_its_author_wrote_it(tmp_path: Path) -> None:
    found = convert(tiny_gguf.save(tiny.TINY["qwen2.5-tied"], tmp_path / "m.gguf"), tmp_path / "out")
    assert (found.spec.norm.eps, found.spec.position.theta) == (1e-06, 1e6)


def test_llama_3_s_scaling_is_found_again(tmp_path: Path) -> None:
    found = convert(tiny_gguf.save(tiny.TINY["llama-llama3"], tmp_path / "m.gguf"), tmp_path / "out")
    assert found.spec.position.scaling == Llama3Scaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=64
    )


# All that says how many heads there are, and how large.
HEADS = [
    f"llama.{key}"
    for key in ("attention.head_count", "attention.key_length", "attention.value_length", "rope.dimension_count")
]


def refused(tmp_path: Path, name: str = "llama", kind: type[Exception] = UnsupportedModelError, **changes: Any) -> str:
    path = tiny_gguf.save(tiny_gguf.CASES[name], tmp_path / "m.gguf", **changes)
    with pytest.raises(kind) as caught:
        gguf.convert(path, tmp_path / "out")
    assert [item.name for item in tmp_path.iterdir()] == ["m.gguf"]
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"general.architecture": "gemma"}, ["'gemma'", "qwen3"]),
        ({"llama.logit_scale": 2.0}, ["'llama.logit_scale'", "2.0"]),
        ({"llama.expert_gating_func": 2}, ["'llama.expert_gating_func'", "2"]),
        (dict.fromkeys(HEADS), ["'num_attention_heads'", "missing"]),
        ({"llama.rope.dimension_count": 8}, ["'llama.rope.dimension_count'", "8", "16"]),
        ({"llama.attention.value_length": 8}, ["'llama.attention.value_length'"]),
        ({"llama.block_count": None}, ["'num_hidden_layers'", "missing"]),
        ({"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0}, ["longrope"]),
        ({"llama.rope.scaling.type": "magic", "llama.rope.scaling.factor": 2.0}, ["'magic'"]),
        ({"split.count": 3}, ["one of 3 parts", "--merge"]),
        ({"tokenizer.ggml.model": "bert"}, ["'bert'", "gpt2"]),
        ({"tokenizer.ggml.pre": "viking"}, ["'viking'", "qwen2"]),
    ],
)
def test_what_is_not_supported_is_refused(tmp_path: Path, changes: dict[str, Any], said: list[str]) -> None:
    message = refused(tmp_path, **changes)
    for part in said:
        assert part in message


def test_llama_3_s_factors_beside_another_scaling_are_refused(tmp_path: Path) -> None:
    both = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
    message = refused(tmp_path, "llama-llama3", **both)
    assert "rope_freqs.weight" in message
    assert "'linear'" in message


def test_a_missing_layer_is_named(tmp_path: Path) -> None:
    message = refused(tmp_path, kind=CheckpointError, **{"llama.block_count": 3})
    assert "blk.2." in message


def test_missing_experts_are_named(tmp_path: Path) -> None:
    experts = {"llama.expert_count": 8, "llama.expert_used_count": 2}
    assert "blk.0.ffn_gate_inp.weight" in refused(tmp_path, kind=CheckpointError, **experts)


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("qwen2", {"qwen2.attention.key_length": 32}, ["heads of 32", "16"]),
        ("baichuan-7b-deep", {"baichuan.block_count": 30}, ["30 layers", "32", "40"]),
        ("gpt2", {"gpt2.attention.head_count_kv": 2}, ["'gpt2.attention.head_count_kv'", "4"]),
        ("glm-square", {"chatglm.rope.dimension_count": 5}, ["5 of 16"]),
    ],
)
def test_what_an_architecture_cannot_be_is_refused(
    name: str, changes: dict[str, Any], said: list[str], tmp_path: Path
) -> None:
    message = refused(tmp_path, name, **changes)
    for part in said:
        assert part in message


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    path = tiny_gguf.save(tiny.TINY["llama"], tmp_path / "m.gguf")
    whole = path.read_bytes()
    for length in (2, 6, 20, 100, len(whole) // 4, len(whole) - 1000):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"cut short|damaged|not a GGUF"):
            gguf.convert(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
