"""llmc.rounding: the definition of rounded inputs, against formulas written here."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmc.recipe import ActivationFormat, QuantRecipe, WeightFormat, packed_plan
from llmc.rounding import Linear, Rounding

X = torch.tensor([[1.0, -2.0, 127.0, 0.4], [0.01, 0.02, -0.0127, 0.0], [0.0, 0.0, 0.0, 0.0]])


def test_each_token_has_its_scale() -> None:
    got = Rounding(ActivationFormat())(X)
    assert got[0].tolist() == [1, -2, 127, 0]
    scale = np.float32(0.02) / 127
    np.testing.assert_allclose(got[1], np.round(X[1].numpy() / scale) * scale, rtol=1e-6)
    assert got[2].tolist() == [0, 0, 0, 0]
    alone = Rounding(ActivationFormat())(X[1:2])
    assert torch.equal(alone[0], got[1])


def test_groups_have_their_scales() -> None:
    got = Rounding(ActivationFormat(), group=2)(X[:1, :3])
    np.testing.assert_allclose(got, [[np.round(63.5) * 2 / 127, -2, 127]], rtol=1e-6)


def test_one_scale_for_all_clips() -> None:
    got = Rounding(ActivationFormat(dynamic=False), scale=torch.tensor([0.5]))(X)
    assert got[0].tolist() == [1, -2, 63.5, 0.5]
    assert Rounding(ActivationFormat(dynamic=False), scale=torch.tensor([0.5]))(-X)[0, 2] == -64


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=8))
def test_fp8_is_that_of_ml_dtypes(values: list[float]) -> None:
    x = torch.tensor([values])
    got = Rounding(ActivationFormat(kind="fp8", dynamic=False), scale=torch.tensor([0.25]))(x)
    codes = np.clip(x.numpy() / np.float32(0.25), -448, 448).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(got, codes.astype(np.float32) * np.float32(0.25))


@torch.inference_mode()
def test_shift_and_factor_leave_the_function_to_the_weights() -> None:
    torch.manual_seed(0)
    linear, x, z, m = Linear(4, 3), torch.randn(5, 4), torch.randn(4), torch.rand(4) + 0.5
    expected, weight = linear(x), linear.weight.clone()
    linear.weight.copy_(weight / m)
    fine = torch.tensor([1e-3])
    linear.rounding = Rounding(ActivationFormat(dynamic=False), 0, fine * 50, z, m, weight @ z)
    met = linear(x)
    assert 1e-4 < float((met - expected).abs().max()) < 0.2
    plan = packed_plan(RECIPE, "layers.0.attn.q.weight", (6, 4), None)
    assert {name.rpartition(".")[2]: info.shape for name, info in plan.items()} == {
        "qweight": (6, 4), "scale": (6, 1), "input_shift": (4,), "input_bias": (6,), "input_multiply": (4,),
        "input_scale": (1,),
    }  # fmt: skip


ROWS, FP8 = WeightFormat(bits=8, group_size=0), WeightFormat(kind="fp8", bits=8, group_size=0)
GROUPS = WeightFormat(bits=4, group_size=32)
RECIPE = QuantRecipe(
    algorithm="smoothquant", weights=ROWS, activations=ActivationFormat(dynamic=False), multiplied=("*.q",),
    shifted=("*.attn.*",),
)  # fmt: skip


@pytest.mark.parametrize(
    ("weights", "activations", "message"),
    [
        (ROWS, None, "need rounded activations"),
        (FP8, ActivationFormat(), "fp8 weights go with fp8 activations"),
        (ROWS, ActivationFormat(kind="fp8"), "go with int8 activations"),
        (GROUPS, ActivationFormat(dynamic=False), "static int8 activations need weights with a scale for a whole row"),
    ],
)
def test_formats_that_nothing_computes(
    weights: WeightFormat | None, activations: ActivationFormat | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        QuantRecipe(algorithm="any", weights=weights, activations=activations)


@pytest.mark.parametrize(
    "fields",
    [
        {"bits": 4, "group_size": 0},
        {"bits": 8, "group_size": 0, "symmetric": False},
        {"bits": 4, "group_size": 0, "kind": "fp8"},
        {"bits": 8, "group_size": 32, "kind": "fp8"},
        {"bits": 8, "group_size": 32, "per_tensor": True},
    ],
)
def test_weights_that_nothing_stores(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"fp8|whole row"):
        WeightFormat(**fields)  # type: ignore[arg-type]
