"""DeepSpeed's ZeRO checkpoints: the float32 weights that its ranks share, put together again.

    config.json                                         the model's, beside
    latest                                              "global_step100"
    global_step100/mp_rank_00_model_states.pt           names and shapes; what was not trained     (stage 3: one a rank)
    global_step100/*zero_pp_rank_N_mp_rank_00_optim_states.pt   rank N's part of the weights, with Adam's moments

    stages 1 and 2     a group's tensors one after another, cut into as many equal parts as there are ranks
    stage 3            each tensor cut into equal parts, the last filled up; a rank's parts one after another,
                       cut into sub-groups anywhere

Nothing but the wanted bytes of the wanted tensor is read: the moments are passed over. The layout is that of
deepspeed/utils/zero_to_fp32.py of version 0.19, and its result is what the tests compare with.

Knows: the files and how they are cut. Does not know: any family, nor DeepSpeed, which need not be installed.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from llmc import json_file
from llmc import manifest as manifests
from llmc.checkpoint import Checkpoint
from llmc.converters import cast, families, hf, pickled
from llmc.converters import source as sources
from llmc.converters.rules import Progress, Tensors
from llmc.converters.source import Source
from llmc.errors import CheckpointError
from llmc.log import logger
from llmc.manifest import Parent
from llmc.names import Shape
from llmc.tensors import Array, TensorInfo, read_tensor

LATEST = "latest"
_OPTIMIZERS = "*_optim_states.pt"
_OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")


class _Inert:
    """In place of an object of DeepSpeed that is of no use here."""

    def __new__(cls, *_: object) -> _Inert:
        return super().__new__(cls)


# What DeepSpeed's files mention besides tensors, and what stands in for it.
_ALLOWED = {
    "deepspeed.runtime.zero.config.ZeroStageEnum": int,
    "deepspeed.runtime.fp16.loss_scaler.LossScaler": _Inert,
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler": _Inert,
    "deepspeed.utils.tensor_fragment.fragment_address": _Inert,
}


@dataclass(frozen=True, slots=True)
class _Pieces:
    """A tensor of which consecutive elements lie in several places."""

    shape: Shape
    parts: tuple[TensorInfo, ...]


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is one that DeepSpeed saved into, or one step's folder inside it."""
    return (folder / LATEST).is_file() or any(folder.glob(_OPTIMIZERS))


def convert(
    source: Path, out: Path, *, dtype: str = "keep", overwrite: bool = False, progress: Progress | None = None
) -> Checkpoint:
    """Make a canonical checkpoint of a ZeRO checkpoint, whatever its stage and number of ranks.

    Args:
        source: The folder with `latest` and the model's config.json, or one step's folder inside it.
        dtype: "keep" gives float32, the type of the weights that were trained.

    Raises:
        UserError: `out` exists, or `dtype` is not a type.
        UnsupportedModelError: The architecture or a setting of it is not supported.
        CheckpointError: A file is missing, damaged or not of this kind (as with tensor parallelism), or the parts do
            not add up.
    """
    cast.target_dtype(dtype)
    opened, dtype = _open(source), "float32" if dtype == "keep" else dtype
    return sources.write(opened, out, dtype=dtype, overwrite=overwrite, progress=progress)


def _open(source: Path) -> Source:
    step = _step(source)
    home = next((folder for folder in (step, step.parent) if (folder / hf.CONFIG).is_file()), None)
    if home is None:
        raise CheckpointError(
            f"{source} has no {hf.CONFIG}: DeepSpeed saves none, so put the one of the model that was trained beside "
            f"{LATEST}, and its tokenizer"
        )
    config = json_file.read(home / hf.CONFIG)
    family, spec = families.read_spec(config, home / hf.CONFIG)
    pieces, shared = _read(step)
    found = Source(
        where=step,
        family=family,
        spec=spec,
        tensors=functools.partial(_tensors, pieces),
        copy=functools.partial(hf.copy_words, home, config),
        parents=(Parent(kind="zero", sha256=manifests.sha256_of(home / hf.CONFIG), name=f"{home.name}/{step.name}"),),
        packages=("torch",),
    )
    if spec.tied and found.head in pieces and shared.get(found.head) != found.embedding:
        logger.warning("the config says that head and embedding are tied, but they were trained apart: kept apart")
        return replace(found, spec=spec.model_copy(update={"tied": False}))
    return found


def _step(source: Path) -> Path:
    """The folder of the step that is meant."""
    if any(source.glob(_OPTIMIZERS)):
        return source.resolve()
    name = (source / LATEST).read_text(encoding="utf-8", errors="replace").strip()
    if Path(name).name != name:
        raise CheckpointError(f"{source / LATEST} names '{name}', which is not a plain folder name")
    if not (source / name).is_dir():
        raise CheckpointError(f"{source / LATEST} names '{name}', and there is no such folder")
    return (source / name).resolve()


def _read(step: Path) -> tuple[dict[str, _Pieces], dict[str, str]]:
    """Where each tensor lies, and which are another under a second name."""
    optimizers = _optimizers(step)
    try:
        states = [pickled.read_structure(path, _ALLOWED)["optimizer_state_dict"] for path in optimizers]
        stage, count = int(states[0]["zero_stage"]), states[0]["partition_count"]
        if stage not in (1, 2, 3):
            raise CheckpointError(f"{step} is of ZeRO stage {stage}; llmc reads 1, 2 and 3")
        if (ranks := max(count) if isinstance(count, list) else int(count)) != len(optimizers):
            raise CheckpointError(f"{step}: {ranks} ranks wrote it, and the files of {len(optimizers)} are here")
        paths = [step / "mp_rank_00_model_states.pt"]
        if stage == 3:
            paths = [step / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(ranks)]
        models = [pickled.read_structure(path, _ALLOWED) for path in paths]
        cut = _cut_by_tensor if stage == 3 else _cut_by_group
        found = cut(models[0]["param_shapes"], list(zip(optimizers, states, strict=True)), step)
        found |= _untrained(list(zip(paths, models, strict=True)))
        shared = {str(name): str(other) for name, other in models[0]["shared_params"].items()}
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{step} is not a ZeRO checkpoint as llmc knows them: {error!r}") from None
    return found | {name: found[other] for name, other in shared.items() if other in found}, shared


def _optimizers(step: Path) -> list[Path]:
    """The ranks' files, in the order of the ranks."""
    found: dict[int, Path] = {}
    for path in sorted(step.glob(_OPTIMIZERS)):
        met = _OPTIMIZER.fullmatch(path.name)
        if met is None or int(met[2]):
            raise CheckpointError(
                f"{path} is of a kind that llmc does not put together (tensor or expert parallelism): "
                "save the model once with DeepSpeed's save_16bit_model"
            )
        found[int(met[1])] = path
    for rank in range(len(found)):
        if rank not in found:
            raise CheckpointError(f"{step}: the optimizer states of rank {rank} are missing")
    return [found[rank] for rank in range(len(found))]


_States = Sequence[tuple[Path, Mapping[str, Any]]]


def _cut_by_group(groups: Sequence[Mapping[str, Any]], states: _States, step: Path) -> dict[str, _Pieces]:
    """Stages 1 and 2."""
    found: dict[str, _Pieces] = {}
    align = 2 * len(states)
    paddings = states[0][1].get("param_alignment_paddings") or [[0] * len(shapes) for shapes in groups]
    for index, (shapes, padding) in enumerate(zip(groups, paddings, strict=True)):
        vector = [
            pickled.locate(path, f"group {index}", state["single_partition_of_fp32_groups"][index])
            for path, state in states
        ]
        offset = 0
        for (name, shape), gap in zip(shapes.items(), padding, strict=True):
            found[name] = _Pieces(tuple(shape), tuple(_slice(vector, offset, math.prod(shape))))
            offset += math.prod(shape) + gap
        # The end is filled up to a multiple of this, in two ways that cannot be told apart afterwards.
        held = sum(part.shape[0] for part in vector)
        if -(-offset // align) != -(-held // align):
            raise CheckpointError(f"{step}: group {index} holds {held} numbers, and its tensors take {offset}")
    return found


def _cut_by_tensor(groups: Sequence[Mapping[str, Any]], states: _States, _step: Path) -> dict[str, _Pieces]:
    """Stage 3."""
    found: dict[str, _Pieces] = {}
    vectors = [
        [pickled.locate(path, f"group {index}", group) for index, group in enumerate(state["fp32_flat_groups"])]
        for path, state in states
    ]
    offset = 0
    for name, shape in itertools.chain.from_iterable(shapes.items() for shapes in groups):
        share = -(-math.prod(shape) // len(states))
        parts = [part for vector in vectors for part in _slice(vector, offset, share)]
        found[name] = _Pieces(tuple(shape), tuple(_slice(parts, 0, math.prod(shape))))
        offset += share
    for (path, _), vector in zip(states, vectors, strict=True):
        if (held := sum(part.shape[0] for part in vector)) != offset:
            raise CheckpointError(f"{path} holds {held} numbers, and its parts of all tensors take {offset}")
    return found


def _untrained(models: _States) -> dict[str, _Pieces]:
    """Frozen parameters, cut in stage 3 as trained ones are, and buffers."""
    found: dict[str, _Pieces] = {}
    for name, shape in (models[0][1].get("frozen_param_shapes") or {}).items():
        parts = [_flat(pickled.locate(path, name, model["frozen_param_fragments"][name])) for path, model in models]
        found[name] = _Pieces(tuple(shape), tuple(_slice(parts, 0, math.prod(shape))))
    path, model = models[0]
    for name in model["buffer_names"]:
        info = pickled.locate(path, name, model["module"][name])
        found[name] = _Pieces(info.shape, (_flat(info),))
    return found


def _flat(info: TensorInfo) -> TensorInfo:
    return replace(info, shape=(math.prod(info.shape),))


def _slice(vector: Iterable[TensorInfo], first: int, count: int) -> Iterator[TensorInfo]:
    """`count` elements of a vector that lies in several places, from `first` on."""
    start, left = first, count
    for part in vector:
        skipped = min(start, part.shape[0])
        taken = min(left, part.shape[0] - skipped)
        start, left = start - skipped, left - taken
        if taken:
            yield replace(part, shape=(taken,), offset=part.offset + skipped * part.dtype.itemsize)
    if left:
        raise ValueError(f"{left} numbers are missing after {first}")


def _tensors(pieces: Mapping[str, _Pieces], dtype: np.dtype[Any] | None) -> Tensors:
    """The tensors, each put together when it is asked for."""

    def load(name: str) -> Array:
        item, info = pieces[name], infos[name]
        blocks = (read_tensor(block) for part in item.parts for block in cast.blocks(part))
        return cast.assemble(name, np.empty(math.prod(info.shape), info.dtype), blocks).reshape(info.shape)

    infos = {
        name: TensorInfo(dtype or (item.parts[0].dtype if item.parts else np.dtype(np.float32)), item.shape)
        for name, item in pieces.items()
    }
    return Tensors(infos, load)
