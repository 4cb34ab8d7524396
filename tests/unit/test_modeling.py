"""llmc's own class in transformers, against transformers' own classes of the same models."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from llmc import modeling
from llmc.checkpoint import Checkpoint
from llmc.converters import hf, own
from llmc.converters.convert import convert
from llmc.errors import UnsupportedModelError, UserError

NAMES = [
    "llama-yarn",
    "qwen2-window",
    "gemma3-tied",
    "mixtral",
    "gpt2",
    "opt-350m",
    "bloom-6-heads",
    "glm",
    "baichuan2-13b",
]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable[[str], Path]) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("own")

    def find(name: str) -> Path:
        if not (root / name).exists():
            found = Checkpoint(tiny_checkpoint(name))
            hf.write(found, own.form(found.spec), found.spec, root / name)
        return root / name

    return find


@pytest.fixture(scope="module")
def load(exported: Callable[[str], Path]) -> Callable[..., Any]:
    return lambda name, **settings: AutoModelForCausalLM.from_pretrained(exported(name), **settings)


def ids(count: int, rows: int = 1) -> torch.Tensor:
    return torch.tensor([tiny.tokens(count, seed) for seed in range(rows)])


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_logits_and_generated_tokens(name: str, load: Callable[..., Any]) -> None:
    ours, theirs = load(name), tiny.TINY[name].build()
    tokens = ids(40, rows=2)
    expected = theirs(tokens, use_cache=False).logits
    assert (ours(tokens).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    prompt = ids(12, rows=2)
    settings = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": None, "pad_token_id": 0}
    made = ours.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
    assert torch.equal(made, ours.generate(prompt, use_cache=False, **settings))
    for step in range(12, 32):
        assert torch.equal(theirs(made[:, :step], use_cache=False).logits[:, -1].argmax(-1), made[:, step])


@pytest.mark.parametrize("name", NAMES)
def test_what_is_saved_is_the_checkpoint_again(
    name: str, load: Callable[..., Any], tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    load(name).save_pretrained(tmp_path / "saved", max_shard_size="100KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1
    one, two = Checkpoint(tiny_checkpoint(name)), convert(tmp_path / "saved", tmp_path / "again")
    assert two.spec == one.spec
    assert two.manifest.files["model.safetensors"] == one.manifest.files["model.safetensors"]


def test_other_types_and_a_loss(load: Callable[..., Any]) -> None:
    half = load("baichuan2-13b", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    model, tokens = load("baichuan2-13b"), ids(20)
    logits = model(tokens).logits
    expected = torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:])
    loss = model(tokens, labels=tokens).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    padded, mask = torch.cat((tokens, tokens[:, :3] * 0), 1), torch.tensor([[1] * 20 + [0] * 3])
    assert torch.equal(model(padded, attention_mask=mask).logits[:, :20], model(padded).logits[:, :20])


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers.*")
def test_an_adapter_trained_on_it_is_merged(
    load: Callable[..., Any], exported: Callable[[str], Path], tmp_path: Path
) -> None:
    import peft

    torch.manual_seed(0)
    settings = peft.LoraConfig(r=4, target_modules=["q", "v", "down"], init_lora_weights=False)
    model = peft.get_peft_model(load("baichuan2-13b"), settings)
    model.save_pretrained(tmp_path / "adapter")
    found = convert(tmp_path / "adapter", tmp_path / "merged", base=exported("baichuan2-13b"))
    expected = model.merge_and_unload().state_dict()
    assert len(found.infos) == len(expected)
    for name in found:
        torch.testing.assert_close(torch.from_numpy(found[name]), expected[own.PREFIX + name], atol=1e-6, rtol=0)


def test_padding_on_the_left_is_refused(load: Callable[..., Any]) -> None:
    model, tokens = load("baichuan2-13b"), ids(6, rows=2)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    with pytest.raises(UserError, match="rows of one length"):
        model.generate(tokens, attention_mask=mask, max_new_tokens=2)
    with pytest.raises(UserError, match="rows of one length"):  # on the right, but with more to come
        model.generate(tokens, attention_mask=mask.flip(1), max_new_tokens=2)


def test_a_config_without_a_spec(exported: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported("gpt2"), tmp_path / "broken"))
    (folder / "manifest.json").unlink()
    for text, said in (('{"architectures": ["LlmcForCausalLM"]}', "'spec' is missing"),
                       ('{"architectures": ["LlmcForCausalLM"], "spec": {"famly": "x"}}', "famly")):  # fmt: skip
        (folder / "config.json").write_text(text, encoding="utf-8")
        with pytest.raises(UnsupportedModelError, match=said):
            convert(folder, tmp_path / "out")


def test_the_names_are_those_of_the_converter() -> None:
    assert (modeling.LlmcForCausalLM.__name__, modeling.LlmcConfig.model_type) == (own.ARCHITECTURE, own.MODEL_TYPE)
    assert modeling.LlmcForCausalLM.base_model_prefix + "." == own.PREFIX
