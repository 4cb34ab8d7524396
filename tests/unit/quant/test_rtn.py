"""llmc.quant.rtn against nvidia-modelopt's fake quantization, and what rounding may cost."""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import MATRICES

from llmc.quant import pack
from llmc.quant.rtn import quantize
from llmc.recipe import WeightFormat


def values_of(weights: np.ndarray, weight_format: WeightFormat) -> np.ndarray:
    packed = quantize(weights, weight_format)
    return pack.dequantize(packed.qweight, packed.scale, packed.zero, weight_format, weights.shape[1])


@pytest.fixture(scope="module")
def modelopt() -> Any:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        import modelopt.torch.quantization as mtq
    return mtq


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("bits", "group_size"), [(4, 128), (4, 32), (8, 128), (8, 32)])
def test_symmetric_is_what_modelopt_does(modelopt: Any, bits: int, group_size: int) -> None:
    torch.manual_seed(bits + group_size)
    model = torch.nn.Sequential(torch.nn.Linear(256, 96, bias=False))
    with torch.no_grad():
        model[0].weight[3, :group_size] = 0  # a dead group
        model[0].weight[4] = (torch.arange(256) - 128) / 16  # full of ties
    weights = model[0].weight.detach().numpy().copy()
    config = copy.deepcopy(modelopt.INT4_BLOCKWISE_WEIGHT_ONLY_CFG)
    set_format(config, bits, group_size)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        modelopt.quantize(model, config)
    quantizer = model[0].weight_quantizer
    assert (quantizer.num_bits, quantizer.block_sizes[-1], quantizer.is_enabled) == (bits, group_size, True)
    theirs = quantizer(model[0].weight).detach().numpy()
    ours = values_of(weights, WeightFormat(bits=bits, group_size=group_size))
    assert np.abs(theirs - weights).max() > 1e-4
    np.testing.assert_array_max_ulp(ours, theirs, maxulp=2)


def set_format(config: dict[str, Any], bits: int, group_size: int) -> None:
    found = 0
    for entry in config["quant_cfg"]:
        attributes = entry.get("cfg") or {}
        if "weight_quantizer" in entry["quantizer_name"] and "block_sizes" in attributes:
            attributes["num_bits"], attributes["block_sizes"] = bits, {-1: group_size}
            found += 1
    assert found == 1


@settings(deadline=None)
@given(
    MATRICES,
    st.sampled_from([4, 8]),
    st.sampled_from([16, 32]),
    st.booleans(),
)
def test_no_value_moves_by_more_than_half_a_step(
    weights: np.ndarray, bits: Any, group_size: Any, symmetric: bool
) -> None:
    weight_format = WeightFormat(bits=bits, group_size=group_size, symmetric=symmetric)
    packed = quantize(weights, weight_format)
    steps = np.repeat(packed.scale, group_size, axis=1)[:, : weights.shape[1]]
    # an asymmetric group's zero point is rounded as well, so an extreme may move by a whole step
    allowed = 0.5 if symmetric else 1.0
    moved = np.abs(values_of(weights, weight_format) - weights)
    assert (moved <= steps * np.float32(allowed + 1e-4) + 1e-30).all()


@settings(deadline=None)
@given(st.sampled_from([4, 8]), st.booleans())
def test_zeros_stay_zeros(bits: Any, symmetric: bool) -> None:
    """In a dead group and beside other values: padding and pruned weights must not come to life."""
    weights = np.zeros((3, 40), np.float32)
    weights[1, ::2] = np.arange(20) - 3
    found = values_of(weights, WeightFormat(bits=bits, group_size=32, symmetric=symmetric))
    np.testing.assert_array_equal(found[weights == 0], 0)


def test_asymmetric_serves_one_sided_weights_better() -> None:
    weights = np.random.default_rng(0).uniform(2, 3, (8, 64)).astype(np.float32)
    one, two = (
        np.abs(values_of(weights, WeightFormat(bits=4, group_size=32, symmetric=symmetric)) - weights).max()
        for symmetric in (True, False)
    )
    assert two < one
