"""The canonical checkpoint: one folder, one set of tensor names, whatever the model's family was.

    manifest.json                 kind "checkpoint"
    spec.json                     ModelSpec
    model.safetensors             canonical names (llmc/names.py), in the source's own dtype; sharded when large
    recipe.json                   QuantRecipe, when quantized
    tokenizer.json  tokenizer_config.json  chat_template.jinja ...    the tokenizer, as it came
    source/config.json ...        what the authors said of the model, for exporting back

Reading is lazy, writing streams: one tensor is in memory at a time.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel

from llmc import manifest as manifests
from llmc import names, tensors
from llmc.config import parse
from llmc.errors import CheckpointError, ConfigError
from llmc.recipe import QuantRecipe, packed_plan
from llmc.spec import ModelSpec
from llmc.tensors import Array, TensorInfo

SPEC = "spec.json"
RECIPE = "recipe.json"
SOURCE = "source"
SHARD_BYTES = 4 << 30

# Everything that belongs to a tokenizer and travels along, unread, from stage to stage.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


class Checkpoint:
    """A canonical checkpoint on disk, opened for reading.

    Attributes:
        folder: Where it lies.
        manifest: What it is and where it came from.
        spec: What it computes.
        recipe: How it is quantized, None when it is not.
        infos: Every tensor's dtype and shape, in canonical order.
    """

    def __init__(self, folder: Path) -> None:
        """Open `folder`.

        Raises:
            ManifestError: It is not a checkpoint.
            CheckpointError: It lacks a tensor, has one too many, or one of another shape than the spec says.
        """
        self.folder = folder
        self.manifest = manifests.read(folder, "checkpoint")
        self.spec = _read(ModelSpec, folder / SPEC)
        self.recipe = _read(QuantRecipe, folder / RECIPE) if (folder / RECIPE).exists() else None
        found = tensors.read_folder(folder)
        shapes = {name: info.shape for name, info in plan(self.spec, self.recipe, found).items()}
        check(shapes, {name: info.shape for name, info in found.items()}, where=folder)
        self.infos = {name: found[name] for name in shapes}

    def __getitem__(self, name: str) -> Array:
        """Read one tensor.

        Raises:
            CheckpointError: There is none of that name.
        """
        if name not in self.infos:
            raise CheckpointError(f"{self.folder} has no tensor '{name}'")
        return tensors.read_tensor(self.infos[name])

    def get(self, name: str) -> Array | None:
        """Read one tensor; None when there is none of that name."""
        return self[name] if name in self.infos else None

    def __contains__(self, name: object) -> bool:
        return name in self.infos

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def copy_companions(self, target: Path) -> None:
        """Copy the tokenizer and the source's own words, that every later stage carries along."""
        copy_tokenizer(self.folder, target)
        if (self.folder / SOURCE).is_dir():
            shutil.copytree(self.folder / SOURCE, target / SOURCE)


Model = TypeVar("Model", bound=BaseModel)


def _read(model: type[Model], path: Path) -> Model:
    try:
        return parse(model, path.read_bytes(), where=str(path))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None
    except ConfigError as error:
        raise CheckpointError(str(error)) from None


def plan(spec: ModelSpec, recipe: QuantRecipe | None, infos: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Every tensor that a checkpoint of this spec and recipe has, in canonical order.

    Args:
        infos: Gives the dtype of tensors that stay as they are (where it has them).
    """
    found: dict[str, TensorInfo] = {}
    for name, shape in names.tensors(spec).items():
        found.update(packed_plan(recipe, name, shape, infos.get(name)))
    return found


def check(expected: Mapping[str, names.Shape], met: Mapping[str, names.Shape], *, where: object) -> None:
    """Compare tensors by name and shape.

    Raises:
        CheckpointError: Naming the first tensor that is missing, unknown, or of another shape.
    """
    for name, shape in expected.items():
        if name not in met:
            raise CheckpointError(f"{where}: the tensor '{name}' {list(shape)} is missing")
        if tuple(met[name]) != tuple(shape):
            raise CheckpointError(f"{where}: '{name}' has shape {list(met[name])}, expected {list(shape)}")
    for name in met:
        if name not in expected:
            raise CheckpointError(f"{where}: the tensor '{name}' {list(met[name])} is not one that this model has")


def write(
    folder: Path,
    spec: ModelSpec,
    infos: Mapping[str, TensorInfo],
    load: Callable[[str], Array],
    *,
    recipe: QuantRecipe | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, str]:
    """Write spec, recipe and tensors into `folder` (made by `manifest.creating`, sealed by the caller).

    Args:
        infos: dtype and shape of every tensor to come; those of `plan(spec, recipe, ...)`.
        load: Gives a tensor by its canonical name; called once for each, in canonical order.

    Returns:
        sha256 of each file of tensors, for `manifest.seal`.
    """
    shapes = {name: info.shape for name, info in plan(spec, recipe, infos).items()}
    check(shapes, {name: info.shape for name, info in infos.items()}, where=folder.name)
    ordered = {name: infos[name] for name in shapes}
    (folder / SPEC).write_text(spec.model_dump_json(indent=1) + "\n", encoding="utf-8")
    if recipe is not None:
        (folder / RECIPE).write_text(recipe.model_dump_json(indent=1) + "\n", encoding="utf-8")
    values: Iterable[tuple[str, Array]] = ((name, load(name)) for name in ordered)
    return tensors.write_sharded(folder, ordered, values, max_bytes=shard_bytes)


def copy_tokenizer(source: Path, target: Path) -> list[str]:
    """Copy the tokenizer's files; returns the names of those that were there."""
    copied = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    for name in copied:
        shutil.copyfile(source / name, target / name)
    return copied
