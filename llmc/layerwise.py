"""A checkpoint's decoder, run one layer at a time: for models that do not fit into memory as a whole.

    windows ─► enter ─► states ─► layer 0 ─► states ─► ... ─► layer n-1 ─► states ─► leave, head

All windows go through a layer before the next one is read. So memory holds the embedding or one layer or the head, and
the hidden states of the text; states beyond a limit wait in files.

Knows: checkpoints, the reference decoder. Does not know: why somebody wants to look.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from llmc import rounding
from llmc.checkpoint import Checkpoint
from llmc.model import Decoder, KVCache, Layer, Place, tensor
from llmc.names import TAIL, parts
from llmc.runtime import Tokens

# Hidden states kept in memory, bytes.
IN_MEMORY = 2 << 30

# (name of a linear, its input [rows, in])
See = Callable[[str, Tensor], None]


class States:
    """Hidden states of windows, float32 [1, tokens, hidden] each; those that exceed `limit` bytes are in files."""

    def __init__(self, states: Iterable[Tensor], limit: int = IN_MEMORY) -> None:
        self._folder: Path | None = None
        self._room = limit
        self._items: list[Tensor | Path] = []
        for state in states:
            self._items.append(self._place(state))

    def _place(self, state: Tensor) -> Tensor | Path:
        if state.nbytes <= self._room:
            self._room -= state.nbytes
            return state
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="llmc-states-"))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        path = self._folder / f"{len(self._items)}.npy"
        np.save(path, state.numpy())
        return path

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Tensor:
        item = self._items[index]
        return torch.from_numpy(np.load(item)) if isinstance(item, Path) else item

    def __setitem__(self, index: int, state: Tensor) -> None:
        """Replace a state by another of the same shape, where the old one was."""
        item = self._items[index]
        if isinstance(item, Path):
            np.save(item, state.numpy())
        else:
            self._items[index] = state

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))


class Walker:
    """A decoder of which only what is being used is in memory.

    Attributes:
        checkpoint: Where its tensors come from.
        decoder: With parameters without storage wherever nothing is loaded.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        with torch.device("meta"):
            self.decoder = Decoder(checkpoint.spec).requires_grad_(False).eval()
        self._parts = parts(checkpoint.spec)
        self._places: list[list[Place]] = []  # of each window

    def load(self, part: str) -> nn.Module:
        """Read a part; returns the layer, or the whole decoder for the front and the tail."""
        wanted = list(self._parts[part])
        if part == TAIL and self.decoder.spec.tied:
            wanted.append("embed.weight")
        self.decoder.load_state_dict(
            {name: tensor(self.checkpoint, name) for name in wanted}, strict=False, assign=True
        )
        if self.checkpoint.recipe and self.checkpoint.recipe.kv_cache:
            scales = [name for kind in "kv" if (name := f"{part}.attn.{kind}_scale") in self.checkpoint]
            self.decoder.simulate_kv_cache(
                self.checkpoint.recipe.kv_cache, {name: torch.from_numpy(self.checkpoint[name]) for name in scales}
            )
        matrices = (name.removesuffix(".weight") for name in wanted if name.endswith(".weight"))
        self.decoder.round_inputs(rounding.read(self.checkpoint, matrices))
        return self.decoder.get_submodule(part) if part.startswith("layers.") else self.decoder

    def drop(self) -> None:
        """Let go of everything that was loaded."""
        self.decoder.to("meta")

    @torch.inference_mode()
    def enter(self, windows: Sequence[Tokens], limit: int = IN_MEMORY) -> States:
        """The states before the first layer; the front must be loaded."""
        self._places = []
        # Windows that are alike share what is known of their places.
        known: dict[object, list[Place]] = {}
        return States((self._enter(torch.from_numpy(window)[None], known) for window in windows), limit)

    def _enter(self, window: Tensor, known: dict[object, list[Place]]) -> Tensor:
        x, places = self.decoder.enter(window)
        self._places.append(known.setdefault((window.shape, self.decoder.spans(window)), places))
        return x

    @torch.inference_mode()
    def through(self, layer: nn.Module, state: Tensor, window: int, cache: KVCache | None = None) -> Tensor:
        """One window through a layer that is loaded.

        Args:
            window: Which of those that entered it is.
            cache: Sees the layer's keys and values.
        """
        if not isinstance(layer, Layer):
            raise TypeError(f"{type(layer).__name__} is not a layer")
        out: Tensor = layer(state, self._places[window][layer.attn.layer], cache)
        return out

    def advance(self, layer: nn.Module, states: States) -> None:
        """All windows through a layer that is loaded."""
        for index, state in enumerate(states):
            states[index] = self.through(layer, state, index)

    def observe(
        self, part: str, layer: nn.Module, states: States, linears: Iterable[str], see: See, *, advance: bool = False
    ) -> dict[str, str]:
        """Run a layer that is loaded, and look at what goes into its linears.

        Args:
            linears: Canonical names.
            see: Called once for each input of each window, with the first linear that reads it.
            advance: Move the states behind the layer; else they stay as they are.

        Returns:
            Linear -> the first one that reads the same input. Linears that met no token are missing.
        """
        leaders: dict[str, str] = {}
        met: dict[int, tuple[str, Tensor]] = {}  # holding the tensors, so that no other gets the same id

        def watch(name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
            def hook(_: nn.Module, inputs: tuple[Tensor]) -> None:
                x = inputs[0]
                if x.numel() and id(x) not in met:
                    met[id(x)] = name, x
                    see(name, x.flatten(0, -2))
                if id(x) in met:
                    leaders[name] = met[id(x)][0]

            return hook

        hooks = [
            layer.get_submodule(name.removeprefix(f"{part}.")).register_forward_pre_hook(watch(name))
            for name in linears
        ]
        try:
            for index, state in enumerate(states):
                behind = self.through(layer, state, index)
                met.clear()
                if advance:
                    states[index] = behind
        finally:
            for hook in hooks:
                hook.remove()
        return leaders


def replace(layer: nn.Module, part: str, values: Mapping[str, Tensor]) -> None:
    """Give a loaded layer other values, by canonical names of tensors."""
    layer.load_state_dict({name.removeprefix(f"{part}."): x for name, x in values.items()}, strict=False, assign=True)
