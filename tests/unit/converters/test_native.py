"""Models that transformers has under another name: what it computes is what their authors' formulas give."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import oracles
import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llmc import modeling
from llmc.checkpoint import Checkpoint
from llmc.converters import families, hf, native
from llmc.converters.convert import convert
from llmc.errors import UserError

Folder = Callable[[str], Path]

# Tiny model of its authors' -> transformers' class that computes it.
CLASSES = {
    "qwen1": "Qwen2ForCausalLM",
    "qwen1-deep": "Qwen2ForCausalLM",
    "chatglm3": "GlmForCausalLM",
    "chatglm3-32k": "GlmForCausalLM",
    "chatglm2-32k": "GlmForCausalLM",
    "baichuan-7b": "LlamaForCausalLM",
}
MARKS = (tiny.CHATGLM_6B_BASE["gmask_token_id"], tiny.CHATGLM_6B_BASE["mask_token_id"])
NONE = ("baichuan-13b", "baichuan2-7b", "baichuan2-13b", "chatglm-6b", "chatglm-6b-deep", "chatglm-6b-tied")


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}


@pytest.mark.parametrize("name", CLASSES)
def test_transformers_computes_it(name: str, tiny_source: Folder, tiny_checkpoint: Folder, tmp_path: Path) -> None:
    native.export(tiny_checkpoint(name), tmp_path / "hf")
    assert json.loads((tmp_path / "hf/config.json").read_text(encoding="utf-8"))["architectures"] == [CLASSES[name]]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert type(model).__name__ == CLASSES[name]
    assert model.generation_config.eos_token_id == [2, 0]
    tokens = torch.tensor([tiny.tokens(40)])
    with torch.no_grad():
        expected, met = oracles.load(tiny_source(name))(tokens).logits, model(tokens).logits
    assert (met - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", CLASSES)
def test_it_can_be_converted_again(name: str, tiny_checkpoint: Folder, tmp_path: Path) -> None:
    native.export(tiny_checkpoint(name), tmp_path / "hf")
    one, two = Checkpoint(tiny_checkpoint(name)), convert(tmp_path / "hf", tmp_path / "again")
    assert two.spec == one.spec.model_copy(update={"family": families.by_name(one.spec.family).native})
    assert list(one) == list(two)
    for tensor in one:
        assert np.array_equal(one[tensor], two[tensor]), tensor


@pytest.mark.parametrize("name", NONE)
def test_what_no_class_computes_is_for_llmc_s_own(
    name: str, tiny_source: Folder, tiny_checkpoint: Folder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    native.export(tiny_checkpoint(name), tmp_path / "hf")
    assert "no class for this" in caplog.text
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert type(model) is modeling.LlmcForCausalLM
    assert model.generation_config.eos_token_id == [2, 0]
    oracle, tokens = oracles.load(tiny_source(name)), torch.tensor([tiny.tokens(40)])
    with torch.no_grad():
        expected, met = oracle(tokens).logits, model(tokens).logits
    assert (met - expected).abs().max() < 1e-5 * expected.abs().max()

    one, two = Checkpoint(tiny_checkpoint(name)), convert(tmp_path / "hf", tmp_path / "again")
    assert two.spec == one.spec
    assert two.manifest.files["model.safetensors"] == one.manifest.files["model.safetensors"]
    hf.export(tmp_path / "again", tmp_path / "original")
    met, expected = (load_file(at / "model.safetensors") for at in (tmp_path / "original", tiny_source(name)))
    assert met.keys() == expected.keys()
    assert all(torch.equal(met[tensor], expected[tensor]) for tensor in met)


@torch.inference_mode()
def test_chatglm_6b_generates_from_a_prompt_with_a_prefix(
    tiny_source: Folder, tiny_checkpoint: Folder, tmp_path: Path
) -> None:
    """Greedily, with transformers' cache and without, what the authors' formulas say; rows padded left are refused."""
    native.export(tiny_checkpoint("chatglm-6b"), tmp_path / "hf")
    model, oracle = AutoModelForCausalLM.from_pretrained(tmp_path / "hf"), oracles.load(tiny_source("chatglm-6b"))
    config = oracle.config
    prompt = torch.tensor([[*tiny.tokens(11), mark, config.bos_token_id] for mark in MARKS])
    settings = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": None, "pad_token_id": config.pad_token_id}
    expected = oracle.generate(prompt, max_new_tokens=24)
    mask = torch.ones_like(prompt)
    for use_cache in (True, False):
        assert torch.equal(model.generate(prompt, attention_mask=mask, use_cache=use_cache, **settings), expected)
    causal = torch.where(prompt == config.bos_token_id, 5, prompt)
    assert not torch.equal(model.generate(causal, attention_mask=mask, **settings)[:, 13:], expected[:, 13:])
    mask[0, :2] = 0
    with pytest.raises(UserError, match="rows of one length"):
        model.generate(prompt, attention_mask=mask, **settings)


def test_every_other_family_has_one_form(tiny_checkpoint: Folder, tmp_path: Path) -> None:
    looked = set()
    for name, case in tiny.TINY.items():
        spec = Checkpoint(tiny_checkpoint(name)).spec
        if families.by_name(spec.family).native != "" or spec.family in looked:
            assert name in (*CLASSES, *NONE) or spec.family in looked, f"{name} {case}"
            continue
        looked.add(spec.family)
        native.export(tiny_checkpoint(name), tmp_path / name / "hf")
        hf.export(tiny_checkpoint(name), tmp_path / name / "original")
        assert files(tmp_path / name / "hf") == files(tmp_path / name / "original")
    assert looked == {family.name for family in families.load_all().values() if family.native == ""}


def test_transformers_has_the_classes_that_families_name() -> None:
    """And none for the authors' own names where a family names another's."""
    import transformers

    for family in families.load_all().values():
        classes = [getattr(transformers, name, None) for name in family.architectures]
        assert (classes[0] is not None) == (family.native == ""), family.name
