"""The ONNX Runtime engine: model.onnx and weights.bin, from a canonical checkpoint.

Knows the checkpoint and the folder it writes. Does not need onnxruntime: an engine can be built where none runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from llmc import manifest as manifests
from llmc import names
from llmc.builders import onnx_decoder, onnx_linear
from llmc.checkpoint import Checkpoint, copy_tokenizer
from llmc.engine import Engine
from llmc.errors import UserError
from llmc.recipe import KVCacheFormat

# MatMulNBits' accuracy_level by the arithmetic of quantized products.
ACCURACY_LEVELS = {"int8": onnx_linear.INT8_ARITHMETIC, "float32": 1}


def build(
    source: Path,
    target: Path,
    *,
    max_length: int | None = None,
    kv_cache: Literal["float32", "int8"] | None = None,
    arithmetic: Literal["int8", "float32"] = "int8",
    lora: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> Engine:
    """Build the engine folder `target` from the checkpoint `source`.

    Args:
        max_length: Tokens of the longest sequence; by default what the model was made for. Scalings of the rotary
            embedding that depend on the context's length (dynamic, longrope) are fixed for this one.
        kv_cache: By default int8 when the checkpoint has scales for it.
        arithmetic: Of products with quantized weights. int8 is the faster: each row of the input is quantized on the
            way, so that its result depends a little on the rows beside it.
        lora: Low-rank adapters can be served beside the model (llmc/adapter.py). Without one in use a step takes a
            little longer.
        progress: Told the bytes of weights written so far, and of all.

    Raises:
        ManifestError, CheckpointError: `source` is not a whole checkpoint.
        UserError: `target` exists, or an option does not fit the checkpoint.
    """
    checkpoint = Checkpoint(source)
    engine = _engine(checkpoint, max_length, kv_cache, ACCURACY_LEVELS[arithmetic]).model_copy(update={"lora": lora})
    with manifests.creating(target, overwrite=overwrite) as folder:
        graph = onnx_decoder.draw(
            checkpoint.spec,
            checkpoint.recipe,
            checkpoint.__getitem__,
            max_length=engine.max_length,
            kv_int8=engine.kv_cache == "int8",
            accuracy_level=ACCURACY_LEVELS[arithmetic],
            adapters=lora,
        )
        graph.save(folder, progress)
        engine.save(folder)
        copy_tokenizer(source, folder)
        manifests.seal(
            folder,
            manifests.Manifest(
                kind="engine",
                tools=manifests.tools("onnx-ir", "onnx"),
                settings={"max_length": engine.max_length, "kv_cache": engine.kv_cache, "arithmetic": arithmetic},
                parents=(manifests.parent(source),),
            ),
        )
    return engine


def _engine(
    checkpoint: Checkpoint, max_length: int | None, kv_cache: Literal["float32", "int8"] | None, accuracy_level: int
) -> Engine:
    """What the options make of a checkpoint."""
    source, spec = checkpoint.folder, checkpoint.spec
    form = checkpoint.recipe.kv_cache if checkpoint.recipe else None
    _check_weights(checkpoint)
    if form is not None and kv_cache != "float32":
        _check_cache(source, form)
    if kv_cache == "int8" and form is None:
        raise UserError(
            f"{source} has no scales for an int8 KV cache: make them with "
            f"`llmc quantize {source} OUT --algo none --kv-cache int8 --calibration TEXT`"
        )
    if max_length is not None and not 0 < max_length <= spec.max_positions:
        raise UserError(f"--max-length {max_length}: {source} was made for 1 to {spec.max_positions} tokens")
    counts, kernels = _formats(checkpoint, accuracy_level)
    return Engine(
        backend="ort",
        spec=spec,
        max_length=max_length or spec.max_positions,
        kv_cache=kv_cache or ("int8" if form else "float32"),
        weights=counts,
        kernels=kernels,
    )


def _check_weights(checkpoint: Checkpoint) -> None:
    """No operator multiplies blocks of floating-point numbers on a CPU (onnxruntime 1.31)."""
    recipe = checkpoint.recipe
    forms = [recipe.format_of(matrix) for matrix in names.matrices(checkpoint.spec)] if recipe else []
    if kinds := sorted({form.kind for form in forms if form and form.blocks}):
        source = checkpoint.folder
        raise UserError(
            f"{source} has {' and '.join(kinds)} weights, which no CPU kernel of ONNX Runtime multiplies: export it "
            f"for an engine on CUDA (llmc export {source} OUT --format modelopt), or quantize for this one with rtn, "
            "gptq, awq, w8a8, smoothquant or fp8"
        )


def _check_cache(source: Path, form: KVCacheFormat) -> None:
    """GroupQueryAttention takes k_scale and v_scale as inputs, per tensor or per channel, and gives none back: what it
    writes it quantizes with scales that were there before. float8 is among the operator's types, but not among those of
    its CPU kernel (onnxruntime 1.31)."""
    instead = "or build with --kv-cache float32"
    if form.kind == "fp8":
        raise UserError(
            f"{source} was made for an fp8 KV cache, which ONNX Runtime keeps on CUDA only: quantize with "
            f"--kv-cache int8 for a CPU, {instead}"
        )
    if form.scale == "dynamic":
        raise UserError(
            f"{source} was made for a KV cache with dynamic scales, and ONNX Runtime's GroupQueryAttention has stored "
            f"ones alone, per tensor or per channel: quantize with --kv-scale channel (or head), {instead}"
        )


def _formats(checkpoint: Checkpoint, accuracy_level: int) -> tuple[dict[str, int], dict[str, str]]:
    """How many matrices are stored in each way, and what computes them."""
    found: Counter[str] = Counter()
    kernels: dict[str, str] = {}
    recipe = checkpoint.recipe
    for matrix in names.matrices(checkpoint.spec):
        forms = (recipe.format_of(matrix), recipe.inputs_of(matrix)) if recipe else (None, None)
        label, kernel = onnx_linear.kernel(*forms, accuracy_level)
        if recipe and recipe.is_ordered(matrix):
            label, kernel = f"{label} in act-order", f"Gather of the inputs, {kernel}"
        elif checkpoint.spec.moe and forms[1] is None:
            kernel = kernel.replace("MatMulNBits", "MatMulNBits (of whole mixtures QMoE)")
        found[label] += 1
        kernels[label] = kernel
    return dict(found), kernels
