"""llmc.model by its parts; against transformers as a whole in tests/parity/test_reference.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as rotate_glm
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from llmc import checkpoint as checkpoints
from llmc import manifest as manifests
from llmc.alibi import slopes
from llmc.checkpoint import Checkpoint
from llmc.errors import CheckpointError
from llmc.model import Decoder, KVCache, RMSNorm, linear_biases, load, rotate, visible
from llmc.spec import ModelSpec
from llmc.tensors import Array, TensorInfo


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(0, 12), st.one_of(st.none(), st.integers(1, 15)))
def test_visible(new: int, past: int, window: int | None) -> None:
    mask = visible(new, past + new, window)
    for row in range(new):
        position = past + row
        for key in range(past + new):
            assert mask[row, key] == (key <= position and (window is None or position - key < window))


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(0, 12), st.integers(1, 7))
def test_linear_biases(new: int, past: int, heads: int) -> None:
    biases = linear_biases(heads, visible(new, past + new, None))
    assert biases.shape == (heads, new, past + new)
    for row in range(new):
        for key in range(past + new):
            distance = past + row - key
            expected = -slopes(heads) * distance if distance >= 0 else np.full(heads, -np.inf)
            np.testing.assert_allclose(biases[:, row, key], expected, rtol=1e-6)


def test_rotation_is_that_of_transformers() -> None:
    generator = torch.Generator().manual_seed(0)
    q, angles = torch.randn(2, 3, 5, 8, generator=generator), torch.randn(5, 4, generator=generator)
    cos, sin = angles.cos(), angles.sin()
    twice = [torch.cat((half, half), dim=-1)[None] for half in (cos, sin)]
    expected, _ = apply_rotary_pos_emb(q, q, *twice)
    torch.testing.assert_close(rotate(q, cos, sin), expected, rtol=0, atol=1e-6)


def test_rotation_of_neighbours_in_a_part_of_the_head_is_that_of_transformers() -> None:
    generator = torch.Generator().manual_seed(0)
    q, angles = torch.randn(2, 3, 5, 8, generator=generator), torch.randn(5, 2, generator=generator)
    cos, sin = angles.cos(), angles.sin()
    twice = [torch.cat((half, half), dim=-1)[None] for half in (cos, sin)]
    expected, _ = rotate_glm(q, q, *twice)
    torch.testing.assert_close(rotate(q, cos, sin, interleaved=True), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(rotate(q, cos, sin)[..., 4:], q[..., 4:], rtol=0, atol=0)


def test_statistics_of_a_norm_are_fp32() -> None:
    """In half precision the square of 300 would be infinite."""
    norm = RMSNorm(4, 1e-5).half()
    out = norm(torch.full((1, 4), 300.0, dtype=torch.float16))
    assert out.dtype == torch.float16
    torch.testing.assert_close(out, torch.ones(1, 4, dtype=torch.float16))


def test_gradients_flow(tiny_checkpoint: Callable[[str], Path]) -> None:
    """A decoder can be trained: every parameter that takes part has a gradient."""
    decoder = Decoder(Checkpoint(tiny_checkpoint("qwen3-tied")).spec)
    tokens = torch.tensor([tiny.tokens(12)])
    torch.nn.functional.cross_entropy(decoder(tokens)[0, :-1], tokens[0, 1:]).backward()
    without = [name for name, parameter in decoder.named_parameters() if parameter.grad is None]
    assert without == []


def test_loading_takes_no_gradients(tiny_checkpoint: Callable[[str], Path]) -> None:
    decoder = load(Checkpoint(tiny_checkpoint("llama")))
    assert not decoder.training
    assert not any(parameter.requires_grad for parameter in decoder.parameters())


def test_a_cache_is_one_sequence(tiny_checkpoint: Callable[[str], Path]) -> None:
    decoder = load(Checkpoint(tiny_checkpoint("llama")))
    one, two = KVCache(), KVCache()
    assert one.length == 0
    decoder(torch.tensor([tiny.tokens(5)]), cache=one)
    decoder(torch.tensor([tiny.tokens(3)]), cache=two)
    decoder(torch.tensor([tiny.tokens(4, seed=1)]), cache=one)
    assert (one.length, two.length) == (9, 3)


def written(folder: Path, spec: ModelSpec, change: Callable[[str, Array], Array]) -> Checkpoint:
    """A checkpoint with freshly drawn weights, each passed through `change`."""
    state = {name: change(name, values.numpy()) for name, values in Decoder(spec).state_dict().items()}
    with manifests.creating(folder) as work:
        infos = {name: TensorInfo(values.dtype, values.shape) for name, values in state.items()}
        checkpoints.write(work, spec, infos, state.__getitem__)
        manifests.seal(work, manifests.Manifest(kind="checkpoint", tools=manifests.tools()))
    return Checkpoint(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_named(
    value: float, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    def change(name: str, values: Array) -> Array:
        if name == "layers.1.mlp.up.weight":
            values[3, 2] = value
        return values

    with pytest.raises(CheckpointError, match=r"'layers\.1\.mlp\.up\.weight' holds values that are not finite"):
        load(written(tmp_path / "broken", Checkpoint(tiny_checkpoint("llama")).spec, change))


def test_half_precision_files_give_float32(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    spec = Checkpoint(tiny_checkpoint("llama")).spec
    decoder = load(written(tmp_path / "half", spec, lambda _, values: values.astype(np.float16)))
    assert {parameter.dtype for parameter in decoder.parameters()} == {torch.float32}
