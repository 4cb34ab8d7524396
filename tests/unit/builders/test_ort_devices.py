"""Engines for CUDA: what is refused, what the options become, and what happens to numbers that float16 cannot hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest

from llmc.builders import ort as builder
from llmc.builders.onnx_graph import Graph
from llmc.builders.ort_devices import DEVICES
from llmc.checkpoint import Checkpoint
from llmc.cli import main
from llmc.engine import describe
from llmc.errors import CheckpointError, UserError
from llmc.quant.corpus import Calibration
from llmc.quant.quantize import quantize
from llmc.recipe import BLOCKS, ActivationFormat, KVCacheFormat, QuantRecipe, WeightFormat
from llmc.serve.runners import ort_devices

ROWS, GROUPS = WeightFormat(bits=8, group_size=0), WeightFormat(bits=4, group_size=32)
INT8, FP8 = ActivationFormat(), WeightFormat(kind="fp8", bits=8, group_size=0)
KV = KVCacheFormat()

# What is asked for -> (model, recipe, options of the builder, what the message names).
REFUSED: dict[str, tuple[str, QuantRecipe | None, dict[str, Any], str]] = {
    "int8 rows": (
        "llama",
        QuantRecipe(algorithm="w8a8", weights=ROWS, activations=INT8, keep=("embed", "head")),
        {},
        "MatMulIntegerToFloat.* has no CUDA kernel: quantize with --algo rtn, awq or gptq",
    ),
    "rounded inputs": (
        "llama",
        QuantRecipe(algorithm="rtn", weights=GROUPS, activations=INT8),
        {},
        "rounds what linears read.* without --activations, or build with --device cpu",
    ),
    "fp8 weights": ("llama", QuantRecipe(algorithm="fp8", weights=FP8), {}, "fp8 weights.*--algo rtn"),
    "odd zero points": (
        "llama",
        QuantRecipe(algorithm="rtn", weights=WeightFormat(bits=4, group_size=64, symmetric=False)),
        {},
        "odd number of groups.*--symmetric or another --group-size",
    ),
    "biased scores, int8 cache": ("bloom", QuantRecipe(algorithm="none", kv_cache=KV), {}, "--kv-cache float16"),
    **{
        kind: (
            "llama",
            QuantRecipe(
                algorithm=kind,
                weights=WeightFormat(kind=kind, bits=form.bits, group_size=form.size),  # type: ignore[arg-type]
                outside=GROUPS,
            ),
            {},
            f"has {kind} weights, which no engine of llmc multiplies: export it",
        )
        for kind, form in BLOCKS.items()
    },
    "adapters": ("llama", None, {"lora": True}, "merge one with `llmc convert ADAPTER OUT --base MODEL`"),
}


@pytest.mark.parametrize("asked", REFUSED)
def test_what_has_no_kernel_is_refused(
    asked: str, tmp_path: Path, tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And built for the CPU all the same, unless that has no kernel either."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)  # else `quantize` refuses before
    name, recipe, options, message = REFUSED[asked]
    source = tiny_checkpoint(name)
    if recipe:
        text = tmp_path / "text.txt"
        text.write_text("the quick brown fox jumps over the lazy dog. " * 20, encoding="utf-8")
        calibration = Calibration(path=text) if recipe.kv_cache else None
        quantize(source, tmp_path / "q", recipe, calibration=calibration)
        source = tmp_path / "q"
    with pytest.raises(UserError, match=f"--device cuda: .*{message}"):
        builder.build(source, tmp_path / "engine", device="cuda", **options)
    assert not (tmp_path / "engine").exists()
    if asked not in DEVICES["cpu"].refused:
        assert builder.build(source, tmp_path / "engine", **options).device == "cpu"


def test_every_refusal_was_tried() -> None:
    assert set(REFUSED) == {asked for device in DEVICES.values() for asked in device.refused}


def test_biased_scores_beside_a_cache_of_what_is_computed(
    tmp_path: Path, tiny_checkpoint: Callable[[str], Path]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 20, encoding="utf-8")
    recipe = QuantRecipe(algorithm="none", kv_cache=KV)
    quantize(tiny_checkpoint("bloom"), tmp_path / "q", recipe, calibration=Calibration(path=text))
    engine = builder.build(tmp_path / "q", tmp_path / "engine", device="cuda", kv_cache="float16")
    assert engine.kv_cache == "float16"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cuda", "kv_cache": "float32"}, "--kv-cache float32 is not for --device cuda: float16 or int8"),
        ({"kv_cache": "float16"}, "--kv-cache float16 is not for --device cpu: float32 or int8"),
        ({"device": "cuda", "arithmetic": "int8"}, "--arithmetic int8 is not for --device cuda: float16"),
        ({"arithmetic": "float16"}, "--arithmetic float16 is not for --device cpu: int8 or float32"),
    ],
)
def test_types_of_another_device(
    options: dict[str, Any], message: str, tmp_path: Path, tiny_checkpoint: Callable[[str], Path]
) -> None:
    with pytest.raises(UserError, match=message):
        builder.build(tiny_checkpoint("llama"), tmp_path / "engine", **options)


def saved(tmp_path: Path, values: np.ndarray, dtype: Any = np.float16) -> np.ndarray:
    """A weight as a graph in float16 writes it."""
    graph = Graph("one", np.float16)
    graph.weight("layers.0.attn.q.weight", dtype, values.shape, lambda: values)
    graph.save(tmp_path)
    return np.fromfile(tmp_path / "weights.bin", dtype).reshape(values.shape)


def test_what_overflows_is_an_error_that_names_it(tmp_path: Path) -> None:
    assert saved(tmp_path, np.float32([1, -65504]))[1] == -65504
    for values in (np.float32([1, 65520]), np.float32([-1e30, 0]), np.float32([np.inf, 1])):
        with pytest.raises(CheckpointError, match=r"'layers\.0\.attn\.q\.weight' has values of .*65504.*--device cpu"):
            saved(tmp_path, values)


def test_what_becomes_nothing_is_an_error_unless_the_rest_hides_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    scales = rng.uniform(1e-3, 1e-2, 1000).astype(np.float32)
    # A row of the embedding that was never trained.
    scales[:10] = 1e-12
    found = saved(tmp_path, scales)
    assert (found[:10] == 0).all()
    np.testing.assert_allclose(found[10:], scales[10:], rtol=2**-11)
    for size in (1e-12, 1e-7):
        with pytest.raises(CheckpointError, match=r"'layers\.0\.attn\.q\.weight', at most .* too small for float16"):
            saved(tmp_path, scales[10:] * np.float32(size * 100))
    assert (saved(tmp_path, np.zeros(4, np.float32)) == 0).all()


def test_other_types_pass_as_they_are(tmp_path: Path) -> None:
    codes = np.arange(4, dtype=np.uint8)
    np.testing.assert_array_equal(saved(tmp_path, codes, np.uint8), codes)
    fp8 = np.float32([1, 2]).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(saved(tmp_path, fp8, fp8.dtype), fp8)
    np.testing.assert_array_equal(saved(tmp_path, np.float64([1e-30, 1e30]), np.float32), np.float32([1e-30, 1e30]))
    with pytest.raises(ValueError, match="was declared float16"):
        saved(tmp_path, codes)


def test_a_model_that_overflows_leaves_no_engine(
    tmp_path: Path, tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    load = Checkpoint.__getitem__

    def large(checkpoint: Checkpoint, name: str) -> Any:
        return load(checkpoint, name) * (1e6 if name == "layers.1.mlp.down.weight" else 1)

    monkeypatch.setattr(Checkpoint, "__getitem__", large)
    with pytest.raises(CheckpointError, match=r"'layers\.1\.mlp\.down\.weight' has values of"):
        builder.build(tiny_checkpoint("llama"), tmp_path / "engine", device="cuda")
    assert not list(tmp_path.iterdir())
    builder.build(tiny_checkpoint("llama"), tmp_path / "engine")


@pytest.mark.parametrize(
    ("options", "best", "device", "compute"),
    [
        ([], "cpu", "cpu", "float32"),
        ([], "cuda", "cuda", "float16"),
        (["--device", "cuda"], "cpu", "cuda", "float16"),
        (["--device", "cpu"], "cuda", "cpu", "float32"),
    ],
)
def test_the_command_chooses_and_says_so(
    options: list[str],
    best: str,
    device: str,
    compute: str,
    tmp_path: Path,
    tiny_checkpoint: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(ort_devices, "best", lambda: best)
    with pytest.raises(SystemExit, match="0"):
        main(["build-engine", str(tiny_checkpoint("llama")), str(tmp_path / "engine"), *options])
    assert f"  device     {device}, computes in {compute}\n" in (out := capsys.readouterr().out)
    assert f"  KV cache   {compute}, up to 256 tokens" in out
    assert f"{compute}: Gemm in {compute}" in out
    engine = describe(tmp_path / "engine")
    assert (engine.device, engine.compute, engine.kv_cache) == (device, compute, compute)


def test_embeddings_have_zero_points_in_any_case(tmp_path: Path, tiny_checkpoint: Callable[[str], Path]) -> None:
    """Even if all are the middle: without them CUDA's kernel takes zero."""
    for bits, byte in ((4, 0x88), (8, 0x80)):
        recipe = QuantRecipe(algorithm="rtn", weights=WeightFormat(bits=bits, group_size=32))  # type: ignore[arg-type]
        quantize(tiny_checkpoint("qwen2.5-tied"), tmp_path / f"q{bits}", recipe)
        for device in ("cpu", "cuda"):
            builder.build(tmp_path / f"q{bits}", folder := tmp_path / f"{device}{bits}", device=device)
            graph = onnx.load(folder / "model.onnx").graph
            (node,) = (node for node in graph.node if node.op_type == "GatherBlockQuantized")
            assert len(node.input) == 4
            (zeros,) = (onnx.numpy_helper.to_array(each) for each in graph.initializer if each.name == node.input[3])
            assert zeros.shape == (320, bits // 4)
            assert (zeros == byte).all()
            heads = [node for node in graph.node if node.name == "/head"]
            assert [(head.op_type, head.input[3:4]) for head in heads] in (
                [("MatMulNBits", [])],
                [("MatMulNBits", [""])],
            )


def test_it_is_smaller(tmp_path: Path, tiny_checkpoint: Callable[[str], Path]) -> None:
    for device in ("cpu", "cuda"):
        builder.build(tiny_checkpoint("llama"), tmp_path / device, device=device)
    wide, narrow = ((tmp_path / device / "weights.bin").stat().st_size for device in ("cpu", "cuda"))
    assert narrow == pytest.approx(wide / 2, rel=0.02)
    graphs = [onnx.load(tmp_path / device / "model.onnx", load_external_data=False) for device in ("cpu", "cuda")]
    added = [node.op_type for node in graphs[1].graph.node][len(graphs[0].graph.node) :]
    assert len(added) == 2
    assert [node.name for node in graphs[1].graph.node if "float32" in node.name] == [
        "/hidden/float32",
        "/head/float32",
    ]
