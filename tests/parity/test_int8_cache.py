"""The reference decoder with a simulated int8 cache against ONNX Runtime's kernel with a real one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from llmc.builders import ort
from llmc.errors import UserError
from llmc.evaluate.reference import open_reference
from llmc.quant.corpus import Calibration
from llmc.quant.quantize import quantize
from llmc.recipe import KVCacheFormat, QuantRecipe
from llmc.runtime import Chunk, Runner
from llmc.serve.runners import open_runner
from llmc.tokenizer import Tokenizer

TEXT = "the quick brown fox jumps over the lazy dog and there the other user was in it. " * 10


@pytest.mark.parametrize(
    "name", ["llama", "llama-yarn", "mistral-window", "qwen2", "qwen3", "gpt2", "bloom", "chatglm-6b"]
)
def test_simulated_cache_is_the_kernel_s(name: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    agrees(tiny_checkpoint(name), KVCacheFormat(), tmp_path)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("observer", ["max", "average"])
@pytest.mark.parametrize("scale", ["channel", "head"])
def test_stored_scales(
    name: str, scale: str, observer: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    agrees(tiny_checkpoint(name), KVCacheFormat.model_validate({"scale": scale, "observer": observer}), tmp_path)


def quantized(source: Path, form: KVCacheFormat, tmp_path: Path) -> Path:
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    recipe = QuantRecipe(algorithm="none", kv_cache=form)
    calibration = None if form.scale == "dynamic" else Calibration(path=text)
    quantize(source, tmp_path / "q", recipe, calibration=calibration)
    return tmp_path / "q"


def agrees(source: Path, form: KVCacheFormat, tmp_path: Path) -> None:
    quantized(source, form, tmp_path)
    ort.build(tmp_path / "q", tmp_path / "engine")
    tokens = np.array(Tokenizer.load(tmp_path / "q").encode(TEXT)[:60])
    simulated = all_logits(open_reference(tmp_path / "q"), tokens)
    kernel = all_logits(open_runner(tmp_path / "engine", threads=1, max_sequences=1), tokens)
    exact = all_logits(open_reference(source), tokens)
    assert np.abs(simulated - kernel).max() < 1e-4
    assert np.abs(simulated - exact).max() > 1e-2


def all_logits(runner: Runner, tokens: np.ndarray) -> np.ndarray:
    """Computed in a chunk, in single steps, and in a chunk with a past."""
    runner.claim(0, tokens[:1])
    found, start = [], 0
    for size in (20, 1, 1, 38):
        part = tokens[start : start + size]
        found += [logits.copy() for logits in runner.step([Chunk(0, start, part, logits=size)])]
        start += size
    runner.close()
    return np.concatenate(found)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"kind": "fp8"}, "fp8 KV cache, which engines do not keep .*: quantize with --kv-cache int8"),
        ({"scale": "dynamic"}, "has stored ones alone, per tensor or per channel: quantize with --kv-scale channel"),
    ],
)
def test_what_the_kernel_cannot_keep_is_refused(
    form: dict[str, str], message: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """And computed by the reference decoder all the same; an engine with a float32 cache can be built of it."""
    source, kv_cache = tiny_checkpoint("llama"), KVCacheFormat.model_validate(form)
    found = quantized(source, kv_cache, tmp_path)
    with pytest.raises(UserError, match=message):
        ort.build(found, tmp_path / "engine")
    assert ort.build(found, tmp_path / "engine", kv_cache="float32").kv_cache == "float32"
    tokens = np.array(Tokenizer.load(found).encode(TEXT)[:60])
    simulated, exact = all_logits(open_reference(found), tokens), all_logits(open_reference(source), tokens)
    assert 1e-3 < np.linalg.norm(simulated - exact) / np.linalg.norm(exact) < 0.2


def test_onnx_runtime_has_no_fp8_cache_on_a_cpu() -> None:
    """The reason of the refusal: the day this fails, there is a kernel."""
    heads, width = 2, 16
    value = helper.make_tensor_value_info
    cache = ["batch", heads, "past", width]
    node = helper.make_node(
        "GroupQueryAttention",
        ["q", "k", "v", "past_k", "past_v", "last", "total", "", "", "", "", "", "scale", "scale"],
        ["out", "present_k", "present_v"],
        domain="com.microsoft",
        num_heads=heads,
        kv_num_heads=heads,
        kv_cache_bit_width=8,
        k_quant_type="PER_TENSOR",
        v_quant_type="PER_TENSOR",
    )
    int32, float32, fp8 = TensorProto.INT32, TensorProto.FLOAT, TensorProto.FLOAT8E4M3FN

    def session(kind: int) -> onnxruntime.InferenceSession:
        inputs = [value(name, float32, ["batch", "new", heads * width]) for name in ("q", "k", "v")]
        inputs += [value(name, kind, cache) for name in ("past_k", "past_v")]
        inputs += [value("last", int32, ["batch"]), value("total", int32, []), value("scale", float32, [1])]
        outputs = [value("out", float32, None), value("present_k", kind, None), value("present_v", kind, None)]
        graph = helper.make_graph([node], "attention", inputs, outputs)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])

    session(TensorProto.INT8)
    with pytest.raises(Exception, match=r"NOT_IMPLEMENTED|Could not find an implementation"):
        session(fp8)
