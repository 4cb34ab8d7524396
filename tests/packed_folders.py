"""What packed weights in a Hugging Face folder mean to others: the truth that llmc's layouts are compared with.

compressed-tensors' own package unpacks its layout, and AutoAWQ's, which it converts. AutoGPTQ's and Model Optimizer's
are unpacked by what their sources say, an element at a time as they do on a GPU: a shift and a mask.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]


def dequantize(folder: Path, out: Path) -> Path:
    """A folder of the same model with floating-point weights alone; returns `out`."""
    shutil.copytree(folder, out)
    (out / "manifest.json").unlink(missing_ok=True)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    quantization = config.pop("quantization_config")
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    dense = UNPACK[quantization["quant_method"]](load_file(folder / "model.safetensors"), quantization, folder)
    save_file({name: value.contiguous() for name, value in dense.items()}, out / "model.safetensors", {"format": "pt"})
    return out


def modules(tensors: Tensors, marker: str) -> list[str]:
    """Names of packed linears."""
    return [name.removesuffix(f".{marker}") for name in tensors if name.endswith(f".{marker}")]


def has_conv1d(folder: Path) -> bool:
    """Whether the linears of a folder of floating-point numbers would be [in, out]."""
    return bool(json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"] == "gpt2")


def shifted(words: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """int32 words cut into codes along a dimension, the lowest bits first."""
    places = torch.arange(0, 32, bits, dtype=torch.int32)
    codes = (words.unsqueeze(-1) >> places) & (2**bits - 1)
    return codes.movedim(-1, dim + 1).flatten(dim, dim + 1)


def words(codes: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """The inverse of `shifted`."""
    places = torch.arange(0, 32, bits)
    cut = codes.long().unflatten(dim, (-1, 32 // bits)).movedim(dim + 1, -1)
    return (cut << places).sum(-1).to(torch.int32)


def in_act_order(
    folder: Path,
    out: Path,
    *,
    bits: int = 4,
    group_size: int = 32,
    symmetric: bool = True,
    version: str = "gptq",
    shared: bool = True,
    head: bool = False,
) -> Path:
    """A folder of floating-point weights as AutoGPTQ leaves it with `desc_act`, codes by rounding; returns `out`.

    Args:
        head: The head is packed as well (AutoGPTQ's `lm_head`).
        shared: Linears of a module that read inputs of one size have the same order, as where they read the same.
    """
    shutil.copytree(folder, out)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    said = {"quant_method": "gptq", "bits": bits, "group_size": group_size, "sym": symmetric, "desc_act": True}
    config["quantization_config"] = {**said, "checkpoint_format": version}
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors, orders = load_file(folder / "model.safetensors"), dict[object, torch.Tensor]()
    draw = torch.Generator().manual_seed(0)
    linears = [name for name in tensors if is_linear(name, tensors[name]) or (head and name == "lm_head.weight")]
    for name in linears:
        module = name.removesuffix(".weight")
        weight = tensors.pop(name).float()
        weight = weight if has_conv1d(folder) else weight.T
        inputs, outputs = weight.shape
        key = (module.rpartition(".")[0], inputs) if shared else module
        order = orders.setdefault(key, torch.randperm(inputs, generator=draw))
        g_idx = torch.empty(inputs, dtype=torch.int32)
        g_idx[order] = torch.arange(inputs, dtype=torch.int32) // group_size
        groups = [weight[g_idx == group] for group in range(-(-inputs // group_size))]
        lowest, highest = (torch.stack([getattr(each, end)(0) for each in groups]) for end in ("amin", "amax"))
        if symmetric:
            scales = (2 * torch.maximum(-lowest, highest) / (2**bits - 1)).half()
            zeros = torch.full((len(groups), outputs), 2 ** (bits - 1))
        else:
            scales = ((highest - lowest) / (2**bits - 1)).half()
            zeros = (-lowest / scales).round().clamp(0, 2**bits - 1)
        codes = (weight / scales[g_idx.long()] + zeros[g_idx.long()]).round().clamp(0, 2**bits - 1)
        less = {"gptq": 1, "gptq_v2": 0}[version]
        tensors[f"{module}.qweight"] = words(codes, bits, 0)
        tensors[f"{module}.qzeros"] = words((zeros.long() - less) & (2**bits - 1), bits, 1)
        tensors[f"{module}.scales"], tensors[f"{module}.g_idx"] = scales, g_idx
    save_file(
        {name: value.contiguous() for name, value in tensors.items()}, out / "model.safetensors", {"format": "pt"}
    )
    return out


def is_linear(name: str, tensor: torch.Tensor) -> bool:
    """Whether a tensor of a folder is a linear of its layers, and no router."""
    is_in_layer = re.search(r"\.(layers|h)\.\d+\.", f".{name}") is not None
    return is_in_layer and tensor.dim() == 2 and not name.endswith("gate.weight")


def of_gptq(tensors: Tensors, config: dict[str, Any], folder: Path) -> Tensors:
    """AutoGPTQ's forward: w[i, o] = scales[g_idx[i], o] * (qweight[i, o] - zeros[g_idx[i], o])."""
    for module in modules(tensors, "qweight"):
        qweight, qzeros, scales, g_idx = (
            tensors.pop(f"{module}.{part}") for part in ("qweight", "qzeros", "scales", "g_idx")
        )
        bits = 32 * qweight.shape[0] // len(g_idx)
        assert qweight.dtype == qzeros.dtype == g_idx.dtype == torch.int32
        assert scales.dtype == torch.float16
        less = {"gptq": 1, "gptq_v2": 0}[config["checkpoint_format"]]
        codes, zeros = shifted(qweight, bits, 0), (shifted(qzeros, bits, 1) + less) & (2**bits - 1)
        weight = scales.float()[g_idx.long()] * (codes - zeros[g_idx.long()])
        tensors[f"{module}.weight"] = weight if has_conv1d(folder) else weight.T
    return tensors


def of_compressed_tensors(tensors: Tensors, config: dict[str, Any], _folder: Path) -> Tensors:
    """The package's own compressor, told what the config says."""
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import match_name

    said = QuantizationConfig.model_validate(config)
    assert said.quantization_status == "compressed"
    for module in modules(tensors, "weight_packed"):
        assert not any(match_name(module, name) for name in said.ignore or ())
        groups = [group for group in said.config_groups.values() if not isinstance(group, list)]
        named = [group for group in groups if any(match_name(module, target) for target in group.targets)]
        scheme = (named or [group for group in groups if "Linear" in group.targets])[0]
        names = BaseCompressor.get_value_from_registry(scheme.format or said.format).compression_param_names(scheme)
        parts = {name: tensors.pop(f"{module}.{name}") for name in names}
        compressor = BaseCompressor.get_value_from_registry(scheme.format or said.format)
        tensors[f"{module}.weight"] = compressor.decompress(parts, scheme)["weight"]
    return tensors


def of_awq(tensors: Tensors, config: dict[str, Any], folder: Path) -> Tensors:
    """compressed-tensors' converter of AutoAWQ's files, and then its compressor."""
    from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter

    converter = AutoAWQConverter.from_autoawq_config(config)
    tensors = converter.process(tensors)
    said = converter.update_config(None)
    assert said is not None
    for name in modules(tensors, "weight_scale"):
        tensors[f"{name}.weight_scale"] = tensors[f"{name}.weight_scale"].float()
    return of_compressed_tensors(tensors, said.model_dump(), folder)


def of_modelopt(tensors: Tensors, _config: dict[str, Any], folder: Path) -> Tensors:
    """Two's complement: in 4 bits, output 2r in the low half of byte r and output 2r + 1 in the high one."""
    said = json.loads((folder / "hf_quant_config.json").read_text(encoding="utf-8"))["quantization"]
    for module in modules(tensors, "weight_scale"):
        weight, scale = tensors.pop(f"{module}.weight"), tensors.pop(f"{module}.weight_scale")
        if said["quant_algo"] == "W4A16_AWQ":
            assert weight.dtype == torch.uint8
            halves = torch.stack((weight & 15, weight >> 4), dim=1).flatten(0, 1).to(torch.int8)
            codes = torch.where(halves > 7, halves - 16, halves)
            scale = scale.repeat_interleave(said["group_size"], 1)[:, : codes.shape[1]]
        else:
            assert (said["quant_algo"], weight.dtype) == ("W8A16", torch.int8)
            codes, scale = weight, scale[:, None]
        dense = codes * scale
        tensors[f"{module}.weight"] = dense.T if has_conv1d(folder) else dense
    return tensors


UNPACK: dict[str, Callable[[Tensors, dict[str, Any], Path], Tensors]] = {
    "gptq": of_gptq,
    "awq": of_awq,
    "compressed-tensors": of_compressed_tensors,
    "modelopt": of_modelopt,
}
