"""The ONNX Runtime engine: model.onnx and weights.bin, from a canonical checkpoint.

Knows the checkpoint and the folder it writes. Does not need onnxruntime: an engine can be built where none runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

from llmc import manifest as manifests
from llmc import names
from llmc.builders import onnx_decoder, onnx_linear, ort_devices
from llmc.builders.ort_devices import ACCURACY_LEVELS, DEVICES, Arithmetic
from llmc.checkpoint import Checkpoint, copy_tokenizer
from llmc.engine import CacheType, DeviceName, Engine
from llmc.errors import UserError
from llmc.recipe import KVCacheFormat


def build(
    source: Path,
    target: Path,
    *,
    max_length: int | None = None,
    device: DeviceName = "cpu",
    kv_cache: CacheType | None = None,
    arithmetic: Arithmetic | None = None,
    lora: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> Engine:
    """Build the engine folder `target` from the checkpoint `source`.

    Args:
        max_length: Tokens of the longest sequence; by default what the model was made for. Scalings of the rotary
            embedding that depend on the context's length (dynamic, longrope) are fixed for this one.
        device: What the engine is for; it says in which type it computes (builders/ort_devices.py).
        kv_cache: By default int8 when the checkpoint has scales for it, else the type that the engine computes in.
        arithmetic: Of products with quantized weights; by default the device's first. int8 is the faster on a CPU: each
            row of the input is quantized on the way, so that its result depends a little on the rows beside it.
        lora: Low-rank adapters can be served beside it (llmc/adapter.py). Steps without one take a little longer.
        progress: Told the bytes of weights written so far, and of all.

    Raises:
        ManifestError, CheckpointError: `source` is not a whole checkpoint, or a weight does not fit float16.
        UserError: `target` exists, or an option does not fit the checkpoint or the device.
    """
    checkpoint, arithmetic = Checkpoint(source), ort_devices.arithmetic(device, arithmetic)
    engine = _engine(checkpoint, device, max_length, kv_cache, ACCURACY_LEVELS[arithmetic], lora=lora)
    with manifests.creating(target, overwrite=overwrite) as folder:
        graph = onnx_decoder.draw(
            checkpoint.spec,
            checkpoint.recipe,
            checkpoint.__getitem__,
            max_length=engine.max_length,
            kv_int8=engine.kv_cache == "int8",
            accuracy_level=ACCURACY_LEVELS[arithmetic],
            adapters=lora,
            compute=engine.compute,
            fused_experts=DEVICES[device].fused_experts,
        )
        graph.save(folder, progress)
        engine.save(folder)
        copy_tokenizer(source, folder)
        manifests.seal(
            folder,
            manifests.Manifest(
                kind="engine",
                tools=manifests.tools("onnx-ir", "onnx"),
                settings={
                    "max_length": engine.max_length,
                    "device": device,
                    "kv_cache": engine.kv_cache,
                    "arithmetic": arithmetic,
                },
                parents=(manifests.parent(source),),
            ),
        )
    return engine


def _engine(
    checkpoint: Checkpoint,
    device: DeviceName,
    max_length: int | None,
    kv_cache: CacheType | None,
    accuracy_level: int,
    *,
    lora: bool,
) -> Engine:
    """What the options make of a checkpoint."""
    source, spec, compute = checkpoint.folder, checkpoint.spec, DEVICES[device].compute
    if kv_cache not in (None, "int8", compute):
        raise UserError(f"--kv-cache {kv_cache} is not for --device {device}: {compute} or int8")
    form = checkpoint.recipe.kv_cache if checkpoint.recipe else None
    if form is not None and kv_cache != compute:
        _check_cache(source, form, compute)
    if kv_cache == "int8" and form is None:
        raise UserError(
            f"{source} has no scales for an int8 KV cache: make them with "
            f"`llmc quantize {source} OUT --algo none --kv-cache int8 --calibration TEXT`"
        )
    if max_length is not None and not 0 < max_length <= spec.max_positions:
        raise UserError(f"--max-length {max_length}: {source} was made for 1 to {spec.max_positions} tokens")
    kv_cache = kv_cache or ("int8" if form else compute)
    ort_devices.check(device, checkpoint, kv_int8=kv_cache == "int8", adapters=lora)
    counts, kernels = _formats(checkpoint, device, accuracy_level)
    return Engine(
        backend="ort",
        spec=spec,
        max_length=max_length or spec.max_positions,
        device=device,
        compute=compute,
        kv_cache=kv_cache,
        weights=counts,
        kernels=kernels,
        lora=lora,
    )


def _check_cache(source: Path, form: KVCacheFormat, compute: str) -> None:
    """GroupQueryAttention takes k_scale and v_scale as inputs, per tensor or per channel, and gives none back: what it
    writes it quantizes with scales that were there before. float8 is among the operator's types, but not among those of
    its CPU kernel (onnxruntime 1.31), and on CUDA nobody has tried it."""
    instead = f"or build with --kv-cache {compute}"
    if form.kind == "fp8":
        raise UserError(
            f"{source} was made for an fp8 KV cache, which engines do not keep (ONNX Runtime does on CUDA only): "
            f"quantize with --kv-cache int8, {instead}"
        )
    if form.scale == "dynamic":
        raise UserError(
            f"{source} was made for a KV cache with dynamic scales, and ONNX Runtime's GroupQueryAttention has stored "
            f"ones alone, per tensor or per channel: quantize with --kv-scale channel (or head), {instead}"
        )


def _formats(checkpoint: Checkpoint, device: str, accuracy_level: int) -> tuple[dict[str, int], dict[str, str]]:
    """How many matrices are stored in each way, and what computes them."""
    found: Counter[str] = Counter()
    kernels: dict[str, str] = {}
    recipe = checkpoint.recipe
    for matrix in names.matrices(checkpoint.spec):
        forms = (recipe.format_of(matrix), recipe.inputs_of(matrix)) if recipe else (None, None)
        label, kernel = onnx_linear.kernel(*forms, accuracy_level, DEVICES[device].compute)
        if recipe and recipe.is_ordered(matrix):
            label, kernel = f"{label} in act-order", f"Gather of the inputs, {kernel}"
        elif checkpoint.spec.moe and forms[1] is None and DEVICES[device].fused_experts:
            kernel = kernel.replace("MatMulNBits", "MatMulNBits (of whole mixtures QMoE)")
        found[label] += 1
        kernels[label] = kernel
    return dict(found), kernels
