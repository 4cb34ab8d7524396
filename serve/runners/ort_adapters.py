"""Low-rank adapters beside an ONNX Runtime engine: which rows of all adapters a run is given, and the masks.

All adapters lie one behind the other. A run takes the rows from the first to the last adapter that it needs, without a
copy, and none when it needs none; so one prompt pays for its own adapter alone.

Knows the engine's inputs (llmc/adapter.py). Does not know onnxruntime.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from llmc import names
from llmc.adapter import Adapter, Floats, joined, kind_of, separate, stacked
from llmc.errors import UserError
from llmc.spec import ModelSpec

# The first adapter of a run, and the one behind its last.
Span = tuple[int, int]
NONE: Span = (0, 0)


class Adapters:
    """The adapters of one engine.

    Args:
        inputs: Names of the graph's inputs.

    Raises:
        UserError: The engine was built without them, or an adapter is for other linears than it has.
    """

    def __init__(self, spec: ModelSpec, inputs: Sequence[str], adapters: Sequence[Adapter]) -> None:
        self._index = {adapter.name: index for index, adapter in enumerate(adapters)}
        names_ = [name.removeprefix("lora.").removesuffix(".a") for name in inputs if name.endswith(".a")]
        groups = [separate(name) for name in names_ if f"lora.{name}.b" in inputs]
        if adapters and not groups:
            raise UserError("this engine takes no adapters: build it with llmc build-engine --lora", param="lora")
        taken = {module for group in groups for module in group}
        for adapter in adapters:
            if unknown := sorted(adapter.factors.keys() - taken):
                raise UserError(
                    f"the adapter '{adapter.name}' changes {unknown[0]}, for which this engine takes none", param="lora"
                )
        ranks = _ranks(groups, adapters)
        # Where each adapter begins, and where the last ends.
        self._bounds = {kind: [0, *np.cumsum(ranks[kind]).tolist()] for kind in ranks}
        self._stacks = _stack(spec, groups, adapters, ranks)

    def span(self, wanted: Sequence[str]) -> Span:
        """What a run needs for tokens of these adapters; "" is of none."""
        found = [self._index[name] for name in wanted if name]
        return (min(found), max(found) + 1) if found else NONE

    def stacks(self, span: Span) -> dict[str, Floats]:
        """Inputs that are the same in all runs of a span."""
        return {name: stack[slice(*self._rows(kind_of(name[5:-2]), span))] for name, stack in self._stacks.items()}

    def masks(self, tokens: int, span: Span) -> dict[str, Floats]:
        """Masks of a run, to be filled."""
        sizes = {kind: self._rows(kind, span) for kind in self._bounds}
        return {
            f"lora.mask.{kind}": np.zeros((tokens, end - begin), np.float32) for kind, (begin, end) in sizes.items()
        }

    def fill(self, masks: Mapping[str, Floats], wanted: Sequence[str], span: Span) -> None:
        """Say which adapter each token is for; as many as a mask has rows, or one for all."""
        for name, mask in masks.items():
            kind = name.removeprefix("lora.mask.")
            begin, _ = self._rows(kind, span)
            mask[:] = 0
            for row, adapter in enumerate(wanted):
                if adapter:
                    index = self._index[adapter]
                    own = slice(self._bounds[kind][index] - begin, self._bounds[kind][index + 1] - begin)
                    mask[row if len(wanted) > 1 else slice(None), own] = 1

    def _rows(self, kind: str, span: Span) -> tuple[int, int]:
        bounds = self._bounds[kind]
        return bounds[span[0]], bounds[span[1]]


def _ranks(groups: Sequence[Sequence[str]], adapters: Sequence[Adapter]) -> dict[str, list[int]]:
    """Of each kind the rank of each adapter: the largest of all layers."""
    found: dict[str, list[int]] = {}
    for group in groups:
        ranks = [sum(len(each.factors[module][0]) for module in group if module in each.factors) for each in adapters]
        known = found.setdefault(kind_of(joined(group)), [0] * len(adapters))
        known[:] = map(max, known, ranks)
    return found


def _stack(
    spec: ModelSpec, groups: Sequence[Sequence[str]], adapters: Sequence[Adapter], ranks: Mapping[str, Sequence[int]]
) -> dict[str, Floats]:
    """All adapters' factors by the names of the graph's inputs, zeros where an adapter has fewer rows in a layer."""
    shapes = names.tensors(spec)
    found: dict[str, Floats] = {}
    for group in groups:
        both = joined(group)
        outs, width = [shapes[f"{module}.weight"][0] for module in group], shapes[f"{group[0]}.weight"][1]
        parts: list[tuple[Floats, Floats]] = [stacked(adapter, group, outs, width) for adapter in adapters]
        for letter, side, columns in (("a", 0, width), ("b", 1, sum(outs))):
            padded = [
                np.concatenate([part[side], np.zeros((rank - len(part[side]), columns), np.float32)])
                for part, rank in zip(parts, ranks[kind_of(both)], strict=True)
            ]
            empty: npt.NDArray[np.float32] = np.zeros((0, columns), np.float32)
            found[f"lora.{both}.{letter}"] = np.concatenate([empty, *padded])
    return found
