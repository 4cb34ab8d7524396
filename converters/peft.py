"""PEFT adapters: a LoRA folder merged into the model that it was trained on.

    adapter_config.json               how: rank, alpha, and their exceptions by module
    adapter_model.safetensors (.bin)  base_model.model.<the base's name>.lora_A.weight ...

    W' = W + s B A                              s = alpha / r, or alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023)
    W' = m (W + s B A) / |W + s B A|            DoRA, the norm over each output's inputs (Liu et al. 2024, eq. 5)

An embedding's B A is transposed, as is that of any matrix kept as [in, out]. What was trained whole (`modules_to_save`,
biases) replaces the base's tensor. All sums are in float32, a block of rows at a time, whatever the base is stored in.

Knows: the adapter's names and settings. Does not know: the base's files, nor any family: it may be a Hugging Face
folder or a canonical checkpoint, seen under its authors' names.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from llmc import checkpoint, json_file, tensors
from llmc import manifest as manifests
from llmc.checkpoint import Checkpoint
from llmc.converters import cast, families, hf, pickled
from llmc.converters import source as sources
from llmc.converters.reader import Reader
from llmc.converters.rules import Family, Progress, Tensors, bind, from_canonical
from llmc.converters.source import Source
from llmc.errors import CheckpointError, UnsupportedModelError, UserError
from llmc.manifest import Parent
from llmc.names import Shape
from llmc.spec import ModelSpec
from llmc.tensors import Array, TensorInfo, read_tensor

CONFIG = "adapter_config.json"
WEIGHTS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"

# Where it was trained and how it began: not what it computes. `target_modules` and the like only chose the modules
# whose tensors are in the file, and PEFT itself takes `fan_in_fan_out` from the kind of layer that it meets.
_HARMLESS = frozenset(
    """
    auto_mapping base_model_name_or_path bias corda_config eva_config exclude_modules fan_in_fan_out inference_mode
    layers_pattern layers_to_transform loftq_config lora_dropout lora_ga_config megatron_config megatron_core
    modules_to_save peft_version qalora_group_size revision runtime_config target_modules task_type
    """.split()  # noqa: SIM905 - as in reader.py
)
# Beginnings that leave the base's weights alone; PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA change them first.
_INITS = (True, False, "gaussian", "eva", "orthogonal", "mica")

_PREFIX = "base_model.model."
_PARTS = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_embedding_A": "a",
    ".lora_embedding_B": "b",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
}


@dataclass(frozen=True, slots=True)
class Settings:
    """What an adapter's config says of its arithmetic."""

    where: str
    rank: int
    alpha: float
    ranks: Mapping[str, Any]
    alphas: Mapping[str, Any]
    is_root: bool
    is_dora: bool

    def of(self, module: str) -> tuple[int, float]:
        """The rank of a module and the scale of its product."""
        rank = _exception(self.ranks, module, self.where)
        alpha = _exception(self.alphas, module, self.where)
        rank = self.rank if rank is None else rank
        return int(rank), (self.alpha if alpha is None else alpha) / (math.sqrt(rank) if self.is_root else rank)


@dataclass(slots=True)
class Change:
    """What an adapter does to one tensor of its base: adds B A, replaces it, or both in turn.

    Attributes:
        is_turned: Whether the tensor is kept as [in, out].
    """

    a: TensorInfo | None = None
    b: TensorInfo | None = None
    magnitude: TensorInfo | None = None
    whole: TensorInfo | None = None
    scale: float = 1.0
    is_turned: bool = False


def is_adapter(source: Path) -> bool:
    """Whether a folder is an adapter, which needs a base."""
    return (source / CONFIG).is_file()


def convert(
    adapter: Path,
    out: Path,
    *,
    base: Path | None,
    dtype: str = "keep",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Checkpoint:
    """Make a canonical checkpoint of an adapter and the model that it was trained on.

    Args:
        base: A Hugging Face folder, a training run, or a checkpoint that is not quantized.
        dtype: "keep" gives each tensor the base's type.

    Raises:
        UserError: There is no base, it is quantized, or `out` exists.
        UnsupportedModelError: The adapter is of another kind than LoRA, or a setting of it changes what it computes
            in a way that llmc does not know.
        CheckpointError: A tensor of the adapter has no place in this base, or does not fit it.
    """
    cast.target_dtype(dtype)
    settings = read_settings(json_file.read(adapter / CONFIG), adapter / CONFIG)
    if base is None:
        name = json_file.read(adapter / CONFIG).get("base_model_name_or_path")
        raise UserError(
            f"{adapter} is an adapter: say with --base where the model lies that it was trained on ({name})"
        )
    model = _open_base(base)
    infos, is_pickle = _read_weights(adapter)
    found = changes(settings, model.family, model.spec, infos, adapter)
    if model.spec.tied and not found.keys().isdisjoint({model.embedding, model.head}):
        # PEFT changes one of the two and leaves the other as it was, so that they are no longer one.
        model = _untied(model)
    parent = Parent(kind="peft", sha256=manifests.sha256_of(adapter / CONFIG), name=adapter.resolve().name)
    merged = replace(
        model,
        where=adapter,
        tensors=functools.partial(_merged, model, found),
        copy=functools.partial(_copy, model, adapter),
        parents=(parent, *model.parents),
        packages=tuple(dict.fromkeys((*model.packages, *(["torch"] if is_pickle else [])))),
    )
    return sources.write(merged, out, dtype=dtype, overwrite=overwrite, progress=progress)


def read_settings(config: Mapping[str, Any], where: Path) -> Settings:
    """What an `adapter_config.json` says; raises UnsupportedModelError for another kind, or an unknown setting."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UnsupportedModelError(f"{where}: 'peft_type' is {kind!r}; llmc merges LORA (with rsLoRA and DoRA) alone")
    reader = Reader({key: value for key, value in config.items() if value not in ([], {})}, str(where))
    reader.note("peft_type", "init_lora_weights", "rank_pattern", "alpha_pattern")
    begun = config.get("init_lora_weights", True)
    if begun not in _INITS:
        raise UnsupportedModelError(
            f"{where}: 'init_lora_weights' is {begun!r}, which changed the base's own weights before training: save "
            "the adapter once with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    for key in ("lora_bias", "use_qalora", "ensure_weight_tying"):
        reader.only(key, False, "llmc does not merge it")
    settings = Settings(
        where=str(where),
        rank=reader.integer("r"),
        alpha=reader.number("lora_alpha"),
        ranks=config.get("rank_pattern") or {},
        alphas=config.get("alpha_pattern") or {},
        is_root=reader.flag("use_rslora"),
        is_dora=reader.flag("use_dora"),
    )
    reader.done(_HARMLESS)
    for key, table in (
        ("r", {"": settings.rank}),
        ("rank_pattern", settings.ranks),
        ("alpha_pattern", settings.alphas),
    ):
        numbers = table.values() if isinstance(table, Mapping) else [table]
        if not all(isinstance(value, int | float) and value > 0 for value in numbers):
            raise UnsupportedModelError(f"{where}: '{key}' is {config[key]!r}, expected numbers above zero")
    return settings


def _exception(patterns: Mapping[str, Any], module: str, where: str) -> Any:
    """The value of the first pattern that a module's name ends with (PEFT's utils/other.py, get_pattern_key)."""
    met = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module))
    try:
        return next(met, None)
    except re.error as error:
        raise CheckpointError(f"{where}: the pattern {error.pattern!r} is not a regular expression: {error}") from None


def _open_base(base: Path) -> Source:
    """A Hugging Face folder, a run or a checkpoint under its authors' names."""
    if not ((base / manifests.NAME).is_file() and manifests.read(base).kind == "checkpoint"):
        source = hf.open_source(base)
        if source.packed:
            raise UserError(
                f"{base} is quantized, and an adapter is merged before that: give the model it was made from"
            )
        return source
    found = Checkpoint(base)
    if found.recipe is not None:
        raise UserError(f"{base} is quantized, and an adapter is merged before that: give the model it was made from")
    manifests.verify(base, found.manifest)
    family = families.by_name(found.spec.family)

    def stored(dtype: np.dtype[Any] | None) -> Tensors:
        return from_canonical(family.rules, found.spec, cast.on_disk(found.infos, dtype))

    parents = (manifests.parent(base),)
    return Source(base, family, found.spec, stored, found.copy_companions, parents)


def _read_weights(adapter: Path) -> tuple[dict[str, TensorInfo], bool]:
    if (adapter / WEIGHTS).is_file():
        return tensors.read_header(adapter / WEIGHTS), False
    if (adapter / PICKLE).is_file():
        return pickled.read_file(adapter / PICKLE), True
    raise CheckpointError(f"{adapter} has no weights: expected {WEIGHTS} or {PICKLE}")


def changes(
    settings: Settings, family: Family, spec: ModelSpec, infos: Mapping[str, TensorInfo], adapter: Path
) -> dict[str, Change]:
    """The base's tensors that change, by their authors' names.

    Raises:
        CheckpointError: A tensor of the adapter has no place in this base, or does not fit it.
    """
    untied = spec.model_copy(update={"tied": False})
    bound = {item.theirs: item for item in bind(family.rules, untied)}
    shapes = {name: item.rule.op.source_shape(item.shapes) for name, item in bound.items()}
    found: dict[str, Change] = {}
    for name, info in infos.items():
        target, part = _place(name)
        if target not in bound:
            raise CheckpointError(f"{adapter}: '{name}' is for a tensor '{target}', which this base does not have")
        change = found.setdefault(target, Change())
        setattr(change, part, info)
        # A linear whose rule reads [out, in] out of [in, out]; PEFT takes an embedding for such a one.
        change.is_turned |= "lora_embedding" in name or bound[target].rule.op.source_shape([(1, 2)]) == (2, 1)
    for name, change in found.items():
        _check(settings, name, shapes[name], change, adapter)
    return found


def _place(name: str) -> tuple[str, str]:
    """An adapter's name -> the base's tensor that it is for, and what it does to it."""
    inner = name.removeprefix(_PREFIX)
    for suffix, part in _PARTS.items():
        if inner.endswith(suffix):
            return inner.removesuffix(suffix) + ".weight", part
    return inner.replace(".base_layer.", ".").replace(".modules_to_save.", "."), "whole"


def _check(settings: Settings, name: str, shape: tuple[int, ...], change: Change, adapter: Path) -> None:
    """Compare the parts of a change with each other, with the config and with the base; gives the change its scale."""
    if change.whole and change.whole.shape != shape:
        raise CheckpointError(
            f"{adapter}: '{name}' has shape {list(change.whole.shape)}, and the base's is {list(shape)}: "
            "llmc does not merge an adapter that resizes its base"
        )
    if not (change.a or change.b or change.magnitude):
        return
    rank, change.scale = settings.of(name.removesuffix(".weight"))
    out_features, in_features = shape[::-1] if change.is_turned else shape
    expected: dict[str, Shape] = {"A": (rank, in_features), "B": (out_features, rank)}
    parts = {"A": change.a, "B": change.b}
    if settings.is_dora or change.magnitude:
        expected["magnitude"], parts["magnitude"] = (out_features,), change.magnitude
    met = {part: info.shape for part, info in parts.items() if info}
    checkpoint.check(expected, met, where=f"{adapter}: {name}")


def _untied(model: Source) -> Source:
    """A tied model as one whose head is a tensor of its own, equal to the embedding."""

    def stored(dtype: np.dtype[Any] | None) -> Tensors:
        tied = model.tensors(dtype)
        infos = {**tied.infos, model.head: tied.infos[model.embedding]}
        return Tensors(infos, lambda name: tied.load(model.embedding if name == model.head else name))

    return replace(model, spec=model.spec.model_copy(update={"tied": False}), tensors=stored)


def _merged(model: Source, changes: Mapping[str, Change], dtype: np.dtype[Any] | None) -> Tensors:
    """The base's tensors with the adapter's changes; those that change are rounded once, after the sum."""
    plain, stored = model.tensors(dtype), model.tensors(None)

    def load(name: str) -> Array:
        change = changes.get(name)
        if change is None:
            return plain.load(name)
        weight = read_tensor(change.whole) if change.whole else stored.load(name)
        return _apply(name, weight, change, plain.infos[name].dtype)

    return Tensors(plain.infos, load)


def _apply(name: str, weight: Array, change: Change, dtype: np.dtype[Any]) -> Array:
    """The changed tensor; in the memory of `weight` where its type is the one that is wanted."""
    into = weight if weight.dtype == dtype else np.empty(weight.shape, dtype)
    if change.a is None or change.b is None:
        return cast.assemble(name, into, (weight[rows] for rows in _rows(weight)))
    a, b = (read_tensor(info).astype(np.float32) for info in (change.a, change.b))
    left, right = (a.T, b.T) if change.is_turned else (b, a)

    def blocks() -> Iterator[Array]:
        for rows in _rows(weight):
            yield weight[rows].astype(np.float32) + np.float32(change.scale) * (left[rows] @ right)

    if change.magnitude is None:
        return cast.assemble(name, into, blocks())
    squares = [np.square(block, dtype=np.float64).sum(axis=0 if change.is_turned else 1) for block in blocks()]
    norm = np.sqrt(np.sum(squares, axis=0) if change.is_turned else np.concatenate(squares))
    factor = (read_tensor(change.magnitude).astype(np.float64) / norm).astype(np.float32)
    factors = np.broadcast_to(factor if change.is_turned else factor[:, None], weight.shape)
    scaled = (factors[rows] * block for rows, block in zip(_rows(weight), blocks(), strict=True))
    return cast.assemble(name, into, scaled)


def _rows(weight: Array) -> Iterator[slice]:
    """Blocks of rows; several copies of one, in float32 and float64, take up to BLOCK_BYTES."""
    step = max(1, cast.BLOCK_BYTES // max(1, 32 * math.prod(weight.shape[1:])))
    for first in range(0, len(weight), step):
        yield slice(first, first + step)


def _copy(model: Source, adapter: Path, work: Path) -> None:
    """What the base says; the tokenizer is the adapter's where it has one, as its chat template may be new."""
    model.copy(work)
    if (adapter / "tokenizer.json").is_file():
        checkpoint.copy_tokenizer(adapter, work)
