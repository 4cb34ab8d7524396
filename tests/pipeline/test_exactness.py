"""What every family promises, over the table of tiny models: adding a row covers it.

Bits are here; logits are in tests/parity: test_reference.py (decoder), test_engine.py (engine), test_experts.py (every
expert takes part). Memory is in test_memory.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from oracles import ORACLES
from safetensors.torch import load_file, save_file

from llmc import checkpoint
from llmc.converters import families, hf
from llmc.converters.rules import bind
from llmc.errors import CheckpointError, UnsupportedModelError

Folder = Callable[[str], Path]
DTYPES = ("float32", "float16", "bfloat16")

# One model of each family, in the table's order.
FIRST = {case.model_type: name for name, case in reversed(tiny.TINY.items())}


def in_shards(folder: Path) -> Path:
    """A folder with one file of weights, its tensors spread over three."""
    values = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {name: f"model-{index % 3 + 1:05}-of-00003.safetensors" for index, name in enumerate(values)}
    for file in set(places.values()):
        save_file({name: value for name, value in values.items() if places[name] == file}, folder / file)
    (folder / hf.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}), encoding="utf-8")
    return folder


def weights(folder: Path) -> dict[str, tuple[torch.dtype, torch.Size, bytes]]:
    return {
        name: (value.dtype, value.shape, value.view(torch.uint8).numpy().tobytes())
        for path in sorted(folder.glob("*.safetensors"))
        for name, value in load_file(path).items()
    }


def other_tie(case: tiny.Case) -> tiny.Case:
    """A model that is tied where this one is not, and the other way round."""
    tied = bool(case.build().config.tie_word_embeddings)
    return tiny.Case(case.model_type, {**case.config, "tie_word_embeddings": not tied}, case.seed, case.base)


def there_and_back(source: Path, root: Path) -> bool:
    """Whether the model is tied; its bits and words are asserted."""
    spec = hf.convert(source, root / "checkpoint").spec
    hf.export(root / "checkpoint", root / "back")
    assert weights(root / "back") == weights(source)
    assert (root / "back/config.json").read_bytes() == (source / "config.json").read_bytes()
    return spec.tied


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FIRST)
def test_bits(family: str, dtype: str, sharded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tied and untied, but for authors' classes that have no word for it."""
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 100_000 if sharded else 4 << 30)
    cases = [tiny.TINY[FIRST[family]]]
    cases += [] if family in ORACLES else [other_tie(cases[0])]
    tied = set()
    for index, case in enumerate(cases):
        source = tiny.save(case, tmp_path / f"source-{index}", dtype=dtype)
        tied.add(there_and_back(in_shards(source) if sharded else source, tmp_path / str(index)))
        assert (len(list((tmp_path / str(index) / "back").glob("*.safetensors"))) > 1) == sharded
    assert tied == ({False} if family in ORACLES else {False, True})


def test_every_family_is_in_the_table() -> None:
    assert set(FIRST) == set(families.load_all())
    assert len(FIRST) >= 16


@pytest.mark.parametrize("name", tiny.TINY)
def test_a_rule_that_is_missing_is_named(name: str, tiny_source: Folder) -> None:
    config = json.loads((tiny_source(name) / "config.json").read_text(encoding="utf-8"))
    family, spec = families.read_spec(config, name)
    used = {item.rule for item in bind(family.rules, spec)}
    assert len(used) > 8
    for rule in used:
        with pytest.raises(CheckpointError, match=f"'{spec.family}' has no rule for the tensor '[a-z]") as caught:
            bind([other for other in family.rules if other != rule], spec)
        assert any(part.partition("{")[0] in str(caught.value) for part in rule.parts)


ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function")


@pytest.mark.parametrize("name", tiny.TINY)
def test_an_activation_and_a_rope_type_that_nobody_knows_are_named(name: str, tiny_source: Folder) -> None:
    config = json.loads((tiny_source(name) / "config.json").read_text(encoding="utf-8"))
    key = next((key for key in ACTIVATIONS if key in config), ACTIVATIONS[0])
    for changes, said in (
        ({key: "mish"}, (f"'{key}'", "'mish'")),
        ({"rope_scaling": {"rope_type": "spiral", "type": "spiral", "factor": 2.0}}, ("rope", "'spiral'")),
    ):
        with pytest.raises(UnsupportedModelError) as caught:
            families.read_spec({**config, **changes}, "config.json")
        assert all(word in str(caught.value) for word in ("config.json", *said)), caught.value


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[: len(raw) // 2],
        lambda raw: b"\xff" * 8 + raw[8:],
        lambda raw: raw[:8] + b"{" * 20 + raw[28:],
        lambda raw: b"",
    ],
    ids=["cut", "length", "header", "empty"],
)
def test_a_corrupt_shard_is_named(damage: Callable[[bytes], bytes], tiny_source: Folder, tmp_path: Path) -> None:
    source = in_shards(Path(shutil.copytree(tiny_source("llama"), tmp_path / "source")))
    shard = source / "model-00002-of-00003.safetensors"
    shard.write_bytes(damage(shard.read_bytes()))
    with pytest.raises(CheckpointError, match="model-00002-of-00003"):
        hf.convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", FIRST)
def test_tensors_too_many_too_few_and_misshapen_are_named(family: str, tiny_source: Folder, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_source(FIRST[family]), tmp_path / "source"))
    values = load_file(source / "model.safetensors")
    name = sorted(values)[-1]
    changed: list[tuple[dict[str, Any], str]] = [
        ({**values, "what.weight": torch.zeros(2)}, "'what.weight'"),
        ({**values, name: torch.zeros(3, 5)}, f"'{name}'"),
        ({key: value for key, value in values.items() if key != name}, f"'{name}'"),
    ]
    for state, said in changed:
        save_file(state, source / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError) as caught:
            hf.convert(source, tmp_path / "out")
        assert said in str(caught.value)
