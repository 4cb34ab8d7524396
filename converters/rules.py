"""Rules: which tensor of a source is which canonical tensor, as data that is read in both directions.

    Rule("layers.{layer}.attn.q.weight", "model.layers.{layer}.self_attn.q_proj.weight")

A rule holds for every layer of the model (`{layer}`), for every expert of a layer (`{expert}`), and for a model that
has its canonical tensors: the rules of the biases fall away where a spec has none, the rule of the head where it is
tied. Most tensors are the `SAME` on both sides. An
operation stands between those that are not: it may turn one tensor into another, or cut a fused one into several
(`ours` is a tuple for that), and it must be exact both ways.

Knows: names, shapes and how tensors map. Does not know: where the source's tensors lie, nor any family.
"""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llmc import checkpoint, names
from llmc.converters.reader import Reader
from llmc.errors import CheckpointError
from llmc.names import Shape
from llmc.spec import ModelSpec
from llmc.tensors import Array, TensorInfo


@dataclass(frozen=True, slots=True)
class Op:
    """How a source's tensor becomes the canonical ones of its rule, and back; each the other's exact inverse.

    Attributes:
        split: (source tensor, canonical shapes, spec) -> canonical tensors.
        join: (canonical tensors, spec) -> source tensor.
        source_shape: Canonical shapes -> the shape that the source must have.
        rows: The operation on tensors of one row an output, where the source does not keep linears so; None: this one.
    """

    split: Callable[[Array, Sequence[Shape], ModelSpec], Sequence[Array]]
    join: Callable[[Sequence[Array], ModelSpec], Array]
    source_shape: Callable[[Sequence[Shape]], Shape]
    rows: Op | None = None


SAME = Op(
    split=lambda source, _shapes, _spec: [source],
    join=lambda parts, _spec: parts[0],
    source_shape=lambda shapes: shapes[0],
)


@dataclass(frozen=True, slots=True)
class Rule:
    """One tensor of the source, or of each of its layers and experts where the names hold `{layer}` and `{expert}`.

    Attributes:
        ours: Canonical name; a tuple when the source has several fused into one.
        theirs: The source's name.
    """

    ours: str | tuple[str, ...]
    theirs: str
    op: Op = SAME

    @property
    def parts(self) -> tuple[str, ...]:
        return (self.ours,) if isinstance(self.ours, str) else self.ours


@dataclass(frozen=True, slots=True)
class Family:
    """A model family, as its authors publish it on Hugging Face.

    Attributes:
        name: Also the `family` of its specs.
        architectures: What `architectures` says in its configs.
        read: The authors' config -> spec; raises UnsupportedModelError for what a spec cannot say.
        write: Spec -> such a config, without tokens and dtype; `read(write(spec)) == spec`.
        rules: All tensors.
        dropped: Globs over the source's names of tensors that carry nothing, such as tables that are recomputed.
        prefix: With which all names but the head's begin, and which a folder may lack: transformers saves the model
            under the head without it.
        positions: The kinds of position (llmc/spec.py) that its models have.
        native: The family whose class in transformers computes most models of this one: its own (""), or another,
            where transformers has none of its own; None where it has none at all.
        sign: A setting that its configs switch on, where another family has the same architectures.
        scored: Its class with a scoring head in transformers, where that is not called like its others.
    """

    name: str
    architectures: tuple[str, ...]
    read: Callable[[Reader], ModelSpec]
    write: Callable[[ModelSpec], dict[str, Any]]
    rules: tuple[Rule, ...]
    dropped: tuple[str, ...] = ()
    prefix: str = ""
    positions: tuple[str, ...] = ("rope",)
    native: str | None = ""
    sign: str = ""
    scored: str = ""


# Called as (what is being done, tensors done, tensors in all).
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Tensors:
    """A set of tensors that are not in memory: what each is, and how to get one."""

    infos: Mapping[str, TensorInfo]
    load: Callable[[str], Array]

    def watched(self, what: str, progress: Progress | None) -> Callable[[str], Array]:
        """`load`, telling `progress` of each tensor that it gives."""
        done = 0

        def load(name: str) -> Array:
            nonlocal done
            values = self.load(name)
            done += 1
            if progress:
                progress(what, done, len(self.infos))
            return values

        return load


@dataclass(frozen=True, slots=True)
class Bound:
    """A rule for one layer of one model."""

    rule: Rule
    theirs: str
    ours: tuple[str, ...]
    shapes: tuple[Shape, ...]


def bind(rules: Iterable[Rule], spec: ModelSpec) -> list[Bound]:
    """The rules that hold for a model, layer by layer.

    Raises:
        CheckpointError: The rules leave out a canonical tensor of this spec, or give one twice: the family cannot
            say this model.
    """
    shapes = names.tensors(spec)
    bound: list[Bound] = []
    given: set[str] = set()
    for rule in rules:
        for place in _places(rule.theirs, spec):
            ours = tuple(part.format(**place) for part in rule.parts)
            if not all(name in shapes for name in ours):
                continue
            bound.append(Bound(rule, rule.theirs.format(**place), ours, tuple(shapes[name] for name in ours)))
            if repeated := given.intersection(ours):
                raise CheckpointError(f"the rules give the tensor '{min(repeated)}' twice")
            given.update(ours)
    if left_out := [name for name in shapes if name not in given]:
        raise CheckpointError(f"the family '{spec.family}' has no rule for the tensor '{left_out[0]}'")
    return bound


def _places(theirs: str, spec: ModelSpec) -> Iterator[dict[str, int]]:
    """Every layer, or expert of a layer, that a name stands for; one empty place for a name without either."""
    counts = {"layer": spec.num_layers, "expert": spec.moe.num_experts if spec.moe else 0}
    met = [key for key in counts if f"{{{key}}}" in theirs]
    for place in itertools.product(*(range(counts[key]) for key in met)):
        yield dict(zip(met, place, strict=True))


def source_names(rules: Iterable[Rule], spec: ModelSpec) -> dict[str, str]:
    """Canonical name -> name in the source."""
    return {ours: item.theirs for item in bind(rules, spec) for ours in item.ours}


def to_canonical(
    rules: Iterable[Rule], spec: ModelSpec, source: Tensors, *, dropped: Sequence[str] = (), where: object
) -> Tensors:
    """See a source's tensors as canonical ones. Nothing is read until a tensor is asked for.

    Args:
        dropped: Globs over the source's names of tensors to pass over.
        where: The source, for errors.

    Raises:
        CheckpointError: A tensor is missing, unknown or misshapen; named as the source names it.
    """
    bound = bind(rules, spec)
    met = {
        name: info.shape
        for name, info in source.infos.items()
        if not any(fnmatch.fnmatchcase(name, glob) for glob in dropped)
    }
    checkpoint.check({item.theirs: item.rule.op.source_shape(item.shapes) for item in bound}, met, where=where)
    return through(bound, spec, source)


def through(bound: Iterable[Bound], spec: ModelSpec, source: Tensors) -> Tensors:
    """The canonical tensors of some rules, of a source that is known to have what they need."""
    infos: dict[str, TensorInfo] = {}
    origin: dict[str, tuple[Bound, int]] = {}
    for item in bound:
        for index, (name, shape) in enumerate(zip(item.ours, item.shapes, strict=True)):
            infos[name] = TensorInfo(source.infos[item.theirs].dtype, shape)
            origin[name] = (item, index)

    def load(name: str) -> Array:
        item, index = origin[name]
        return item.rule.op.split(source.load(item.theirs), item.shapes, spec)[index]

    return Tensors({name: infos[name] for name in names.tensors(spec) if name in infos}, load)


def from_canonical(rules: Iterable[Rule], spec: ModelSpec, canonical: Tensors) -> Tensors:
    """See canonical tensors under the source's names, the inverse of `to_canonical`."""
    bound = {item.theirs: item for item in bind(rules, spec)}
    infos = {
        name: replace(canonical.infos[item.ours[0]], shape=item.rule.op.source_shape(item.shapes))
        for name, item in bound.items()
    }

    def load(name: str) -> Array:
        item = bound[name]
        return item.rule.op.join([canonical.load(part) for part in item.ours], spec)

    return Tensors(infos, load)
