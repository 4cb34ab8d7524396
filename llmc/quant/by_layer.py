"""The calibration driver: an algorithm that needs text solves a layer when the first of its tensors is asked for.

    front ─► rtn     layer 0 ─► solve ─► advance     layer 1 ─► ...     head ─► solve

Tensors are asked for in the order in which a forward pass meets them, so the text walks through the model once while
the result is written, and one layer is in memory.

Knows: the order of things. Does not know: how a layer is solved (gptq.py, awq.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from llmc import names
from llmc.checkpoint import Checkpoint
from llmc.layerwise import States, Walker
from llmc.names import FRONT, TAIL, parts
from llmc.quant import rtn
from llmc.quant.pack import Packed
from llmc.recipe import QuantRecipe, WeightFormat
from llmc.runtime import Tokens
from llmc.tensors import Array

# Canonical tensor name -> what it becomes; tensors that are missing stay as they are.
Found = dict[str, Packed | Array]


@dataclass(frozen=True, slots=True)
class Part:
    """A layer that is in memory, and the text in front of it.

    Attributes:
        name: `layers.N`.
        formats: Its matrices that are to be quantized.
    """

    name: str
    walker: Walker
    layer: nn.Module
    states: States
    formats: Mapping[str, WeightFormat]

    def weight(self, matrix: str) -> Tensor:
        """float32 [out, in]; not a copy."""
        return self.layer.get_parameter(f"{matrix}.weight".removeprefix(f"{self.name}."))


class Method(Protocol):
    """What an algorithm does with what it is given."""

    def layer(self, part: Part) -> Found:
        """Quantize a layer, and move `part.states` behind it."""
        ...

    def head(self, matrix: str, weight: Tensor, states: Sequence[Tensor] | States, form: WeightFormat) -> Packed:
        """Quantize a head [vocab, hidden] that reads `states` [1, tokens, hidden]."""
        ...


class ByLayer:
    """A Transform, see llmc/quant/algorithm.py."""

    def __init__(self, checkpoint: Checkpoint, recipe: QuantRecipe, windows: Sequence[Tokens], method: Method) -> None:
        self._walker = Walker(checkpoint)
        self._recipe = recipe
        self._windows = windows
        self._method = method
        self._parts = {name: part for part, inside in parts(checkpoint.spec).items() for name in inside}
        self._matrices = names.matrices(checkpoint.spec)
        self._part = ""
        self._found: Found = {}
        self._states = States([])

    @torch.inference_mode()
    def __call__(self, name: str, values: Array, weight_format: WeightFormat | None) -> Packed | Array:
        if self._parts[name] != self._part:
            self._part = self._parts[name]
            self._found = self._solve(self._part)
        found = self._found.pop(name, None)
        if found is None:
            return rtn.quantize(values, weight_format) if weight_format else values
        return found

    def _solve(self, name: str) -> Found:
        self._walker.drop()
        layer = self._walker.load(name)
        if name == FRONT:
            self._states = self._walker.enter(self._windows)
            return {}
        if name == TAIL:
            return self._head()
        inside = (matrix for matrix in self._matrices if self._parts[f"{matrix}.weight"] == name)
        formats = {matrix: form for matrix in inside if (form := self._recipe.format_of(matrix))}
        return self._method.layer(Part(name, self._walker, layer, self._states, formats))

    def _head(self) -> Found:
        """The head alone: what stands before it in the tail is small, and rounded to nearest."""
        decoder = self._walker.decoder
        form = self._recipe.format_of("head")
        if decoder.head is None or form is None:
            return {}
        for index, state in enumerate(self._states):
            self._states[index] = decoder.leave(state)
        return {"head.weight": self._method.head("head", decoder.head.weight, self._states, form)}
