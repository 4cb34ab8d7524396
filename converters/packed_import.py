"""Packed weights of a Hugging Face folder as canonical ones, without dequantizing: the way back of packed_export.py.

    quantization_config ─► layout, grids ─► recipe         qweight, scales ... ─► Matrix ─► rows ─► canonical codes

Codes, zero points and scales stay what they are. Groups that are scattered over the inputs become runs of inputs in
another order, which is kept beside them. A group that is larger than a recipe can say becomes several with the
same scale, and zero points that all stand in the middle are left out: both mean the same numbers. Tensors that are not
packed are read as from any folder.

Knows: rules, and what a recipe can say. Does not know: any layout (layouts/), nor any family. One tensor of the source
is in memory at a time.
"""

from __future__ import annotations

import fnmatch
import importlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from llmc import checkpoint, json_file, names
from llmc.converters import cast
from llmc.converters.layouts import INT32, Grid, Layout, Linear, Matrix
from llmc.converters.rules import Bound, Tensors, through
from llmc.errors import ArtifactError, CheckpointError, UnsupportedModelError
from llmc.quant.pack import Bytes, Packed, pack_codes
from llmc.recipe import BLOCKS, FP8, QuantRecipe, WeightFormat
from llmc.spec import ModelSpec
from llmc.tensors import Array, TensorInfo, read_tensor

CONFIG_KEY, MODELOPT_FILE = "quantization_config", "hf_quant_config.json"

# quant_method -> the module that reads it.
METHODS = {
    "gptq": "llmc.converters.layouts.gptq",
    "awq": "llmc.converters.layouts.awq",
    "compressed-tensors": "llmc.converters.layouts.compressed_tensors",
    "modelopt": "llmc.converters.layouts.modelopt",
}
_SIZES: tuple[int, ...] = tuple(size for size in get_args(WeightFormat.model_fields["group_size"].annotation) if size)
_ROW = 128  # the size of the groups that a row with one scale becomes


@dataclass(frozen=True, slots=True)
class Packing:
    """How the weights of a folder are packed, as its config says.

    Attributes:
        method: The config's `quant_method`.
        grid: A module's name in the folder -> its grid; whether it is symmetric is seen when it is read.
    """

    method: str
    layout: Layout
    grid: Callable[[str], Grid]


def find(folder: Path, config: Mapping[str, Any]) -> Packing | None:
    """How the weights of a folder are packed; None when its config says of no quantization.

    Raises:
        UnsupportedModelError: In a way that llmc does not read.
    """
    quantization, where = config.get(CONFIG_KEY), f"{folder / 'config.json'}: {CONFIG_KEY}"
    if (folder / MODELOPT_FILE).is_file():
        # Which says more than modelopt's own config.json.
        found = json_file.read(folder / MODELOPT_FILE).get("quantization")
        quantization, where = {"quant_method": "modelopt", **(found or {})}, str(folder / MODELOPT_FILE)
    if quantization is None:
        return None
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method not in METHODS:
        raise UnsupportedModelError(f"{where}: 'quant_method' is {method!r}: llmc reads {', '.join(METHODS)}")
    layout, grid = importlib.import_module(METHODS[method]).read(quantization, where)
    return Packing(method, layout, grid)


@dataclass(frozen=True, slots=True)
class _Source:
    """A packed linear of the folder, and the canonical ones that are in it.

    Attributes:
        form: Of each of them.
    """

    bound: Bound
    linear: Linear
    tensors: Mapping[str, TensorInfo]
    form: WeightFormat

    @property
    def modules(self) -> list[str]:
        """Canonical names of its linears."""
        return [name.removesuffix(".weight") for name in self.bound.ours]


def to_canonical(
    packing: Packing,
    bound: Iterable[Bound],
    spec: ModelSpec,
    infos: Mapping[str, TensorInfo],
    *,
    dtype: np.dtype[Any] | None,
    dropped: Iterable[str] = (),
    where: object,
) -> tuple[QuantRecipe, Tensors]:
    """See a folder's tensors, packed and other, as those of a quantized checkpoint.

    Args:
        bound: The family's rules for this model.
        infos: The folder's tensors.
        dtype: Of the tensors that are not packed; None leaves each in its own.
        dropped: Globs over the folder's names of tensors to pass over.

    Raises:
        CheckpointError: A tensor is missing, unknown or misshapen.
        UnsupportedModelError: Something is packed that llmc keeps in full, or in a way that a recipe cannot say.
    """
    left = {name: info for name, info in infos.items() if not any(fnmatch.fnmatchcase(name, glob) for glob in dropped)}
    sources, plain = [], []
    for item in bound:
        found = _open(packing, item, left, where)
        for name in found.tensors if found else ():
            del left[name]
        sources += [found] if found else []
        plain += [] if found else [item]
    if not sources:
        raise CheckpointError(f"{where} says that its weights are packed ({packing.method}), and none is")
    left = _without_empty_biases(left, {item.theirs for item in plain}, sources)
    expected = {item.theirs: item.rule.op.source_shape(item.shapes) for item in plain}
    checkpoint.check(expected, {name: info.shape for name, info in left.items()}, where=where)
    stored = cast.on_disk(left, dtype)
    sources = _with_order(packing.layout, _with_symmetry(packing.layout, sources))
    recipe = _recipe(packing, sources, spec, where)
    return recipe, _tensors(packing.layout, sources, plain, stored, recipe, spec)


def _open(packing: Packing, item: Bound, infos: Mapping[str, TensorInfo], where: object) -> _Source | None:
    """A tensor of the family as a packed linear; None when it is not packed."""
    module = item.theirs.removesuffix(".weight")
    layout = packing.layout
    if f"{module}.{layout.scale}" not in infos or module == item.theirs:
        return None
    if not all(names.is_matrix(name, shape) for name, shape in zip(item.ours, item.shapes, strict=True)):
        raise UnsupportedModelError(f"{where}: '{module}' is packed, and llmc keeps such a tensor in full")
    rows, columns = sum(shape[0] for shape in item.shapes), item.shapes[0][1]
    multiplied, ordered = (f"{module}.{suffix}" in infos for suffix in (layout.multiply, layout.groups))
    linear = Linear(rows, columns, packing.grid(module), item.rule.op.rows is not None, multiplied, ordered)
    plan = layout.plan(linear)
    found = {suffix: infos[f"{module}.{suffix}"] for suffix in plan if f"{module}.{suffix}" in infos}
    for suffix, info in plan.items():
        name = f"{module}.{suffix}"
        if suffix not in found and suffix not in layout.optional:
            raise CheckpointError(f"{where}: the tensor '{name}' {list(info.shape)} is missing")
        met = found.get(suffix, info)
        if met.shape != info.shape and not math.prod(met.shape) == math.prod(info.shape) == 1:
            raise CheckpointError(f"{where}: '{name}' has shape {list(met.shape)}, expected {list(info.shape)}")
        if met.dtype != info.dtype and not {met.dtype, info.dtype} <= set(cast.FLOATS.values()):
            raise CheckpointError(f"{where}: '{name}' is {met.dtype}, expected {info.dtype}")
    if linear.grid.inputs and not item.ours[0].startswith("layers."):
        raise UnsupportedModelError(
            f"{where}: the inputs of '{module}' are rounded, and llmc rounds those of layers alone"
        )
    return _Source(
        item, linear, {f"{module}.{suffix}": info for suffix, info in found.items()}, _form(linear, module, where)
    )


def _form(linear: Linear, module: str, where: object) -> WeightFormat:
    """Its format; whether it is symmetric is seen when it is read."""
    grid = linear.grid
    if grid.kind == "fp8":
        return WeightFormat(kind="fp8", bits=8, group_size=0, per_tensor=grid.per_tensor)
    if blocks := BLOCKS.get(grid.kind):
        return WeightFormat(kind=grid.kind, bits=blocks.bits, group_size=blocks.size)
    if grid.inputs and grid.group_size is None:
        return WeightFormat(bits=8, group_size=0)
    return WeightFormat(bits=grid.bits, group_size=_size(linear, module, where), symmetric=False)  # type: ignore[arg-type]


def _size(linear: Linear, module: str, where: object) -> int:
    """The size of group of a recipe that says the same: theirs, or one that divides it."""
    theirs = linear.grid.group_size
    if theirs is None:
        return _ROW
    fitting = [size for size in _SIZES if theirs % size == 0]
    if not fitting:
        raise UnsupportedModelError(
            f"{where}: '{module}' has groups of {theirs} inputs: llmc has {', '.join(map(str, _SIZES))} and multiples"
        )
    return max(fitting)


def _without_empty_biases(
    infos: Mapping[str, TensorInfo], plain: set[str], sources: Iterable[_Source]
) -> dict[str, TensorInfo]:
    """Without the biases of zeros that AutoGPTQ gives linears that have none.

    Raises:
        CheckpointError: One is not zero.
    """
    found = dict(infos)
    for source in sources:
        name = source.bound.theirs.removesuffix("weight") + "bias"
        if name in found and name not in plain and read_tensor(found.pop(name)).astype(np.float32).any():
            raise CheckpointError(f"{infos[name].path}: '{name}' is a bias where this model has none")
    return found


def _with_symmetry(layout: Layout, sources: list[_Source]) -> list[_Source]:
    """Symmetric, if every zero point of the folder stands in the middle, whatever its config says."""
    for source in sources:
        zero = _zero_points(layout, source)
        if zero is not None and (zero != 1 << (source.linear.grid.bits - 1)).any():
            return sources
    return [replace(source, form=source.form.model_copy(update={"symmetric": True})) for source in sources]


def _zero_points(layout: Layout, source: _Source) -> Bytes | None:
    if layout.zeros is None:
        return None
    suffix, unpack = layout.zeros
    info = source.tensors.get(source.bound.theirs.removesuffix("weight") + suffix)
    return unpack(read_tensor(info), source.linear) if info else None


def _with_order(layout: Layout, sources: list[_Source]) -> list[_Source]:
    """Ordered are those linears whose groups are not runs of inputs, whatever the config says.

    Raises:
        CheckpointError: Groups of a linear have other sizes than they should.
    """
    if layout.groups is None:
        return sources
    found = []
    for source in sources:
        name = f"{source.bound.theirs.removesuffix('weight')}{layout.groups}"
        groups = read_tensor(source.tensors[name]) if name in source.tensors else source.linear.runs
        if not np.array_equal(np.sort(groups), source.linear.runs):
            raise CheckpointError(f"{source.tensors[name].path}: '{name}' gives groups of other sizes than its config")
        ordered = not np.array_equal(groups, source.linear.runs)
        found.append(replace(source, linear=replace(source.linear, ordered=ordered)))
    return found


def _recipe(packing: Packing, sources: Sequence[_Source], spec: ModelSpec, where: object) -> QuantRecipe:
    """What was done to the model, as a recipe; who chose the codes is not known."""
    packed = {module: source.form for source in sources for module in source.modules}
    forms = {module: packed.get(module) for module in names.matrices(spec)}
    (main, _), *_ = Counter(packed.values()).most_common()
    others = dict.fromkeys(form for form in packed.values() if form != main)
    inputs = {source.linear.grid.inputs for source in sources}
    if len(inputs) > 1:
        raise UnsupportedModelError(f"{where}: inputs of linears are rounded in several ways: a recipe has one")
    multiplied = {module for source in sources for module in source.modules if source.linear.multiplied}
    ordered = {module for source in sources for module in source.modules if source.linear.ordered}
    return QuantRecipe(
        algorithm="imported",
        weights=main,
        activations=next(iter(inputs)),
        multiplied=_globs({module: module in multiplied for module in forms}, True),
        ordered=_globs({module: module in ordered for module in forms}, True),
        keep=_globs(forms, None),
        overrides={glob: form for form in others for glob in _globs(forms, form)},
        options={"method": packing.method, "layout": packing.layout.name},
    )


def _globs(forms: Mapping[str, object], form: object) -> tuple[str, ...]:
    """Globs that fit the matrices of a form and no others: of a kind in all layers, where all of them have it."""
    left = [module for module, met in forms.items() if met == form]
    found = []
    while left:
        kind = re.sub(r"\b\d+\b", "*", left[0])
        fitting = fnmatch.filter(forms, kind)
        glob, done = (kind, fitting) if all(forms[module] == form for module in fitting) else (left[0], left[:1])
        found.append(glob)
        left = [module for module in left if module not in done]
    return tuple(found)


def _tensors(
    layout: Layout,
    sources: Iterable[_Source],
    plain: list[Bound],
    stored: Tensors,
    recipe: QuantRecipe,
    spec: ModelSpec,
) -> Tensors:
    """Every tensor of the quantized checkpoint."""
    full = through(plain, spec, stored)
    packed = {module: source for source in sources for module in source.modules}
    latest: tuple[_Source | None, dict[str, Array]] = (None, {})

    def load(name: str) -> Array:
        nonlocal latest
        source = packed.get(name.rpartition(".")[0])
        if source is None or name in full.infos:
            return full.load(name)
        if latest[0] is not source:
            latest = (None, {})
            latest = (source, dict(_pieces(layout, source, spec)))
        return latest[1][name]

    return Tensors(checkpoint.plan(spec, recipe, full.infos), load)


def _pieces(layout: Layout, source: _Source, spec: ModelSpec) -> Iterator[tuple[str, Array]]:
    """The canonical tensors of a packed linear."""
    prefix = source.bound.theirs.removesuffix("weight")
    parts = {name.removeprefix(prefix): read_tensor(info) for name, info in source.tensors.items()}
    try:
        matrix = layout.unpack(parts, source.linear)
    except ArtifactError as error:
        raise type(error)(f"'{prefix.removesuffix('.')}': {error}") from None
    op = source.bound.rule.op.rows or source.bound.rule.op

    def split(rows: Array) -> Sequence[Array]:
        return op.split(rows, [(shape[0], rows.shape[1]) for shape in source.bound.shapes], spec)

    by_row = np.broadcast_to(matrix.scale, matrix.zero.shape)
    linears = zip(source.modules, split(matrix.codes), split(by_row), split(matrix.zero), strict=True)
    for module, codes, scale, zero in linears:
        part = replace(matrix, codes=codes, scale=scale, zero=zero)
        yield from _packed(part, source.linear.grid, source.form).pieces(module)


def _packed(matrix: Matrix, grid: Grid, form: WeightFormat) -> Packed:
    """A matrix in a form whose groups divide those of its grid; its scales are those of rows."""
    if form.group_size == 0:
        codes = matrix.codes.view(FP8) if form.kind == "fp8" else matrix.codes
        of_rows = np.ascontiguousarray(matrix.scale[:1] if form.per_tensor else matrix.scale)
        inputs = {"input_multiply": matrix.input_multiply, "input_scale": matrix.input_scale}
        return Packed(codes, of_rows, inputs={kind: found for kind, found in inputs.items() if found is not None})
    blocks = form.blocks
    if blocks:
        codes = pack_codes(matrix.codes, form.bits)
        stored = codes.view(FP8) if blocks.codes == FP8 else codes
        return Packed(stored, np.ascontiguousarray(matrix.scale), scale_2=matrix.scale_2)
    codes, order = matrix.codes, None
    if matrix.groups is not None:
        # Within a group any order would do; this one is found again on the way back.
        order = np.argsort(matrix.groups, kind="stable").astype(INT32)
        codes = np.take(codes, order, axis=1)
    columns = codes.shape[1]
    groups = form.groups(columns)
    theirs = np.arange(groups) * form.group_size // (grid.group_size or columns)
    zero = np.ascontiguousarray(matrix.zero[:, theirs])
    padding = np.repeat(zero[:, -1:], groups * form.width(columns) - columns, axis=1)
    return Packed(
        pack_codes(np.concatenate((codes, padding), axis=1), form.bits),
        np.ascontiguousarray(matrix.scale[:, theirs]),
        None if form.symmetric else pack_codes(zero, form.bits),
        inputs={} if order is None else {"input_order": order},
    )
