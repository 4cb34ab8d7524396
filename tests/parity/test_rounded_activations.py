"""Engines with rounded activations against the reference decoder that rounds in the same places: every format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from logits import engine_logits, reference_logits

from llmc.builders import onnx_inputs
from llmc.builders import ort as builder
from llmc.builders.onnx_graph import Graph
from llmc.checkpoint import Checkpoint
from llmc.quant.quantize import Calibration, quantize
from llmc.recipe import ActivationFormat, QuantRecipe, WeightFormat

TOLERANCE = 0.005  # mean distance of logits, of their standard deviation; most cases are below 1e-6
ROWS, FP8 = WeightFormat(bits=8, group_size=0), WeightFormat(kind="fp8", bits=8, group_size=0)
OUTSIDE = WeightFormat(bits=8, group_size=32)


def recipe(algorithm: str, weights: WeightFormat = ROWS, kind: Any = "int8", dynamic: bool = True, **more: Any) -> Any:
    inputs = ActivationFormat(kind=kind, dynamic=dynamic)
    return QuantRecipe(algorithm=algorithm, weights=weights, outside=OUTSIDE, activations=inputs, **more)


GROUPS = WeightFormat(bits=4, group_size=32)
ZEROS = WeightFormat(bits=4, group_size=32, symmetric=False)
PER_TENSOR = FP8.model_copy(update={"per_tensor": True})
CASES = {
    "w8a8 dynamic": (["qwen2", "opt-350m", "mixtral"], recipe("w8a8")),
    "w8a8 static": (["llama-bias", "qwen3", "qwen2-moe"], recipe("w8a8", dynamic=False)),
    "smoothquant": (
        ["qwen2.5-tied", "gpt2", "gemma3-tied", "qwen3-moe-sparse"],
        recipe("smoothquant", dynamic=False, options={"steps": 4}),
    ),
    "smoothquant, dynamic, in pieces": (["llama"], recipe("smoothquant", options={"pieces": 2})),
    "shifted": (
        ["qwen2", "gpt2", "mixtral", "bloom"],
        recipe("smoothquant", dynamic=False, options={"alpha": 0.5, "shift": True}),
    ),
    "fp8 dynamic": (["mixtral", "baichuan2-7b"], recipe("fp8", FP8, "fp8")),
    "fp8 static": (["gpt2"], recipe("fp8", FP8, "fp8", dynamic=False)),
    "fp8 per tensor": (["qwen2.5-tied"], recipe("fp8", PER_TENSOR, "fp8", dynamic=False)),
    "fp8 everywhere": (["llama-tied"], recipe("fp8", FP8, "fp8").model_copy(update={"outside": None})),
    "fp8 weights alone": (["qwen3"], QuantRecipe(algorithm="fp8", weights=FP8)),
    "w4a8": (["llama", "mixtral"], recipe("rtn", GROUPS)),
    "w4a8 with zero points": (["qwen2", "llama"], recipe("rtn", ZEROS)),
    "w4a8 in fp8": (["llama"], recipe("rtn", GROUPS, "fp8")),
    "some kept": (["qwen2"], recipe("w8a8", keep=("layers.0.attn.q", "layers.*.mlp.down"))),
}
ALL = [(case, name) for case, (models, _) in CASES.items() for name in models]


@pytest.mark.parametrize(("case", "name"), ALL, ids=[f"{case}-{name}" for case, name in ALL])
def test_engine(case: str, name: str, tmp_path: Path, tiny_checkpoint: Callable[[str], Path]) -> None:
    how = CASES[case][1]
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog and there the other user was " * 9, encoding="utf-8")
    needs_text = how.algorithm == "smoothquant" or (how.activations and not how.activations.dynamic)
    calibration = Calibration(path=text, tokens=256) if needs_text else None
    quantize(tiny_checkpoint(name), tmp_path / "quantized", how, calibration=calibration)
    builder.build(tmp_path / "quantized", tmp_path / "engine", arithmetic="float32")
    whole, chunked = engine_logits(tmp_path / "engine")
    expected, exact = reference_logits(tmp_path / "quantized"), reference_logits(tiny_checkpoint(name))
    # A value within float error of the middle between two codes may fall to either side; the mean tells.
    assert np.abs(whole - expected).mean() < TOLERANCE * expected.std()
    # Nor does it matter what else is computed in the same step.
    assert np.abs(chunked - whole).mean() < 1e-5 * expected.std()
    assert np.abs(exact - expected).mean() > 0.015 * expected.std()


def test_codes_as_large_as_can_be(tmp_path: Path) -> None:
    """Nothing overflows: where the CPU has no VNNI, the runner's session option is what keeps this so."""
    graph = Graph("product")
    x = graph.input("codes", ir.DataType.UINT8, ["rows", 256])
    weights = [graph.constant("w", np.full((256, 32), 127, np.int8)), graph.constant("s", np.ones(32, np.float32))]
    scale = graph.constant("scale", np.asarray(np.float32(1)))
    graph.output(onnx_inputs.product(graph, x, scale, weights, None, "/y"), "y", ir.DataType.FLOAT, ["rows", 32])
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    graph.save(tmp_path)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", options)
    codes = np.stack([np.full(256, 255, np.uint8), np.zeros(256, np.uint8)])
    np.testing.assert_array_equal(session.run(None, {"codes": codes})[0][:, 0], [256 * 127 * 127, -256 * 127 * 128])


@pytest.mark.parametrize("per_tensor", [False, True])
def test_an_engine_holds_fp8(per_tensor: bool, tmp_path: Path, tiny_checkpoint: Callable[[str], Path]) -> None:
    how = recipe("fp8", PER_TENSOR if per_tensor else FP8, "fp8")
    quantize(tiny_checkpoint("llama"), tmp_path / "quantized", how)
    engine = builder.build(tmp_path / "quantized", tmp_path / "engine")
    graph = onnx.load(tmp_path / "engine/model.onnx", load_external_data=False).graph
    stored = [each.name for each in graph.initializer if each.data_type == onnx.TensorProto.FLOAT8E4M3FN]
    assert len(stored) == 2 * 5  # q, k and v in one
    assert any("fp8" in label and "multiplies no fp8" in kernel for label, kernel in engine.kernels.items())
    codes = Checkpoint(tmp_path / "quantized")["layers.0.mlp.up.qweight"]
    assert codes.dtype == ml_dtypes.float8_e4m3fn
    assert np.abs(codes.astype(np.float32)).max() == 448
