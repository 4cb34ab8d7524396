"""One door for every format out: what `llmc export` calls. A format is a row of the table."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path

from llmc.converters.rules import Progress
from llmc.errors import UserError
from llmc.manifest import Manifest


@dataclass(frozen=True, slots=True)
class Format:
    """What a checkpoint can be written as.

    Attributes:
        module: Which has `export(folder, out, *, overwrite, progress)`, and `kind` as well where there are kinds.
        about: One line, for people.
        next: What to do with the outcome; `{out}` stands for its folder, `{checkpoint}` for what it was made from.
        kinds: Types of number to choose from; none where the tensors stay as they are, to the bit.
        quantized: It takes quantized checkpoints, and no others.
    """

    module: str
    about: str
    next: str
    kinds: tuple[str, ...] = ()
    quantized: bool = False


FORMATS = {
    "hf": Format(
        "llmc.converters.native",
        "Hugging Face, for transformers",
        "llmc verify {checkpoint} {out}",
    ),
    "original": Format(
        "llmc.converters.hf",
        "Hugging Face, as the model's authors publish it",
        "llmc convert {out} CHECKPOINT",
    ),
    "paddle": Format(
        "llmc.converters.paddle",
        "PaddleNLP",
        "python -c 'import paddlenlp.transformers as t; t.AutoModelForCausalLM.from_pretrained(\"{out}\")'",
    ),
    "gguf": Format(
        "llmc.converters.gguf_writer",
        "one file for llama.cpp",
        "llama-cli -m {out}/model.gguf",
        ("f32", "f16", "bf16", "q8_0", "q4_0"),
    ),
    "gptq": Format(
        "llmc.converters.layouts.gptq",
        "AutoGPTQ's packed weights, for transformers with gptqmodel, vLLM and others",
        "python -c 'import transformers as t; t.AutoModelForCausalLM.from_pretrained(\"{out}\")'",
        quantized=True,
    ),
    "awq": Format(
        "llmc.converters.layouts.awq",
        "AutoAWQ's packed weights, for transformers with gptqmodel, vLLM and others",
        "python -c 'import transformers as t; t.AutoModelForCausalLM.from_pretrained(\"{out}\")'",
        quantized=True,
    ),
    "compressed-tensors": Format(
        "llmc.converters.layouts.compressed_tensors",
        "packed weights for transformers with compressed-tensors, and vLLM",
        "python -c 'import transformers as t; t.AutoModelForCausalLM.from_pretrained(\"{out}\")'",
        quantized=True,
    ),
    "modelopt": Format(
        "llmc.converters.layouts.modelopt",
        "NVIDIA Model Optimizer's unified checkpoint, for TensorRT-LLM and vLLM",
        "llmc convert {out} CHECKPOINT",
        quantized=True,
    ),
}


def export(
    form: str,
    folder: Path,
    out: Path,
    *,
    kind: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Write a checkpoint as one of `FORMATS`.

    Args:
        kind: Type of number; None leaves each tensor in its own.

    Raises:
        UserError: There is no such format, or it has no such kind, or `out` exists.
        LlmcError: See the `export` of each module in the table.
    """
    if form not in FORMATS:
        raise UserError(f"the format is {form!r}; choose one of {', '.join(FORMATS)}", param="format")
    chosen = FORMATS[form]
    if kind is not None and kind not in chosen.kinds:
        kinds = f"has the types {', '.join(chosen.kinds)}" if chosen.kinds else "leaves tensors in their own type"
        raise UserError(f"the type is {kind!r}, and the format '{form}' {kinds}", param="type")
    settings = {} if kind is None else {"kind": kind}
    module = importlib.import_module(chosen.module)
    made: Manifest = module.export(folder, out, overwrite=overwrite, progress=progress, **settings)
    return made
