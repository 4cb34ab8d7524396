"""Quantize a checkpoint: the same steps for every algorithm.

    open source ─► check recipe ─► [calibrate] ─► transform tensor by tensor ─► write ─► [judge] ─► seal, report
                                        ▲                                                   │
                                        └───────────── more bits, when not good enough ◄────┘

The folder's manifest has what follows from the inputs alone. report.json and report.png beside it also say how long it
took and how much memory, and are not part of the folder's identity.

Knows: checkpoints, recipes, the table of algorithms. Does not know: how codes are chosen, how results are judged.
"""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import json
import math
import resource
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import PositiveInt

from llmc import checkpoint as checkpoints
from llmc import manifest as manifests
from llmc import names, sample_text, text
from llmc.checkpoint import Checkpoint
from llmc.config import Strict, parse
from llmc.errors import CheckpointError, UserError
from llmc.need import installed, need
from llmc.quant import gate, pack
from llmc.quant.algorithm import Transform, algorithm, check_formats
from llmc.quant.gate import Judge, Verdict
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
        path: A UTF-8 file, of the kind that the model will meet; None is llmc/sample_text.py.
        window: Tokens read at a time.
        tokens: Tokens read at most.
    """

    path: Path | None = None
    window: PositiveInt = 512
    tokens: PositiveInt = 8192

    @property
    def source(self) -> str:
        """Where the text comes from, for people."""
        return str(self.path) if self.path else sample_text.describe("calibration")

    def read(self) -> str:
        """The text."""
        return text.read(self.path) if self.path else sample_text.read("calibration")

    def parent(self) -> manifests.Parent:
        """The manifest's entry of it."""
        digest = hashlib.sha256(self.read().encode()).hexdigest()
        return manifests.Parent(kind="text", sha256=digest, name=self.path.name if self.path else "sample text")


@dataclass
class Figures:
    """What quantizing did.

    Attributes:
        bytes_before, bytes_after: Of all tensors.
        errors: For each quantized matrix |X W^T - X W'^T| / |X W^T| on the calibration text X where the algorithm
            looks at one, else |W - W'| / |W| (Frobenius norms).
        error_kind: What most of them are errors of.
        kept: Matrices that stayed as they were.
        recipe: What was done in the end; the gate may have given some matrices more bits.
        calibrated_on: The calibration text, for people.
        verdict: What the judge found.
        seconds: Of the whole run.
        peak_bytes: The process's largest resident set.
    """

    bytes_before: int
    bytes_after: int
    errors: dict[str, float] = field(default_factory=dict)
    error_kind: str = "weights"
    kept: list[str] = field(default_factory=list)
    recipe: QuantRecipe | None = None
    calibrated_on: str | None = None
    verdict: Verdict | None = None
    seconds: float = 0.0
    peak_bytes: int = 0

    @property
    def worst(self) -> str | None:
        """The matrix with the largest error."""
        return max(self.errors, key=lambda name: self.errors[name], default=None)

    @property
    def mean_error(self) -> float:
        return sum(self.errors.values()) / len(self.errors) if self.errors else 0.0

    def report(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        worst = sorted(self.errors, key=lambda name: -self.errors[name])[:10]
        return {
            "recipe": self.recipe.model_dump(mode="json") if self.recipe else None,
            "calibrated_on": self.calibrated_on,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "mean_error": self.mean_error,
            "error_of": self.error_kind,
            "worst": {name: self.errors[name] for name in worst},
            "kept": self.kept,
            "quality": self.verdict.figures() if self.verdict else None,
            "seconds": round(self.seconds, 1),
            "peak_bytes": self.peak_bytes,
        }


def quantize(
    source: Path,
    target: Path,
    recipe: QuantRecipe,
    *,
    calibration: Calibration | None = None,
    judge: Judge | None = None,
    max_increase: float | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Figures:
    """Write a quantized copy of a checkpoint.

    Args:
        calibration: Needed by some algorithms and for an int8 KV cache; by default some sample text.
        judge: Measures the result.
        max_increase: Of the perplexity, as a share; parts of the model get 8 bits until it is met. Needs a judge.

    Raises:
        UserError: The recipe does not fit the model, or `target` exists.
        GateError: `max_increase` is not met with 8 bits everywhere.
        ArtifactError: `source` is not a whole, unquantized checkpoint.
    """
    began = time.perf_counter()
    progress = progress or (lambda *_: None)
    checkpoint = Checkpoint(source)
    recipe = check_recipe(checkpoint, recipe)
    manifests.check_target(target, overwrite=overwrite)
    calibration = _needed(recipe, calibration)
    windows = _windows(checkpoint, calibration) if calibration else []
    inside = gate.matrices_by_part(checkpoint.spec, names.matrices(checkpoint.spec)) if max_increase is not None else {}
    with manifests.creating(target, overwrite=overwrite) as folder:
        scales = _kv_scales(checkpoint, windows, progress) if recipe.kv_cache else {}
        sensitivity: Mapping[str, float] = {}
        while True:
            figures, hashes = _write(folder, checkpoint, recipe, windows, scales, progress)
            manifests.seal(folder, _manifest(source, recipe, calibration, figures), hashes)
            if judge is None:
                break
            figures.verdict = judge(checkpoint, Checkpoint(folder), max_increase is not None and not sensitivity)
            sensitivity = sensitivity or figures.verdict.sensitivity
            if max_increase is None or figures.verdict.increase <= max_increase:
                break
            recipe = gate.refine(recipe, inside, sensitivity, figures.verdict, max_increase)
            _clear(folder)
        figures.calibrated_on = calibration.source if calibration else None
        if figures.verdict:
            manifests.seal(folder, _manifest(source, recipe, calibration, figures), hashes)
        figures.seconds = time.perf_counter() - began
        _report(folder, figures, sensitivity)
    return figures


def _write(
    folder: Path,
    checkpoint: Checkpoint,
    recipe: QuantRecipe,
    windows: Sequence[Tokens],
    scales: Mapping[str, Array],
    progress: Progress,
) -> tuple[Figures, dict[str, str]]:
    """Everything but manifest and report; with the sha256 of each file of weights."""
    infos = checkpoints.plan(checkpoint.spec, recipe, checkpoint.infos)
    figures = Figures(_total(checkpoint.infos), _total(infos), recipe=recipe)
    transform = algorithm(recipe.algorithm).prepare(checkpoint, recipe, windows) if recipe.weights else None
    stream = _stream(checkpoint, recipe, transform, scales, figures, progress)
    hashes = checkpoints.write(folder, checkpoint.spec, infos, lambda name: _next(stream, name), recipe=recipe)
    checkpoint.copy_companions(folder)
    return figures, hashes


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _report(folder: Path, figures: Figures, sensitivity: Mapping[str, float]) -> None:
    """The figures for machines, and for people a picture of them where matplotlib is installed."""
    figures.peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    (folder / "report.json").write_text(json.dumps(figures.report(), indent=1) + "\n", encoding="utf-8")
    if figures.errors and installed("matplotlib"):
        from llmc.quant import picture

        picture.draw(figures.errors, sensitivity, folder / "report.png")


def _manifest(
    source: Path, recipe: QuantRecipe, calibration: Calibration | None, figures: Figures
) -> manifests.Manifest:
    parents = [manifests.parent(source)]
    settings = {"recipe": recipe.model_dump(mode="json")}
    if calibration:
        parents.append(calibration.parent())
        settings["calibration"] = {"window": calibration.window, "tokens": calibration.tokens}
    notes: dict[str, Any] = {"mean_error": round(figures.mean_error, 4)} if figures.errors else {}
    if figures.verdict:
        notes["quality"] = figures.verdict.figures()
    uses_torch = calibration or figures.verdict
    return manifests.Manifest(
        kind="checkpoint",
        tools=manifests.tools("numpy", *(["torch"] if uses_torch else [])),
        settings=settings,
        parents=tuple(parents),
        notes=notes,
    )


def check_recipe(checkpoint: Checkpoint, recipe: QuantRecipe) -> QuantRecipe:
    """Refuse what would quietly do something else than was asked for.

    Returns:
        The recipe with the algorithm's options written out.

    Raises:
        UserError: The checkpoint is quantized already, a glob fits no matrix, no matrix is left to quantize, or the
            algorithm does not know an option.
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
    if recipe.weights is None:
        return recipe
    module = algorithm(recipe.algorithm)
    check_formats(recipe)
    options = parse(module.Options, recipe.options, where=f"options of {recipe.algorithm}")
    recipe = recipe.model_copy(update={"options": options.model_dump()})
    complete = getattr(module, "complete", None)
    return complete(checkpoint, recipe) if complete else recipe


def _no_such_matrix(glob: str, matrices: Sequence[str]) -> str:
    near = difflib.get_close_matches(glob, [*matrices, *names.kinds(matrices)], n=1)
    hint = f" (did you mean '{near[0]}'?)" if near else ""
    tied = " The head of this model is its embedding: keep 'embed'." if glob == "head" else ""
    return f"no matrix fits '{glob}'{hint}.{tied} There are {', '.join(names.kinds(matrices))}"


def _needed(recipe: QuantRecipe, calibration: Calibration | None) -> Calibration | None:
    """The calibration text, None where nothing looks at it.

    Raises:
        UserError: A text was given and nothing looks at it.
    """
    is_static = bool(recipe.activations and not recipe.activations.dynamic)
    calibrates = bool(recipe.weights and (is_static or algorithm(recipe.algorithm).CALIBRATES))
    if calibrates or recipe.kv_cache:
        need("torch")
        return calibration or Calibration()
    if calibration and calibration.path:
        raise UserError("nothing in this recipe is calibrated: leave --calibration out", param="calibration")
    return None


def _windows(checkpoint: Checkpoint, calibration: Calibration) -> list[Tokens]:
    tokenizer = Tokenizer.load(checkpoint.folder)
    window = min(calibration.window, checkpoint.spec.max_positions)
    return text.windows(calibration.read(), tokenizer, window, limit=calibration.tokens)


def _kv_scales(checkpoint: Checkpoint, windows: Sequence[Tokens], progress: Progress) -> dict[str, Array]:
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
            if found.error is None:
                figures.errors[module] = relative_error(values, found, weight_format)
            else:
                figures.errors[module], figures.error_kind = found.error, "outputs on the calibration text"
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
