"""Quantize a checkpoint: the same steps for every algorithm.

    open source ─► check recipe ─► [calibrate] ─► transform tensor by tensor ─► write ─► [judge] ─► seal, report
                                        ▲                                         │         │
                                        └── more bits, where there is room for them         │
                                        └── more bits, when not good enough ◄───────────────┘

A KV cache is calibrated on the weights that were written, and its scales put beside them: algorithms scale the value
projections, so keys and values are those of the result. A checkpoint that is quantized already can be given one, too.

The folder's manifest has what follows from the inputs alone. report.json and report.png beside it also say how long it
took and how much memory, and are not part of the folder's identity.

Knows: checkpoints, recipes, the table of algorithms. Does not know: how codes are chosen, how results are judged.
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
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

from llmc import checkpoint as checkpoints
from llmc import manifest as manifests
from llmc import names, tensors
from llmc.checkpoint import Checkpoint
from llmc.config import parse
from llmc.errors import CheckpointError, UserError
from llmc.need import installed, need
from llmc.quant import corpus, gate, pack
from llmc.quant.algorithm import Transform, algorithm, check_formats
from llmc.quant.corpus import Calibration, Sample
from llmc.quant.gate import Judge, Probe, Verdict
from llmc.quant.mixed import Level, Mix, bits_by_part, parameters, room
from llmc.quant.pack import Packed
from llmc.recipe import QuantRecipe, WeightFormat
from llmc.runtime import Tokens
from llmc.tensors import Array, TensorInfo
from llmc.tokenizer import Tokenizer

# The algorithm of a recipe whose weights stay as they are.
NONE = "none"

# (what is being done, steps done, steps)
Progress = Callable[[str, int, int], None]


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
        parameters: Of the model.
        parts: Part -> the widths of its matrices, None for those that are kept.
        sensitivity: Part -> KL in nats when it alone has the recipe's bits, where that was looked for.
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
    parameters: int = 0
    parts: dict[str, list[Level]] = field(default_factory=dict)
    sensitivity: Mapping[str, float] = field(default_factory=dict)
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

    @property
    def bits(self) -> float:
        """Of all tensors, scales and what was kept included, for each parameter."""
        return 8 * self.bytes_after / self.parameters

    def report(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        worst = sorted(self.errors, key=lambda name: -self.errors[name])[:10]
        return {
            "recipe": self.recipe.model_dump(mode="json") if self.recipe else None,
            "calibrated_on": self.calibrated_on,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "bits_per_parameter": round(self.bits, 4),
            "bits_by_part": self.parts,
            "sensitivity": dict(self.sensitivity) or None,
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
    probe: Probe | None = None,
    max_increase: float | None = None,
    target_bits: float | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Figures:
    """Write a quantized copy of a checkpoint.

    Args:
        calibration: Needed by some algorithms and for a KV cache; by default some sample text.
        judge: Measures the result.
        probe: Measures what each part of the model costs, on the calibration text.
        max_increase: Of the perplexity, as a share; parts of the model get more bits until it is met. Needs a judge
            and a probe.
        target_bits: For each parameter, scales and all; parts get more bits as long as there is room. Needs a probe.

    Raises:
        UserError: The recipe does not fit the model, or `target` exists.
        GateError: `max_increase` is not met while anything is quantized.
        ArtifactError: `source` is not a whole checkpoint.
    """
    began = time.perf_counter()
    checkpoint = Checkpoint(source)
    recipe = check_recipe(checkpoint, recipe)
    judge = _judge_of(checkpoint, judge, max_increase)
    _check_goal(recipe, max_increase, target_bits, judge, probe)
    if target_bits is not None:
        room(checkpoint, recipe, target_bits)
    manifests.check_target(target, overwrite=overwrite)
    calibration = _needed(recipe, calibration)
    if checkpoint.recipe:
        recipe = checkpoint.recipe.model_copy(update={"kv_cache": recipe.kv_cache})
    with manifests.creating(target, overwrite=overwrite) as folder:
        work = _Work(folder, checkpoint, calibration, progress or (lambda *_: None))
        figures, mix = work.write(recipe), None
        if target_bits is not None and probe:
            mix = work.mix(recipe, probe)
            figures = work.write(mix.fit(target_bits))
        while judge:
            figures.verdict = judge(checkpoint, Checkpoint(folder))
            if max_increase is None or figures.verdict.increase <= max_increase or probe is None:
                break
            mix = mix or work.mix(recipe, probe)
            figures = work.write(gate.refine(mix, figures.verdict, max_increase))
        figures.sensitivity = mix.sensitivity if mix else {}
        work.seal(figures)
        figures.seconds = time.perf_counter() - began
        _report(folder, figures)
    return figures


def _check_goal(
    recipe: QuantRecipe, max_increase: float | None, target_bits: float | None, judge: Judge | None, probe: Probe | None
) -> None:
    if max_increase is None and target_bits is None:
        return
    if max_increase is not None and target_bits is not None:
        raise UserError("--target-bits and --max-ppl-increase both choose the bits: give one", param="target_bits")
    if recipe.weights is None:
        raise UserError("--target-bits and --max-ppl-increase choose the bits of weights: name an --algo", param="algo")
    if probe is None or (max_increase is not None and judge is None):
        raise TypeError("max_increase needs a judge and a probe, target_bits a probe")


class _Work:
    """What all attempts share."""

    def __init__(
        self, folder: Path, checkpoint: Checkpoint, calibration: Calibration | None, progress: Progress
    ) -> None:
        self._folder, self._checkpoint, self._progress = folder, checkpoint, progress
        self._calibration = calibration
        self._sample = self._read(calibration) if calibration else Sample((), "")
        self._hashes: dict[str, str] = {}

    def _read(self, calibration: Calibration) -> Sample:
        spec = self._checkpoint.spec
        return corpus.read(calibration, Tokenizer.load(self._checkpoint.folder), spec.max_positions)

    def write(self, recipe: QuantRecipe) -> Figures:
        """Everything but the reports, in place of what was there."""
        _clear(self._folder)
        figures = Figures(_total(self._checkpoint.infos), 0, recipe=recipe)
        figures.parameters = parameters(self._checkpoint.spec)
        figures.parts = bits_by_part(self._checkpoint.spec, recipe)
        figures.calibrated_on = self._sample.source or None
        if recipe.kv_cache is None:
            self._hashes = self._quantize(recipe, self._folder, figures)
        else:
            self._hashes = self._give_cache(recipe, figures)
        figures.bytes_after = _total(tensors.read_folder(self._folder))
        self._checkpoint.copy_companions(self._folder)
        self.seal(figures)
        return figures

    def _quantize(self, recipe: QuantRecipe, folder: Path, figures: Figures) -> dict[str, str]:
        """Write the weights; returns the hashes of files."""
        checkpoint = self._checkpoint
        infos = checkpoints.plan(checkpoint.spec, recipe, checkpoint.infos)
        transform = algorithm(recipe.algorithm).prepare(checkpoint, recipe, self._sample.windows)
        stream = _stream(checkpoint, recipe, transform, figures, self._progress)
        load = functools.partial(_next, stream)
        return checkpoints.write(folder, checkpoint.spec, infos, load, recipe=recipe)

    def _give_cache(self, recipe: QuantRecipe, figures: Figures) -> dict[str, str]:
        """Write weights, and with them the scales of a KV cache that were calibrated on them."""
        solved, unfinished = self._checkpoint, self._folder / "weights"
        if recipe.weights and solved.recipe is None:
            unfinished.mkdir()
            hashes = self._quantize(recipe.model_copy(update={"kv_cache": None}), unfinished, figures)
            manifests.seal(unfinished, manifests.Manifest(kind="checkpoint", tools={}), hashes)
            solved = Checkpoint(unfinished)
        else:
            figures.kept = [name for name in names.matrices(solved.spec) if not recipe.format_of(name)]
        scales = _kv_scales(solved, recipe, self._sample.windows, self._progress)
        infos = checkpoints.plan(solved.spec, recipe, solved.infos)

        def load(name: str) -> Array:
            return scales[name] if name in scales else solved[name]

        hashes = checkpoints.write(self._folder, solved.spec, infos, load, recipe=recipe)
        shutil.rmtree(unfinished, ignore_errors=True)
        return hashes

    def mix(self, recipe: QuantRecipe, probe: Probe) -> Mix:
        """What each part costs with the recipe that was written."""
        windows = self._sample.windows or self._read(Calibration()).windows
        sensitivity = probe(self._checkpoint, Checkpoint(self._folder), gate.probes(windows))
        return Mix(self._checkpoint, recipe, sensitivity)

    def seal(self, figures: Figures) -> None:
        """Write the manifest."""
        found = _manifest(self._checkpoint.folder, self._calibration, figures)
        manifests.seal(self._folder, found, self._hashes)


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _report(folder: Path, figures: Figures) -> None:
    """The figures for machines, and for people a picture of them where matplotlib is installed."""
    figures.peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    (folder / "report.json").write_text(json.dumps(figures.report(), indent=1) + "\n", encoding="utf-8")
    if figures.errors and installed("matplotlib"):
        from llmc.quant import picture

        picture.draw(figures.errors, figures.sensitivity, figures.parts, folder / "report.png")


def _manifest(source: Path, calibration: Calibration | None, figures: Figures) -> manifests.Manifest:
    parents = [manifests.parent(source)]
    settings = {"recipe": figures.recipe.model_dump(mode="json") if figures.recipe else None}
    if calibration:
        parents += calibration.parents()
        settings["calibration"] = {"window": calibration.window, "tokens": calibration.tokens}
    notes: dict[str, Any] = {"mean_error": round(figures.mean_error, 4)} if figures.errors else {}
    if figures.verdict:
        notes["quality"] = figures.verdict.figures()
    if figures.sensitivity:
        notes["sensitivity"] = {part: round(kl, 6) for part, kl in figures.sensitivity.items()}
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
        UserError: The checkpoint is quantized already and not a KV cache alone is asked for, a glob fits no matrix, no
            matrix is left to quantize, or the algorithm does not know an option.
    """
    if checkpoint.recipe is not None and (recipe.weights or checkpoint.recipe.kv_cache):
        raise UserError(
            f"{checkpoint.folder} is quantized already (by {checkpoint.recipe.algorithm}): "
            "quantize the checkpoint that it was made from, with everything you want in one command; "
            "what can be added is an 8-bit KV cache, by --algo none --kv-cache int8"
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


def _judge_of(checkpoint: Checkpoint, judge: Judge | None, max_increase: float | None) -> Judge | None:
    """Perplexity is of models that predict tokens."""
    if checkpoint.spec.score is None:
        return judge
    if max_increase is not None:
        raise UserError(f"{checkpoint.folder} gives scores: it has no perplexity to limit", param="max_ppl_increase")
    return None


def _needed(recipe: QuantRecipe, calibration: Calibration | None) -> Calibration | None:
    """The calibration text, None where nothing looks at it.

    Raises:
        UserError: A text was given and nothing looks at it.
    """
    is_static = bool(recipe.activations and not recipe.activations.dynamic)
    calibrates = bool(recipe.weights and (is_static or algorithm(recipe.algorithm).CALIBRATES))
    observed = recipe.kv_cache is not None and recipe.kv_cache.scale != "dynamic"
    if calibrates or observed:
        need("torch")
        return calibration or Calibration()
    if calibration and calibration.paths:
        raise UserError("nothing in this recipe is calibrated: leave --calibration out", param="calibration")
    return None


def _kv_scales(
    checkpoint: Checkpoint, recipe: QuantRecipe, windows: Sequence[Tokens], progress: Progress
) -> dict[str, Array]:
    """Of a KV cache whose scales are stored."""
    if recipe.kv_cache is None or recipe.kv_cache.scale == "dynamic":
        return {}
    from llmc.quant import calibrate

    tell = functools.partial(progress, "calibrating the KV cache")
    return dict(calibrate.kv_scales(checkpoint, recipe.kv_cache, windows, tell))


def _stream(
    checkpoint: Checkpoint,
    recipe: QuantRecipe,
    transform: Transform,
    figures: Figures,
    progress: Progress,
) -> Iterator[tuple[str, Array]]:
    """Every tensor of the quantized checkpoint in the order of its plan, one matrix in memory at a time."""
    for done, name in enumerate(checkpoint):
        module = name.rpartition(".")[0]
        is_matrix = names.is_matrix(name, checkpoint.infos[name].shape)
        weight_format = recipe.format_of(module) if is_matrix else None
        values = checkpoint[name]
        found = transform(name, values, weight_format)
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
