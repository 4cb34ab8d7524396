"""A quantized checkpoint as a folder that other projects load, its codes unchanged: one walk for every layout.

    canonical codes ─► [the family's operation on rows] ─► Matrix ─► layout ─► qweight, scales ...

What the layout has no place for stands there as the numbers that it means, in the model's own type, and a warning
says which and why: embedding and head always (what loads these files keeps both so), and linears whose group, size or
zero points the layout does not know. Where nothing is left to pack, there is no folder.

Knows: rules and checkpoints. Does not know: any layout (layouts/), nor any family. One linear is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from llmc import names
from llmc.checkpoint import Checkpoint
from llmc.converters import hf, native
from llmc.converters.layouts import SCATTERED, Grid, Layout, Linear, Matrix, middle
from llmc.converters.rules import Bound, Family, Progress, bind, source_names
from llmc.errors import CheckpointError, UserError
from llmc.log import logger
from llmc.manifest import Manifest
from llmc.quant import pack
from llmc.recipe import BLOCKS, QuantRecipe, WeightFormat
from llmc.spec import ModelSpec
from llmc.tensors import Array, TensorInfo

_OUTSIDE = "a quantized embedding or head"
# What layouts for other sorts of linears have no place for.
_SORTS = {"weights": "weights alone", "rounded": "rounded inputs and float8"}
_SORTS |= {kind: f"{kind} weights (the format modelopt has)" for kind in BLOCKS}


@dataclass(frozen=True, slots=True)
class _Item:
    """A tensor of the family, and what becomes of it.

    Attributes:
        linear: How it is packed; None: as floating-point numbers.
        reason: Why it is not packed, though it is quantized.
    """

    bound: Bound
    linear: Linear | None = None
    reason: str | None = None

    @property
    def module(self) -> str:
        """Its module, as the family names it."""
        return self.bound.theirs.removesuffix(".weight")

    @property
    def is_in_layer(self) -> bool:
        return self.bound.ours[0].startswith("layers.")


def export(
    layouts: Sequence[Layout], folder: Path, out: Path, *, overwrite: bool = False, progress: Progress | None = None
) -> Manifest:
    """Write a quantized checkpoint as a Hugging Face folder with packed weights.

    Args:
        layouts: Variants of one format, the first called what people call all of them; the first that holds most of the
            checkpoint's linears is taken.

    Raises:
        ManifestError: `folder` is not a checkpoint.
        UserError: Its weights are not quantized, the format has no place for any of its linears, or `out` exists.
        CheckpointError: A scale is beyond the range of the layout's type.
    """
    found = Checkpoint(folder)
    recipe = found.recipe
    if recipe is None or recipe.weights is None:
        raise UserError(
            f"the weights of {folder} are not quantized, and this format is for those that are: "
            f"llmc quantize {folder} OUT, and export OUT (or export {folder} with --format hf)"
        )
    if recipe.shifted:
        raise UserError(
            f"inputs of {folder} are shifted before they are rounded, which no format has a place for: llmc "
            "build-engine has, or quantize without --shift"
        )
    form, (family, spec) = layouts[0].name, native.form(found, ours=False)
    planned = [(layout, _items(layout, family, spec, recipe, found)) for layout in layouts]
    layout, items = max(planned, key=lambda plan: sum(item.linear is not None for item in plan[1]))
    linears = {item.module: item.linear for item in items if item.linear}
    if not linears:
        met = dict.fromkeys(
            item.reason for _, tried in planned for item in tried if item.reason not in (None, _OUTSIDE)
        )
        # What a layout that is meant for such a checkpoint says, if there is one.
        reasons = [reason for reason in met if reason not in _SORTS.values()] or list(met)[:1]
        reasons = reasons or ["linears outside the layers"]
        raise UserError(
            f"the format {form} holds no linear of {folder}: it has no place for {'; '.join(map(str, reasons))}"
        )
    dtype = found.infos["layers.0.attn_norm.weight"].dtype
    notes = _notes(form, layout, items, found, dtype)
    kept = [
        item.module for item in items if item.linear is None and item.is_in_layer and len(item.bound.shapes[0]) == 2
    ]
    config, files = layout.write(linears, kept, _outside(family, spec))
    infos, stream = _infos(layout, items, dtype, found), _stream(layout, items, found, dtype, notes, progress)
    made = hf.write_folder(
        found, family, spec, out, infos, stream,
        quantization=config, files=files, settings={"layout": layout.name}, notes=notes, overwrite=overwrite,
    )  # fmt: skip
    if (scales := notes["scales"])["rounded"]:
        lost = f"by at most {scales['most']:.2%}"
        logger.warning(f"{scales['rounded']} of {scales['of']} scales are rounded to {scales['type']}, {lost}")
    return made


def _items(layout: Layout, family: Family, spec: ModelSpec, recipe: QuantRecipe, found: Checkpoint) -> list[_Item]:
    """Every tensor of the family; what a layout without mixtures has packed has the most frequent grid."""
    items = [_item(layout, bound, recipe, found) for bound in bind(family.rules, spec)]
    grids = [item.linear.grid for item in items if item.linear]
    if layout.mixes or not grids:
        return items
    main = max(dict.fromkeys(grids), key=grids.count)
    other = "a second number of bits or size of group"
    rest = {item.module for item in items if item.linear and item.linear.grid != main}
    return [replace(item, linear=None, reason=other) if item.module in rest else item for item in items]


def _item(layout: Layout, bound: Bound, recipe: QuantRecipe, found: Checkpoint) -> _Item:
    forms = {_form(name, shape, recipe) for name, shape in zip(bound.ours, bound.shapes, strict=True)}
    if forms == {None}:
        return _Item(bound)
    form = next(iter(forms))
    if not _Item(bound).is_in_layer:
        return _Item(bound, reason=_OUTSIDE)
    if len(forms) > 1 or form is None:
        return _Item(bound, reason="linears in one whose formats differ")
    module = bound.ours[0].removesuffix(".weight")
    inputs = recipe.inputs_of(module)
    if recipe.is_multiplied(module) and layout.multiply is None:
        return _Item(bound, reason="inputs that are multiplied before they are rounded")
    orders = [found.get(f"{name.removesuffix('weight')}input_order") for name in bound.ours]
    if orders[0] is not None and layout.groups is None:
        return _Item(bound, reason=SCATTERED)
    if len({None if order is None else order.tobytes() for order in orders}) > 1:
        return _Item(bound, reason="linears in one whose groups are of different inputs")
    grid = Grid(form.bits, form.group_size or None, form.symmetric, form.kind, form.per_tensor, inputs)
    if layout.holds != grid.sort:
        return _Item(bound, reason=_SORTS[grid.kind if grid.sort == "blocks" else grid.sort])
    if form.per_tensor and len(bound.ours) > 1:
        return _Item(bound, reason="linears in one with a scale each")
    rows, columns = sum(shape[0] for shape in bound.shapes), bound.shapes[0][1]
    turned, multiplied = bound.rule.op.rows is not None, recipe.is_multiplied(module)
    linear = Linear(rows, columns, grid, turned, multiplied, orders[0] is not None)
    reason = layout.lacks(linear)
    return _Item(bound, reason=reason) if reason else _Item(bound, linear)


def _form(name: str, shape: names.Shape, recipe: QuantRecipe) -> WeightFormat | None:
    return recipe.format_of(name.removesuffix(".weight")) if names.is_matrix(name, shape) else None


def _outside(family: Family, spec: ModelSpec) -> list[str]:
    """The modules of embedding and head; a tied model has a module for its head as well."""
    theirs = source_names(family.rules, spec.model_copy(update={"tied": False}))
    return [theirs[name].removesuffix(".weight") for name in ("embed.weight", "head.weight")]


def _notes(
    form: str, layout: Layout, items: Sequence[_Item], found: Checkpoint, dtype: np.dtype[Any]
) -> dict[str, Any]:
    """For the manifest, and told at once: what is not packed; and what the scales lose, which is counted later."""
    in_full: dict[str, list[str]] = {}
    for item in items:
        if item.reason:
            in_full.setdefault(item.reason, []).append(item.module)
    for reason, modules in in_full.items():
        shown = ", ".join(modules[:3]) + (f" and {len(modules) - 3} more" if len(modules) > 3 else "")
        logger.warning(f"the format {form} has no place for {reason}: {shown} dequantized, as {dtype}")
    if found.recipe and found.recipe.kv_cache:
        logger.warning(f"the format {form} has no place for the scales of an int8 KV cache: left out")
    scale = layout.plan(next(item.linear for item in items if item.linear))[layout.scale].dtype
    return {"in_full": in_full, "scales": {"type": str(scale), "of": 0, "rounded": 0, "most": 0.0}}


def _infos(layout: Layout, items: Sequence[_Item], dtype: np.dtype[Any], found: Checkpoint) -> dict[str, TensorInfo]:
    """Every tensor of the folder, in order."""
    infos: dict[str, TensorInfo] = {}
    for item in items:
        bound = item.bound
        if item.linear:
            infos |= {f"{item.module}.{suffix}": info for suffix, info in layout.plan(item.linear).items()}
        else:
            own = dtype if item.reason else found.infos[bound.ours[0]].dtype
            infos[bound.theirs] = TensorInfo(own, bound.rule.op.source_shape(bound.shapes))
    return infos


def _stream(
    layout: Layout,
    items: Sequence[_Item],
    found: Checkpoint,
    dtype: np.dtype[Any],
    notes: dict[str, Any],
    progress: Progress | None,
) -> Iterator[tuple[str, Array]]:
    """Every tensor of the folder, in the order of `_infos`."""
    for done, item in enumerate(items):
        bound = item.bound
        if item.linear:
            matrix = _matrix(found, item, item.linear)
            if layout.holds != "blocks":  # whose scales are not float32
                _count(matrix.scale, notes["scales"], item.module)
            yield from ((f"{item.module}.{suffix}", part) for suffix, part in layout.pack(matrix, item.linear).items())
        else:
            parts = [_dense(found, name, dtype) for name in bound.ours]
            yield bound.theirs, bound.rule.op.join(parts, found.spec)
        if progress:
            progress("export", done + 1, len(items))


def _matrix(found: Checkpoint, item: _Item, linear: Linear) -> Matrix:
    """The linear of a file, of the canonical ones that are in it."""
    bits, size = linear.grid.bits, linear.grid.group_size or linear.in_features
    join = (item.bound.rule.op.rows or item.bound.rule.op).join
    modules = [name.removesuffix(".weight") for name in item.bound.ours]
    stored = [found[f"{module}.qweight"].view(np.uint8) for module in modules]
    codes = [pack.unpack_codes(part, bits, linear.groups * size) for part in stored]
    scale = [found[f"{module}.scale"] for module in modules]
    whole = join([part[:, : linear.in_features] for part in codes], found.spec)
    order, groups = found.get(f"{modules[0]}.input_order"), None
    if order is not None:
        back = np.argsort(order)
        whole, groups = np.take(whole, back, axis=1), linear.runs[back]
    if linear.grid.symmetric:
        # Linears in one read the same input, and treat it alike (llmc/quant/inputs.py).
        input_scale, multiply = (found.get(f"{modules[0]}.{kind}") for kind in ("input_scale", "input_multiply"))
        scale_2 = _scale_2(found, modules)
        return Matrix(whole, join(scale, found.spec), middle(linear), input_scale, multiply, groups, scale_2)
    zero = [pack.unpack_codes(found[f"{module}.zero"], bits, linear.groups) for module in modules]
    return Matrix(whole, join(scale, found.spec), join(zero, found.spec), groups=groups)


def _scale_2(found: Checkpoint, modules: Sequence[str]) -> Array | None:
    """Of linears in one: llmc quantizes what engines multiply as one by the same.

    Raises:
        CheckpointError: They differ.
    """
    scales = [found[name] for module in modules if (name := f"{module}.scale_2") in found]
    if any(scale != scales[0] for scale in scales):
        raise CheckpointError(f"{found.folder}: {' and '.join(modules)} are one linear, and their 'scale_2' differ")
    return scales[0] if scales else None


def _dense(found: Checkpoint, name: str, dtype: np.dtype[Any]) -> Array:
    """A canonical tensor as numbers: as it is, or what its codes mean."""
    if name in found:
        return found[name]
    module = name.removesuffix(".weight")
    form = found.recipe.format_of(module) if found.recipe else None
    if form is None:
        raise CheckpointError(f"{found.folder} has no tensor '{name}'")
    columns = names.tensors(found.spec)[name][1]
    qweight, scale, scale_2 = found[f"{module}.qweight"], found[f"{module}.scale"], _scale_2(found, [module])
    zero, order = found.get(f"{module}.zero"), found.get(f"{module}.input_order")
    values = pack.dequantize(qweight, scale, zero, form, columns, order=order, scale_2=scale_2)
    if (multiply := f"{module}.input_multiply") in found:
        values *= found[multiply]
    return values.astype(dtype, copy=False)


def _count(scale: Array, counted: dict[str, Any], module: str) -> None:
    """Add what a linear's scales lose in the layout's type.

    Raises:
        CheckpointError: One is beyond its range.
    """
    with np.errstate(over="ignore"):
        stored = scale.astype(counted["type"]).astype(np.float32)
    if not np.isfinite(stored).all():
        raise CheckpointError(f"'{module}' has scales beyond the range of {counted['type']}")
    changes = np.abs(stored - scale) / np.abs(scale).clip(np.finfo(np.float32).tiny)
    counted["of"] += scale.size
    counted["rounded"] += int(np.count_nonzero(changes))
    counted["most"] = max(counted["most"], float(changes.max()))
