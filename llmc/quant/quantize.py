"""Quantize a checkpoint: the same steps for every algorithm.

    open source ─► check recipe ─► [calibrate] ─► transform tensor by tensor ─► write, seal

Knows: checkpoints, recipes, the table of algorithms. Does not know: how codes are chosen.
"""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from pydantic import PositiveInt

from llmc import checkpoint as checkpoints
from llmc import manifest as manifests
from llmc import names, text
from llmc.checkpoint import Checkpoint
from llmc.config import Strict
from llmc.errors import CheckpointError, UserError
from llmc.need import need
from llmc.quant import pack
from llmc.quant.algorithm import Transform, algorithm
from llmc.quant.pack import Packed
from llmc.recipe import QuantRecipe, WeightFormat
from llmc.runtime import Tokens
from llmc.tensors import Array, TensorInfo
from llmc.tokenizer import Tokenizer

# The algorithm of a recipe whose weights stay as they are.
NONE = "none"

# (what is being done, steps done, steps)
Progress = Callable[[str, int, int], None]


class Calibration(Strict):
    """Text to calibrate on.

    Attributes:
        path: A UTF-8 file, of the kind that the model will meet.
        window: Tokens read at a time.
        tokens: Tokens read at most.
    """

    path: Path
    window: PositiveInt = 512
    tokens: PositiveInt = 8192


@dataclass
class Figures:
    """What quantizing did.

    Attributes:
        bytes_before, bytes_after: Of all tensors.
        errors: For each quantized matrix |W - W'| / |W| (Frobenius norms).
        kept: Matrices that stayed as they were.
    """

    bytes_before: int
    bytes_after: int
    errors: dict[str, float] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)

    @property
    def worst(self) -> str | None:
        """The matrix with the largest error."""
        return max(self.errors, key=lambda name: self.errors[name], default=None)

    @property
    def mean_error(self) -> float:
        return sum(self.errors.values()) / len(self.errors) if self.errors else 0.0


def quantize(
    source: Path,
    target: Path,
    recipe: QuantRecipe,
    *,
    calibration: Calibration | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Figures:
    """Write a quantized copy of a checkpoint.

    Args:
        calibration: Needed by some algorithms and for an int8 KV cache.

    Raises:
        UserError: The recipe does not fit the model, calibration text is missing, or `target` exists.
        ArtifactError: `source` is not a whole, unquantized checkpoint.
    """
    progress = progress or (lambda *_: None)
    checkpoint = Checkpoint(source)
    check_recipe(checkpoint, recipe)
    manifests.check_target(target, overwrite=overwrite)
    windows = _windows(checkpoint, recipe, calibration)
    with manifests.creating(target, overwrite=overwrite) as folder:
        scales = _kv_scales(checkpoint, windows, progress) if recipe.kv_cache else {}
        infos = checkpoints.plan(checkpoint.spec, recipe, checkpoint.infos)
        figures = Figures(_total(checkpoint.infos), _total(infos))
        transform = algorithm(recipe.algorithm).prepare(checkpoint, recipe, windows) if recipe.weights else None
        stream = _stream(checkpoint, recipe, transform, scales, figures, progress)
        hashes = checkpoints.write(folder, checkpoint.spec, infos, lambda name: _next(stream, name), recipe=recipe)
        checkpoint.copy_companions(folder)
        manifests.seal(folder, _manifest(source, recipe, calibration, figures), hashes)
    return figures


def _manifest(
    source: Path, recipe: QuantRecipe, calibration: Calibration | None, figures: Figures
) -> manifests.Manifest:
    parents = [manifests.parent(source)]
    settings = {"recipe": recipe.model_dump(mode="json")}
    if calibration:
        digest = manifests.sha256_of(calibration.path)
        parents.append(manifests.Parent(kind="text", sha256=digest, name=calibration.path.name))
        settings["calibration"] = {"window": calibration.window, "tokens": calibration.tokens}
    notes = {"mean_error": round(figures.mean_error, 4)} if figures.errors else {}
    return manifests.Manifest(
        kind="checkpoint",
        tools=manifests.tools("numpy", *(["torch"] if calibration else [])),
        settings=settings,
        parents=tuple(parents),
        notes=notes,
    )


def check_recipe(checkpoint: Checkpoint, recipe: QuantRecipe) -> None:
    """Refuse what would quietly do something else than was asked for.

    Raises:
        UserError: The checkpoint is quantized already, a glob fits no matrix, or no matrix is left to quantize.
    """
    if checkpoint.recipe is not None:
        raise UserError(
            f"{checkpoint.folder} is quantized already (by {checkpoint.recipe.algorithm}): "
            "quantize the checkpoint that it was made from, with everything you want in one command"
        )
    if (recipe.weights is None) != (recipe.algorithm == NONE):
        raise UserError("an algorithm needs a weight format, and --algo none has none", param="algo")
    matrices = names.matrices(checkpoint.spec)
    for glob in (*recipe.keep, *recipe.overrides):
        if not fnmatch.filter(matrices, glob):
            raise UserError(_no_such_matrix(glob, matrices), param="keep")
    if recipe.weights and not any(recipe.format_of(name) for name in matrices):
        raise UserError("every matrix is kept: nothing is left to quantize", param="keep")


def _no_such_matrix(glob: str, matrices: Sequence[str]) -> str:
    near = difflib.get_close_matches(glob, [*matrices, *_kinds(matrices)], n=1)
    hint = f" (did you mean '{near[0]}'?)" if near else ""
    tied = " The head of this model is its embedding: keep 'embed'." if glob == "head" else ""
    return f"no matrix fits '{glob}'{hint}.{tied} There are {', '.join(_kinds(matrices))}"


def _kinds(matrices: Sequence[str]) -> list[str]:
    """Names with layers left open: embed, layers.*.attn.q, ..."""
    parts = (name.split(".") for name in matrices)
    return list(dict.fromkeys(".".join("*" if part.isdigit() else part for part in name) for name in parts))


def _windows(checkpoint: Checkpoint, recipe: QuantRecipe, calibration: Calibration | None) -> list[Tokens]:
    wanted_by = []
    if recipe.kv_cache:
        wanted_by.append("an int8 KV cache")
    if recipe.weights and algorithm(recipe.algorithm).CALIBRATES:
        wanted_by.append(f"the algorithm {recipe.algorithm}")
    if not wanted_by:
        if calibration:
            raise UserError("nothing in this recipe is calibrated: leave --calibration out", param="calibration")
        return []
    if calibration is None:
        raise UserError(
            f"{' and '.join(wanted_by)} must be calibrated: pass --calibration FILE, a text of the kind that the "
            "model will meet (some thousand words)",
            param="calibration",
        )
    tokenizer = Tokenizer.load(checkpoint.folder)
    window = min(calibration.window, checkpoint.spec.max_positions)
    return text.windows(text.read(calibration.path), tokenizer, window, limit=calibration.tokens)


def _kv_scales(checkpoint: Checkpoint, windows: Sequence[Tokens], progress: Progress) -> dict[str, Array]:
    need("torch")
    from llmc import model
    from llmc.quant import calibrate

    decoder = model.load(checkpoint)
    return dict(calibrate.kv_scales(decoder, windows, lambda done, of: progress("calibrating", done, of)))


def _stream(
    checkpoint: Checkpoint,
    recipe: QuantRecipe,
    transform: Transform | None,
    scales: Mapping[str, Array],
    figures: Figures,
    progress: Progress,
) -> Iterator[tuple[str, Array]]:
    """Every tensor of the quantized checkpoint in the order of its plan, one matrix in memory at a time."""
    for done, name in enumerate(checkpoint):
        module, _, kind = name.rpartition(".")
        is_matrix = names.is_matrix(name, checkpoint.infos[name].shape)
        weight_format = recipe.format_of(module) if is_matrix else None
        values = checkpoint[name]
        found = transform(name, values, weight_format) if transform else values
        if isinstance(found, Packed) and weight_format:
            figures.errors[module] = relative_error(values, found, weight_format)
            yield from found.pieces(module)
        elif isinstance(found, np.ndarray):
            if is_matrix:
                figures.kept.append(module)
            yield name, found
        if kind == "weight" and f"{module}_scale" in scales:
            yield f"{module}_scale", scales[f"{module}_scale"]
        progress("quantizing", done + 1, len(checkpoint.infos))


def _next(stream: Iterator[tuple[str, Array]], name: str) -> Array:
    """The next tensor, which the writer expects to be `name`."""
    met, values = next(stream)
    if met != name:
        raise CheckpointError(f"the algorithm gave '{met}' where the recipe has '{name}'")
    return values


def relative_error(values: Array, packed: Packed, weight_format: WeightFormat) -> float:
    """|W - W'| / |W| of a matrix [out, in] and what was made of it; 0 for a matrix of zeros."""
    columns = values.shape[1]

    def work(part: slice) -> tuple[float, float]:
        exact = values[part].astype(np.float32)
        lost = exact - pack.dequantize_rows(packed, weight_format, columns, part)
        return float(np.vdot(lost, lost)), float(np.vdot(exact, exact))

    lost, whole = (math.fsum(sums) for sums in zip(*pack.over_rows(work, *values.shape), strict=True))
    return math.sqrt(lost / whole) if whole else 0.0


def _total(infos: Mapping[str, TensorInfo]) -> int:
    return sum(info.nbytes for info in infos.values())
