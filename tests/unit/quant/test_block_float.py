"""llmc.quant.block_float against nvidia-modelopt's own tensors, and against what the formats are by definition."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import MATRICES
from pydantic import ValidationError

from llmc import model, names
from llmc.checkpoint import Checkpoint
from llmc.errors import UserError
from llmc.quant import algorithm, pack
from llmc.quant.block_float import quantize
from llmc.quant.quantize import quantize as quantize_checkpoint
from llmc.recipe import BLOCKS, E8M0, ActivationFormat, QuantRecipe, WeightFormat

FORMS = {kind: WeightFormat(kind=kind, bits=each.bits, group_size=each.size) for kind, each in BLOCKS.items()}  # type: ignore[arg-type]
E2M1_VALUES = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
# 4 bits of exponent whose bias is 7, 3 of mantissa; all ones is no number.
E4M3_VALUES = [
    (mantissa / 8 * 2**-6) if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    for exponent in range(16)
    for mantissa in range(8)
][:-1]
VALUES = {"nvfp4": E2M1_VALUES, "mxfp4": E2M1_VALUES, "mxfp8": E4M3_VALUES}


def values_of(weights: np.ndarray, kind: str) -> np.ndarray:
    packed = quantize(weights, FORMS[kind])
    return pack.dequantize(packed.qweight, packed.scale, None, FORMS[kind], weights.shape[1], scale_2=packed.scale_2)


def some_weights() -> np.ndarray:
    """float32 [96, 256] with a block of zeros, blocks far below the others, and rows full of ties."""
    weights = np.random.default_rng(3).normal(0, 0.02, (96, 256)).astype(np.float32)
    weights[3, :32] = 0
    weights[4, :32] *= 1e-6
    weights[5] = np.arange(256) % 25 / 4 * 2.0**-7  # quarters up to 6, in blocks whose largest is not always 6
    weights[6] = 0 - weights[5]  # and no -0
    weights[0, 0] = 6 * 2.0**-7  # so that nvfp4's scales of those rows may be powers of two as well
    return weights


@pytest.fixture(scope="module")
def tensors() -> Any:
    """modelopt.torch.quantization.qtensor"""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        import modelopt.torch.quantization.qtensor as found
    return found


def theirs(tensors: Any, kind: str, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, float | None, np.ndarray]:
    """Codes as bytes, scales, the matrix's scale and values: modelopt's."""
    given, second, size = torch.from_numpy(weights.copy()), None, BLOCKS[kind].size
    if kind == "nvfp4":
        packed, scale, second = tensors.NVFP4QTensor.quantize(given, size)
        values = packed.dequantize(torch.float32, scale=scale, double_scale=second, block_sizes={-1: size})
        scale = scale.view(torch.uint8)
    elif kind == "mxfp4":
        packed, scale = tensors.MXFP4QTensor.quantize(given, size)
        values = packed.dequantize(torch.float32, scale=scale, block_sizes={-1: size})
    else:
        packed, scale = tensors.MXFP8QTensor.quantize(given)
        values = packed.dequantize(torch.float32, scale=scale)
    codes, scales = packed._quantized_data.view(torch.uint8).numpy(), scale.numpy().reshape(len(weights), -1)
    return codes, scales, None if second is None else float(second), values.numpy()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", FORMS)
def test_is_what_modelopt_does(tensors: Any, kind: str) -> None:
    weights = some_weights()
    codes, scales, second, values = theirs(tensors, kind, weights)
    ours = quantize(weights, FORMS[kind])
    np.testing.assert_array_equal(ours.scale.view(np.uint8), scales)
    assert (None if ours.scale_2 is None else float(ours.scale_2[0])) == second
    assert len(np.unique(scales)) > 3
    found = values_of(weights, kind)
    if kind != "mxfp4":
        np.testing.assert_array_equal(ours.qweight.view(np.uint8), codes)
        np.testing.assert_array_equal(found, values)
        return
    # There alone modelopt's ties go towards zero (0.75, 1.75 and 3.5 become 0.5, 1.5 and 3), and its zeros are -0.
    halves = np.abs(weights) / np.repeat(np.exp2(scales - 127.0), 32, axis=1)
    ties = np.isin(halves, (0.75, 1.75, 3.5))
    np.testing.assert_array_equal(found != values, ties)
    assert ties.sum() > 30
    differ = pack.unpack_codes(ours.qweight, 4, 256) != pack.unpack_codes(codes, 4, 256)
    np.testing.assert_array_equal(differ, ties | (weights == 0))


@settings(deadline=None)
@given(
    MATRICES,
    st.sampled_from(sorted(FORMS)),
)
def test_every_weight_becomes_the_nearest_value_of_its_block(weights: np.ndarray, kind: str) -> None:
    packed, size = quantize(weights, FORMS[kind]), BLOCKS[kind].size
    scale = packed.scale.astype(np.float64) * (1 if packed.scale_2 is None else packed.scale_2)
    wide = np.repeat(scale, size, axis=1)[:, : weights.shape[1]]
    found = values_of(weights, kind)
    exact = np.abs(weights.astype(np.float64))[..., None]
    nearest = np.abs(wide[..., None] * np.array(VALUES[kind]) - exact).min(axis=-1)
    moved = np.abs(found.astype(np.float64) - weights)
    assert (moved <= nearest + np.abs(weights) * 1e-6).all()
    assert (found * weights >= 0).all()


@settings(deadline=None)
@given(st.floats(2.0**-100, 2.0**100, width=32), st.sampled_from(["mxfp4", "mxfp8"]))
def test_scales_are_the_smallest_powers_of_two_that_cut_nothing_off(reach: float, kind: str) -> None:
    weights = np.full((1, 32), reach, np.float32)
    packed, highest = quantize(weights, FORMS[kind]), {"mxfp4": 6, "mxfp8": 448}[kind]
    assert packed.scale.dtype == E8M0
    scale = float(packed.scale[0, 0])
    # Largest / highest is a float32.
    assert highest * scale >= reach * (1 - 1e-7)
    assert highest * scale / 2 < reach * (1 + 1e-7)


def test_a_row_is_padded_and_zeros_stay_zeros() -> None:
    weights = np.zeros((3, 40), np.float32)
    weights[1, ::2] = np.arange(20) - 3
    for kind in FORMS:
        found = values_of(weights, kind)
        assert found.shape == weights.shape
        np.testing.assert_array_equal(found[weights == 0], 0)
        np.testing.assert_array_equal(values_of(weights * 0, kind), 0)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were a CUDA device: nothing but the answer is changed."""
    monkeypatch.setattr(algorithm, "has_cuda", lambda: True)


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("kind", FORMS)
def test_the_decoder_computes_with_what_modelopt_makes_of_each_matrix(
    tensors: Any, kind: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tiny_checkpoint("qwen2-moe" if kind == "nvfp4" else "llama")
    quantize_checkpoint(source, tmp_path / "q", QuantRecipe(algorithm=kind, weights=FORMS[kind], keep=("embed",)))
    before, after, seen = Checkpoint(source), Checkpoint(tmp_path / "q"), 0
    for matrix in [name.removesuffix(".qweight") for name in after if name.endswith(".qweight")]:
        weights = before[f"{matrix}.weight"].astype(np.float32)
        together = [before[f"{name}.weight"] for name in fused(matrix)]
        if kind == "nvfp4":
            # What engines multiply as one has one scale, that of the largest weight.
            largest = torch.from_numpy(np.concatenate(together)).abs().amax() / (6 * 448)
            packed, scale, second = tensors.NVFP4QTensor.quantize(
                torch.from_numpy(weights.copy()), 16, weights_scaling_factor_2=largest
            )
            expected = packed.dequantize(torch.float32, scale=scale, double_scale=second, block_sizes={-1: 16}).numpy()
        else:
            expected = values_of(weights, kind)
        np.testing.assert_array_equal(model.tensor(after, f"{matrix}.weight").numpy(), expected)
        seen += 1
    assert seen == len(names.matrices(before.spec)) - 1


def fused(matrix: str) -> list[str]:
    """The matrices whose product an engine makes together with that of one."""
    parent, _, linear = matrix.rpartition(".")
    group = next((group for group in (("q", "k", "v"), ("gate", "up")) if linear in group), None)
    return [f"{parent}.{name}" for name in group] if group else [matrix]


def test_cuda_is_what_pytorch_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for answer in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda answer=answer: answer)
        assert algorithm.has_cuda() is answer
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(algorithm, "installed", lambda _: False)
    assert not algorithm.has_cuda()


def test_formats_are_whole() -> None:
    with pytest.raises(ValidationError, match="nvfp4 has 4 bits in blocks of 16 and no zero points"):
        WeightFormat(kind="nvfp4", bits=4, group_size=32)
    with pytest.raises(ValidationError, match="mxfp8 has 8 bits in blocks of 32"):
        WeightFormat(kind="mxfp8", bits=8, group_size=32, symmetric=False)
    with pytest.raises(ValidationError, match="mxfp4 rounds weights alone"):
        QuantRecipe(algorithm="mxfp4", weights=FORMS["mxfp4"], activations=ActivationFormat(kind="fp8"))
    with pytest.raises(UserError, match="gptq chooses no values of nvfp4: the algorithm of that name does"):
        algorithm.check_formats(QuantRecipe(algorithm="gptq", weights=FORMS["nvfp4"]))
