"""llmc.layerwise: a layer at a time is the same decoder, and no more than a layer is in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from llmc import names
from llmc.checkpoint import Checkpoint
from llmc.layerwise import States, Walker, replace
from llmc.model import load
from llmc.names import FRONT, TAIL, parts

CASES = ["llama", "llama-tied", "qwen2-window", "qwen3", "llama-longrope"]


def windows() -> list[np.ndarray]:
    return [np.array(tiny.tokens(length, length)) for length in (40, 40, 17)]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("limit", [0, 1 << 30], ids=["in files", "in memory"])
@torch.inference_mode()
def test_a_walk_is_a_forward_pass(name: str, limit: int, tiny_checkpoint: Callable[[str], Path]) -> None:
    checkpoint = Checkpoint(tiny_checkpoint(name))
    walker, whole = Walker(checkpoint), load(checkpoint)
    walker.load(FRONT)
    states = walker.enter(windows(), limit)
    for part in list(parts(checkpoint.spec))[1:-1]:
        walker.drop()
        walker.advance(walker.load(part), states)
    walker.drop()
    walker.load(TAIL)
    assert len(states) == 3
    for window, state in zip(windows(), states, strict=True):
        met = walker.decoder.logits(walker.decoder.leave(state))
        torch.testing.assert_close(met, whole(torch.from_numpy(window)[None]), rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_only_what_is_used_is_in_memory(tiny_checkpoint: Callable[[str], Path]) -> None:
    checkpoint = Checkpoint(tiny_checkpoint("llama"))
    walker = Walker(checkpoint)
    held = []
    for part, inside in parts(checkpoint.spec).items():
        walker.drop()
        walker.load(part)
        present = {name for name, values in walker.decoder.state_dict().items() if not values.is_meta}
        assert present == set(inside)
        held.append(len(present))
    assert sum(held) == len(names.tensors(checkpoint.spec))
    assert len(held) == checkpoint.spec.num_layers + 2


@torch.inference_mode()
def test_observing_sees_each_input_once_and_moves_nothing(tiny_checkpoint: Callable[[str], Path]) -> None:
    checkpoint = Checkpoint(tiny_checkpoint("qwen2"))
    walker = Walker(checkpoint)
    walker.load(FRONT)
    states = walker.enter(windows())
    before = [state.clone() for state in states]
    layer = walker.load("layers.0")
    seen: list[tuple[str, tuple[int, ...]]] = []
    linears = [name for name in names.matrices(checkpoint.spec) if name.startswith("layers.0.")]
    leaders = walker.observe("layers.0", layer, states, linears, lambda name, x: seen.append((name, tuple(x.shape))))
    assert {name.removeprefix("layers.0."): leader.removeprefix("layers.0.") for name, leader in leaders.items()} == {
        "attn.q": "attn.q",
        "attn.k": "attn.q",
        "attn.v": "attn.q",
        "attn.o": "attn.o",
        "mlp.gate": "mlp.gate",
        "mlp.up": "mlp.gate",
        "mlp.down": "mlp.down",
    }
    assert len(seen) == 4 * 3
    assert seen[:4] == [
        (f"layers.0.{name}", (40, width))
        for name, width in (("attn.q", 64), ("attn.o", 64), ("mlp.gate", 64), ("mlp.down", 96))
    ]
    for old, new in zip(before, states, strict=True):
        assert torch.equal(old, new)
    walker.observe("layers.0", layer, states, linears, lambda *_: None, advance=True)
    for window, (old, new) in enumerate(zip(before, states, strict=True)):
        assert torch.equal(walker.through(layer, old, window), new)


@torch.inference_mode()
def test_a_replaced_weight_counts(tiny_checkpoint: Callable[[str], Path]) -> None:
    walker = Walker(Checkpoint(tiny_checkpoint("llama")))
    walker.load(FRONT)
    states = walker.enter(windows())
    layer = walker.load("layers.0")
    before = walker.through(layer, states[0], 0)
    replace(layer, "layers.0", {"layers.0.mlp.down.weight": torch.zeros(64, 96)})
    assert not torch.equal(before, walker.through(layer, states[0], 0))


def test_states_beyond_the_limit_are_in_files_that_go_away() -> None:
    tensors = [torch.full((1, 4, 8), float(value)) for value in range(3)]
    states = States(iter(tensors), limit=150)  # room for one of 128 bytes
    folder = states._folder or Path()
    assert len(list(folder.glob("*.npy"))) == 2
    states[2] = torch.full((1, 4, 8), 7.0)
    assert [float(state[0, 0, 0]) for state in states] == [0, 1, 7]
    del states
    assert not folder.exists()
