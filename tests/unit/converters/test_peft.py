"""Adapters made, perturbed and saved by PEFT; merged by PEFT, and by llmc."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from adapters import ADAPTERS, load, make

from llmc import manifest as manifests
from llmc.checkpoint import SOURCE, Checkpoint
from llmc.converters import cast, hf, peft
from llmc.converters.convert import convert
from llmc.errors import CheckpointError, LlmcError, UnsupportedModelError, UserError
from llmc.tensors import read_tensor

Folder = Callable[[str], Path]

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft.*")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor([tiny.tokens(24)])).logits
    return found


def difference(met: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest, as a part of the largest value."""
    return float((met - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", ADAPTERS)
def test_it_computes_what_peft_computes(name: str, tiny_source: Folder, tmp_path: Path) -> None:
    base = tiny_source(ADAPTERS[name][0])
    adapted = make(name, base, tmp_path / "adapter")
    expected = logits(adapted)
    assert (expected - logits(load(base))).abs().max() > 0.01 * expected.abs().max()
    found = convert(tmp_path / "adapter", tmp_path / "out", base=base)
    hf.export(tmp_path / "out", tmp_path / "back")
    met = load(tmp_path / "back")
    assert difference(logits(met), expected) < 1e-5
    if name.startswith("tied"):
        assert not found.spec.tied
        return
    merged = adapted.merge_and_unload()
    for tensor, value in merged.state_dict().items():
        assert difference(met.state_dict()[tensor], value) < 1e-6, tensor
    assert difference(logits(met), logits(merged)) < 5e-6


def test_every_kind_of_base_gives_the_same_bytes(tiny_source: Folder, tiny_checkpoint: Folder, tmp_path: Path) -> None:
    looked = 0
    for name in ("all-linear", "conv1d", "fused-by-heads", "tied-embedding"):
        case = ADAPTERS[name][0]
        make(name, tiny_source(case), tmp_path / name)
        theirs = convert(tmp_path / name, tmp_path / f"{name}-a", base=tiny_source(case))
        ours = convert(tmp_path / name, tmp_path / f"{name}-b", base=tiny_checkpoint(case))
        assert theirs.spec == ours.spec
        assert theirs.manifest.files["model.safetensors"] == ours.manifest.files["model.safetensors"]
        assert [parent.kind for parent in theirs.manifest.parents] == ["peft", "hf"]
        assert [parent.kind for parent in ours.manifest.parents] == ["peft", "checkpoint"]
        assert (tmp_path / f"{name}-b" / SOURCE / "config.json").is_file()
        looked += 1
    assert looked == 4


def test_parents_and_tools(tiny_source: Folder, tmp_path: Path) -> None:
    make("lora", tiny_source("llama"), tmp_path / "adapter", pickled=True)
    assert (tmp_path / "adapter" / peft.PICKLE).is_file()
    found = convert(tmp_path / "adapter", tmp_path / "out", base=tiny_source("llama"))
    adapter, base = found.manifest.parents
    assert (adapter.kind, adapter.name) == ("peft", "adapter")
    assert adapter.sha256 == manifests.sha256_of(tmp_path / "adapter" / peft.CONFIG)
    assert (base.kind, base.name) == ("hf", "llama")
    assert "torch" in found.manifest.tools
    manifests.verify(tmp_path / "out", found.manifest)


@pytest.mark.parametrize("dtype", ["keep", "float16", "float32"])
def test_the_sum_is_rounded_once(dtype: str, tmp_path: Path) -> None:
    """A bfloat16 base: added up in float32, whatever comes out."""
    base = tiny.save(tiny.TINY["llama"], tmp_path / "base", dtype="bfloat16")
    make("all-linear", base, tmp_path / "adapter")
    exact = convert(tmp_path / "adapter", tmp_path / "exact", base=base, dtype="float32")
    found = convert(tmp_path / "adapter", tmp_path / "out", base=base, dtype=dtype)
    expected = cast.FLOATS["bfloat16" if dtype == "keep" else dtype]
    for name in found:
        assert found[name].dtype == expected
        assert np.array_equal(found[name], exact[name].astype(expected)), name


def test_the_adapters_own_tokenizer_wins(tiny_source: Folder, tmp_path: Path) -> None:
    make("lora", tiny_source("llama"), tmp_path / "adapter")
    tiny.save_tokenizer(tmp_path / "adapter")
    (tmp_path / "adapter/chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    convert(tmp_path / "adapter", tmp_path / "out", base=tiny_source("llama"))
    assert (tmp_path / "out/chat_template.jinja").read_text(encoding="utf-8") == "{{ messages }}"


@pytest.fixture
def adapter(tiny_source: Folder, tmp_path: Path) -> Path:
    make("lora", tiny_source("llama"), tmp_path / "adapter")
    return tmp_path / "adapter"


def refused(kind: type[LlmcError], adapter: Path, base: Path | None) -> str:
    out = adapter.parent / "out"
    with pytest.raises(kind) as caught:
        convert(adapter, out, base=base)
    assert not out.exists()
    return str(caught.value)


def edit(adapter: Path, **changes: Any) -> None:
    path = adapter / peft.CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_type": "ADALORA"}, "'ADALORA'"),
        ({"peft_type": "PREFIX_TUNING"}, "'PREFIX_TUNING'"),
        ({"init_lora_weights": "pissa"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "olora"}, "'olora'"),
        ({"use_qalora": True}, "use_qalora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "target_parameters"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"kasa_config": {"beta": 1}}, "kasa_config"),
        ({"what_is_new": 3}, "what_is_new"),
        ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
        ({"r": None}, "'r'"),
    ],
)
def test_settings_that_would_compute_something_else(
    changes: dict[str, Any], said: str, adapter: Path, tiny_source: Folder
) -> None:
    edit(adapter, **changes)
    assert said in refused(UnsupportedModelError, adapter, tiny_source("llama"))


def test_a_pattern_that_is_none(adapter: Path, tiny_source: Folder) -> None:
    edit(adapter, alpha_pattern={"(": 3})
    assert "regular expression" in refused(CheckpointError, adapter, tiny_source("llama"))


def test_tensors_without_a_place_or_of_another_shape(adapter: Path, tiny_source: Folder) -> None:
    from safetensors.torch import load_file, save_file

    path = adapter / peft.WEIGHTS
    values = load_file(path)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({**values, "base_model.model.model.layers.7.mlp.up_proj.lora_A.weight": values[name].clone()}, path)
    assert "layers.7.mlp.up_proj" in refused(CheckpointError, adapter, tiny_source("llama"))
    save_file({**values, name: values[name][:, :5].contiguous()}, path)
    assert re.search(r"q_proj.*\[4, 5\], expected \[4, 64\]", refused(CheckpointError, adapter, tiny_source("llama")))
    save_file({key: value for key, value in values.items() if key != name}, path)
    assert "'A' [4, 64] is missing" in refused(CheckpointError, adapter, tiny_source("llama"))
    save_file({**values, "base_model.model.lm_head.weight": torch.zeros(330, 64)}, path)
    assert "resizes" in refused(CheckpointError, adapter, tiny_source("llama"))
    save_file(values, path)
    edit(adapter, r=2)
    assert "expected [2, 64]" in refused(CheckpointError, adapter, tiny_source("llama"))
    edit(adapter, r=4, use_dora=True)
    assert "'magnitude' [64] is missing" in refused(CheckpointError, adapter, tiny_source("llama"))
    path.unlink()
    assert peft.WEIGHTS in refused(CheckpointError, adapter, tiny_source("llama"))


def test_bases_that_will_not_do(adapter: Path, tiny_source: Folder, tiny_checkpoint: Folder, tmp_path: Path) -> None:
    from llmc.quant.quantize import quantize
    from llmc.recipe import QuantRecipe, WeightFormat

    message = refused(UserError, adapter, None)
    assert "--base" in message
    assert str(tiny_source("llama")) in message
    recipe = QuantRecipe(algorithm="rtn", weights=WeightFormat(bits=8, group_size=32))
    quantize(tiny_checkpoint("llama"), tmp_path / "int8", recipe)
    assert "quantized" in refused(UserError, adapter, tmp_path / "int8")
    assert "does not have" in refused(CheckpointError, adapter, tiny_source("gpt2"))
    with pytest.raises(UserError, match="not an adapter"):
        convert(tiny_source("llama"), tmp_path / "out", base=tiny_source("llama"))


def test_a_base_is_checked_to_the_byte(adapter: Path, tiny_checkpoint: Folder, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_checkpoint("llama"), tmp_path / "base"))
    path = base / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    assert "was changed" in refused(LlmcError, adapter, base)


@pytest.mark.parametrize("block", [1, 700, 1 << 20])
@pytest.mark.parametrize("name", ["all-linear", "dora", "conv1d-dora-rslora", "embedding-dora"])
def test_in_blocks_of_any_size(
    name: str, block: int, tiny_source: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_source(ADAPTERS[name][0])
    make(name, base, tmp_path / "adapter")
    whole = convert(tmp_path / "adapter", tmp_path / "whole", base=base)
    monkeypatch.setattr(cast, "BLOCK_BYTES", block)
    found = convert(tmp_path / "adapter", tmp_path / "out", base=base)
    for tensor in whole:
        assert np.allclose(found[tensor], whole[tensor], rtol=1e-6, atol=1e-7), tensor


def test_what_an_adapter_leaves_alone_is_equal_to_the_bit(adapter: Path, tiny_source: Folder, tmp_path: Path) -> None:
    base = Checkpoint(hf.convert(tiny_source("llama"), tmp_path / "base").folder)
    found = convert(adapter, tmp_path / "out", base=tiny_source("llama"))
    changed = {name for name in base if not np.array_equal(found[name], read_tensor(base.infos[name]))}
    assert changed == {f"layers.{layer}.attn.{name}.weight" for layer in (0, 1) for name in "qv"}
