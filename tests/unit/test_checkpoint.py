from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llmc import checkpoint, names
from llmc import manifest as manifests
from llmc.checkpoint import Checkpoint
from llmc.errors import CheckpointError, ManifestError
from llmc.manifest import Manifest
from llmc.recipe import KVCacheFormat, QuantRecipe, WeightFormat
from llmc.spec import Attention, Mlp, ModelSpec, Norm, Rope
from llmc.tensors import Array, TensorInfo

SPEC = ModelSpec(
    family="llama",
    vocab_size=6,
    hidden_size=4,
    num_layers=2,
    max_positions=8,
    norm=Norm(eps=1e-6),
    position=Rope(),
    attention=Attention(num_heads=2, num_kv_heads=1, head_dim=2),
    mlp=Mlp(intermediate_size=6),
)


def values_of(spec: ModelSpec = SPEC) -> dict[str, Array]:
    random = np.random.default_rng(0)
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in names.tensors(spec).items()}


def write(folder: Path, values: dict[str, Array], *, spec: ModelSpec = SPEC, shard_bytes: int = 1 << 30) -> None:
    infos = {name: TensorInfo(value.dtype, value.shape) for name, value in values.items()}
    folder.mkdir(exist_ok=True)
    checkpoint.write(folder, spec, infos, values.__getitem__, shard_bytes=shard_bytes)
    manifests.seal(folder, Manifest(kind="checkpoint", tools={}))


@pytest.mark.parametrize("shard_bytes", [1, 200, 1 << 30])
def test_what_is_written_is_read(tmp_path: Path, shard_bytes: int) -> None:
    values = values_of()
    write(tmp_path / "c", dict(reversed(values.items())), shard_bytes=shard_bytes)
    found = Checkpoint(tmp_path / "c")
    assert found.spec == SPEC
    assert found.recipe is None
    assert list(found) == list(names.tensors(SPEC))
    for name, value in values.items():
        assert np.array_equal(found[name], value)
    assert "norm.weight" in found
    assert "norm.bias" not in found
    with pytest.raises(CheckpointError, match="'nothing'"):
        found["nothing"]


def test_one_tensor_is_asked_for_at_a_time_and_in_canonical_order(tmp_path: Path) -> None:
    values, asked = values_of(), []

    def load(name: str) -> Array:
        asked.append(name)
        return values[name]

    infos = {name: TensorInfo(value.dtype, value.shape) for name, value in reversed(values.items())}
    checkpoint.write(tmp_path, SPEC, infos, load)
    assert asked == list(names.tensors(SPEC))


def test_tensors_that_are_not_the_spec_s_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    values = values_of()
    missing = {name: value for name, value in values.items() if name != "norm.weight"}
    with pytest.raises(CheckpointError, match=r"'norm\.weight' \[4\] is missing"):
        write(tmp_path / "a", missing)
    with pytest.raises(CheckpointError, match=r"'extra' \[4\] is not one"):
        write(tmp_path / "b", {**values, "extra": values["norm.weight"]})
    with pytest.raises(CheckpointError, match=r"'norm\.weight' has shape \[2\], expected \[4\]"):
        write(tmp_path / "c", {**values, "norm.weight": np.zeros(2, np.float32)})
    assert not any(path.name.startswith("model") for path in tmp_path.rglob("*"))


def test_a_folder_that_lost_a_tensor_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "c", values_of())
    wider = SPEC.model_copy(update={"num_layers": 3})
    (tmp_path / "c" / checkpoint.SPEC).write_text(wider.model_dump_json(), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"layers\.2\.attn_norm\.weight"):
        Checkpoint(tmp_path / "c")


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="is not a folder"):
        Checkpoint(tmp_path / "nowhere")
    with pytest.raises(ManifestError, match=r"no manifest\.json.*llmc convert"):
        Checkpoint(tmp_path)
    manifests.seal(tmp_path, Manifest(kind="engine", tools={}))
    with pytest.raises(ManifestError, match="is an engine, expected a checkpoint"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["{", "{}", '{"family": "llama", "colour": 1}'])
def test_a_spec_that_cannot_be_read_is_named(tmp_path: Path, text: str) -> None:
    write(tmp_path / "c", values_of())
    (tmp_path / "c" / checkpoint.SPEC).write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"spec\.json"):
        Checkpoint(tmp_path / "c")


def test_a_spec_that_is_missing_is_named(tmp_path: Path) -> None:
    write(tmp_path / "c", values_of())
    (tmp_path / "c" / checkpoint.SPEC).unlink()
    with pytest.raises(CheckpointError, match=r"spec\.json"):
        Checkpoint(tmp_path / "c")


def test_a_quantized_checkpoint_s_tensors(tmp_path: Path) -> None:
    recipe = QuantRecipe(
        algorithm="rtn",
        weights=WeightFormat(bits=4, group_size=16, symmetric=False),
        keep=("head",),
        kv_cache=KVCacheFormat(),
    )
    plan = checkpoint.plan(SPEC, recipe, {})
    # hidden 4 is one group of 16 with 12 of padding: 16 codes of 4 bits a row.
    assert plan["layers.0.attn.k.qweight"].shape == (2, 8)
    assert plan["layers.0.attn.k.scale"].shape == (2, 1)
    assert plan["layers.0.attn.k.zero"].shape == (2, 1)
    assert plan["layers.0.attn.k_scale"].shape == (2,)
    assert plan["head.weight"].shape == (6, 4)
    assert "layers.0.attn.k.weight" not in plan
    checkpoint.write(tmp_path, SPEC, plan, lambda name: np.zeros(plan[name].shape, plan[name].dtype), recipe=recipe)
    manifests.seal(tmp_path, Manifest(kind="checkpoint", tools={}))
    found = Checkpoint(tmp_path)
    assert found.recipe == recipe
    assert list(found) == list(plan)


def test_companions_travel_along(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint("llama"), tmp_path / "c"))
    (tmp_path / "out").mkdir()
    Checkpoint(folder).copy_companions(tmp_path / "out")
    met = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    assert met == tokenizer | {"source/config.json", "source/generation_config.json"}
    assert json.loads((tmp_path / "out/source/config.json").read_text(encoding="utf-8"))["model_type"] == "llama"
