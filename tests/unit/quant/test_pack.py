"""llmc.quant.pack: round trips, and what ONNX Runtime makes of the same bytes."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from llmc.quant import pack
from llmc.quant.rtn import quantize
from llmc.recipe import ActivationFormat, QuantRecipe, WeightFormat, packed_plan

FORMATS = [
    WeightFormat(bits=bits, group_size=group_size, symmetric=symmetric)
    for bits in (4, 8)
    for group_size in (16, 32, 128)
    for symmetric in (True, False)
]


@settings(deadline=None)
@given(st.sampled_from([4, 8]), hnp.arrays(np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=40)))
def test_codes_come_back(bits: int, values: np.ndarray) -> None:
    codes = values >> (8 - bits)
    packed = pack.pack_codes(codes, bits)
    assert packed.shape == (len(codes), -(-codes.shape[1] * bits // 8))
    np.testing.assert_array_equal(pack.unpack_codes(packed, bits, codes.shape[1]), codes)


def test_low_bits_come_first() -> None:
    assert pack.pack_codes(np.array([[1, 2, 3]], np.uint8), 4).tolist() == [[0x21, 0x03]]


@pytest.mark.parametrize("weight_format", FORMATS, ids=str)
@pytest.mark.parametrize("in_features", [16, 96, 130])
def test_shapes_are_those_of_the_plan(weight_format: WeightFormat, in_features: int) -> None:
    weights = np.random.default_rng(0).normal(size=(5, in_features)).astype(np.float32)
    packed = quantize(weights, weight_format)
    recipe = QuantRecipe(algorithm="rtn", weights=weight_format)
    planned = packed_plan(recipe, "layers.0.attn.q.weight", weights.shape, None)
    met = {name: (values.dtype, values.shape) for name, values in packed.pieces("layers.0.attn.q")}
    assert met == {name: (info.dtype, info.shape) for name, info in planned.items()}


@pytest.mark.parametrize("weight_format", FORMATS, ids=str)
@pytest.mark.parametrize("in_features", [16, 96, 130])
def test_runtime_reads_the_same_values(weight_format: WeightFormat, in_features: int) -> None:
    """An identity through MatMulNBits gives the matrix that we say the bytes stand for."""
    out_features = 7
    generator = np.random.default_rng(1)
    weights = generator.normal(0.3, 1, (out_features, in_features)).astype(np.float32)
    packed = quantize(weights, weight_format)
    ours = pack.dequantize(packed.qweight, packed.scale, packed.zero, weight_format, in_features)
    theirs = matmul_n_bits(packed, weight_format, np.eye(in_features, dtype=np.float32)).T
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)
    assert 0 < np.abs(ours - weights).max() < packed.scale.max()


@pytest.mark.parametrize("weight_format", FORMATS, ids=str)
@pytest.mark.parametrize("in_features", [16, 96, 130])
def test_inputs_in_another_order(weight_format: WeightFormat, in_features: int) -> None:
    """What stands for x is what stands for x[order] on an input that is x[order]."""
    generator = np.random.default_rng(2)
    weights, x = (generator.normal(size=(count, in_features)).astype(np.float32) for count in (5, 3))
    order = generator.permutation(in_features).astype(np.int32)
    packed = quantize(np.ascontiguousarray(weights[:, order]), weight_format)
    values = pack.dequantize(packed.qweight, packed.scale, packed.zero, weight_format, in_features, order=order)
    assert np.abs(values - weights).max() < packed.scale.max()
    theirs = matmul_n_bits(packed, weight_format, np.ascontiguousarray(x[:, order]))
    np.testing.assert_allclose(x @ values.T, theirs, atol=1e-4)
    recipe = QuantRecipe(algorithm="imported", weights=weight_format, ordered=("*.q",))
    planned = packed_plan(recipe, "layers.0.attn.q.weight", weights.shape, None)
    kept = pack.Packed(packed.qweight, packed.scale, packed.zero, inputs={"input_order": order})
    met = {name: (values.dtype, values.shape) for name, values in kept.pieces("layers.0.attn.q")}
    assert met == {name: (info.dtype, info.shape) for name, info in planned.items()}


def test_an_order_is_of_inputs_that_are_not_rounded() -> None:
    recipe = QuantRecipe(algorithm="imported", weights=FORMATS[0], ordered=("*",))
    assert recipe.is_ordered("head")
    assert not recipe.is_ordered("embed")  # which reads numbers of rows
    with pytest.raises(ValueError, match="inputs that are rounded are in the model's own order"):
        QuantRecipe(algorithm="imported", weights=FORMATS[0], activations=ActivationFormat(), ordered=("*",))


def matmul_n_bits(packed: pack.Packed, weight_format: WeightFormat, x: np.ndarray) -> np.ndarray:
    """x W^T by ONNX Runtime, fp32 arithmetic."""
    rows, groups = packed.scale.shape
    inputs = {"B": packed.qweight.reshape(rows, groups, -1), "scales": packed.scale}
    if packed.zero is not None:
        inputs["zero_points"] = packed.zero
    node = onnx.helper.make_node(
        "MatMulNBits",
        ["x", *inputs],
        ["y"],
        domain="com.microsoft",
        K=x.shape[1],
        N=rows,
        bits=weight_format.bits,
        block_size=weight_format.group_size,
        accuracy_level=1,
    )
    graph = onnx.helper.make_graph(
        [node],
        "one",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, list(x.shape))],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [len(x), rows])],
        [onnx.numpy_helper.from_array(values, name) for name, values in inputs.items()],
    )
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


@pytest.mark.parametrize("weight_format", [WeightFormat(bits=4, group_size=32)], ids=str)
def test_blocks_of_rows_join(weight_format: WeightFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    """Worked on in blocks, by several threads, a matrix comes out as it does in one piece."""
    weights = np.random.default_rng(2).normal(size=(50, 96)).astype(np.float32)
    whole = quantize(weights, weight_format)
    exact = pack.dequantize(whole.qweight, whole.scale, None, weight_format, 96)
    monkeypatch.setattr(pack, "_BLOCK", 96 * 7)
    cut = quantize(weights, weight_format)
    np.testing.assert_array_equal(whole.qweight, cut.qweight)
    np.testing.assert_array_equal(whole.scale, cut.scale)
    np.testing.assert_array_equal(pack.dequantize(cut.qweight, cut.scale, None, weight_format, 96), exact)
