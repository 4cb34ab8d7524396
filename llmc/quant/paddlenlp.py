"""PaddleNLP's quantization configurations (llm/config/*/{ptq,awq,gptq,ptq_c8,fp8_ptq}_argument.json) in our options.

A field is mapped to options of `llmc quantize`, or has no counterpart and the note says why, or has a value that is
refused by name with what to use instead. What the fields mean: llm/docs/quantization.md, llm/utils/argument.py
(QuantArgument, since 2024 paddlenlp/trl/quant_config.py) and llm/utils/quant.py of that project.

Knows: names of options. Does not know: what they do.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmc.errors import ConfigError

Values = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Field:
    """A field of a configuration.

    Attributes:
        default: PaddleNLP's; its type is what the file must have.
        becomes: Of our options, or why there is none.
        only: Values that are taken; none given takes all.
        instead: What to use instead of others.
    """

    default: Any
    becomes: str
    only: tuple[Any, ...] = ()
    instead: str = ""


_PTQ = ("a8w8", "w8a8", "a8w8c16", "w8a8c16", "a8w8c8", "w8a8c8", "a8w8_fp8")
_WEIGHT_ONLY = {
    "weight_only_int4": "4",
    "wint4": "4",
    "w4a16": "4",
    "weight_only_int8": "8",
    "wint8": "8",
    "w8a16": "8",
}
_STEPS = "how much is read: --calibration-tokens counts tokens, not steps"
_ARGUMENT = "an argument of the command"
_RUN = "how PaddleNLP runs: windows of 512 tokens, a layer at a time, in float32 here"
_JUDGED = "every result is judged: see --text"

# The default of each is that of the dataclass.
FIELDS: dict[str, Field] = {
    "quant_type": Field(
        "a8w8", "--algo, --bits, --activations, --kv-cache", (*_PTQ, *_WEIGHT_ONLY), "a8w8, a8w8c8, wint8 or wint4"
    ),
    "use_fp8": Field("", "--algo fp8, --kv-cache fp8", ("", "wa", "wac"), "WA: fp8 weights go with fp8 activations"),
    "fp8_type": Field(["e4m3", "e4m3"], "--algo fp8", (["e4m3", "e4m3"], ["e4m3"] * 3), "e4m3 for all"),
    "skip_list_names": Field([], "--keep"),
    "weight_quant_method": Field(
        "abs_max_channel_wise",
        "--group-size, --per-tensor",
        ("abs_max_channel_wise", "groupwise", "group_wise", "abs_max"),
        "abs_max_channel_wise or groupwise",
    ),
    "act_quant_method": Field(
        "avg", "--activations static, from the largest values: a mean is not offered", ("avg", "abs_max"), "abs_max"
    ),
    "cachekv_quant_method": Field("avg_headwise", "--kv-scale head, --kv-observer"),
    "search_alpha_min": Field(0.2, "--smooth-pieces, whose grid it is", (0.2,), "0.2, or --alpha FLOAT"),
    "search_alpha_max": Field(0.8, "--smooth-pieces, whose grid it is", (0.8,), "0.8, or --alpha FLOAT"),
    "search_scale_min": Field(1.0, "--smooth-pieces, whose grid it is", (1.0,), "1.0, or --alpha FLOAT"),
    "search_scale_max": Field(5.0, "--smooth-pieces, whose grid it is", (5.0,), "5.0, or --alpha FLOAT"),
    "do_qat": Field(False, "", (False,), "do_ptq: training with quantization is not offered"),
    "do_ptq": Field(False, "--algo"),
    "ptq_step": Field(32, _STEPS),
    "shift": Field(False, "--shift"),
    "shift_all_linears": Field(False, "--shift, which shifts all: the engine takes away what nothing before can"),
    "shift_sampler": Field("ema", "extremes of the whole text, not a moving average", ("ema", "none"), "none"),
    "shift_step": Field(32, _STEPS),
    "smooth": Field(False, "--algo smoothquant"),
    "smooth_all_linears": Field(
        False, "--algo smoothquant, which smooths all: the engine multiplies what cannot be folded"
    ),
    "smooth_sampler": Field("none", "a layer's inputs are seen once, all of them", ("none", "multi_step"), "none"),
    "smooth_step": Field(32, _STEPS),
    "smooth_piecewise_search": Field(False, "--smooth-pieces"),
    "smooth_k_piece": Field(3, "--smooth-pieces"),
    "smooth_search_piece": Field(False, "--smooth-pieces with smooth_k_piece: the number of pieces is not searched"),
    "do_gptq": Field(False, "--algo gptq"),
    "gptq_step": Field(8, _STEPS),
    "do_awq": Field(False, "--algo awq"),
    "auto_clip": Field(False, "--option variant=full"),
    "awq_step": Field(8, _STEPS),
    "autoclip_step": Field(8, _STEPS),
    "load_quant_model": Field(False, "", (False,), "`llmc evaluate` on the quantized checkpoint"),
    "do_quant_debug": Field(False, "report.json has every matrix's error"),
    "test_sample": Field(None, "`llmc generate` on the engine"),
    # Of later versions and of scripts around it.
    "do_foem": Field(False, "", (False,), "do_gptq alone"),
    "do_ceval": Field(False, "", (False,), "`llmc evaluate`"),
    "ceval_data_path": Field("", "`llmc evaluate`"),
    # Of the model, the data and the trainer, as far as those files have them.
    "model_name_or_path": Field("", _ARGUMENT),
    "output_dir": Field("", _ARGUMENT),
    "dataset_name_or_path": Field("", "--calib, where its quant.json or train.json is there"),
    "src_length": Field(1024, _RUN),
    "max_length": Field(2048, _RUN),
    "per_device_train_batch_size": Field(8, _RUN),
    "per_device_eval_batch_size": Field(8, _RUN),
    "eval_accumulation_steps": Field(16, _RUN),
    "bf16": Field(False, _RUN),
    "fp16": Field(False, _RUN),
    "fp16_opt_level": Field("O1", _RUN),
    "unified_checkpoint": Field(False, "the canonical checkpoint is always safetensors"),
    "do_eval": Field(False, _JUDGED),
    "eval_with_do_generation": Field(False, _JUDGED),
}

_KV_METHODS = {"avg_headwise": "average", "abs_max_headwise": "max"}

# Parts of PaddleNLP's names of layers -> of ours.
_LAYERS = {
    "q_proj": ["layers.*.attn.q"],
    "k_proj": ["layers.*.attn.k"],
    "v_proj": ["layers.*.attn.v"],
    "qkv_proj": ["layers.*.attn.[qkv]"],
    "query_key_value": ["layers.*.attn.[qkv]"],
    "o_proj": ["layers.*.attn.o"],
    "out_proj": ["layers.*.attn.o"],
    "self_attn": ["layers.*.attn.*"],
    "self_attention": ["layers.*.attn.*"],
    "gate_proj": ["layers.*.*.gate"],
    "up_proj": ["layers.*.*.up"],
    "down_proj": ["layers.*.*.down"],
    "gate_up_fused_proj": ["layers.*.*.gate", "layers.*.*.up"],
    "dense_h_to_4h": ["layers.*.*.up", "layers.*.*.gate"],
    "dense_4h_to_h": ["layers.*.*.down"],
    "mlp": ["layers.*.mlp.*"],
    "lm_head": ["[!l]*"],
    "embed_tokens": ["[!l]*"],
}
# All that stands outside of layers: PaddleNLP quantizes linears of layers alone.
_OUTSIDE = "[!l]*"


@dataclass(frozen=True, slots=True)
class Translation:
    """What a configuration asks of `llmc quantize`.

    Attributes:
        options: By the names of its parameters; those that can be given several times have lists.
        notes: For people: fields that are in the file and became no option, and why.
    """

    options: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read(path: Path) -> Translation:
    """Translate a file.

    Raises:
        ConfigError: It cannot be read, a field is unknown, or a value has no counterpart.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"cannot read the configuration {path}: {error}", param="config") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected an object", param="config")
    try:
        return translate(values, path.parent)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}", param="config") from None


def translate(values: Values, folder: Path = Path()) -> Translation:
    """Translate the values of a file.

    Args:
        folder: What relative paths of data are relative to, besides the current folder.

    Raises:
        ConfigError: A field is unknown, or a value has no counterpart.
    """
    for name, value in values.items():
        _check(name, value)
    config = {name: values.get(name, known.default) for name, known in FIELDS.items()}
    config.update(quant_type=config["quant_type"].lower(), use_fp8=config["use_fp8"].lower())
    found = _algorithm(config)
    found["keep"] = list(
        dict.fromkeys([_OUTSIDE, *(glob for name in config["skip_list_names"] for glob in _kept(name))])
    )
    found.update(_data(config["dataset_name_or_path"], folder))
    return Translation(found, _notes(values, config, found))


def _notes(values: Values, config: Values, found: Values) -> list[str]:
    """Fields with the same reason together."""
    names = [name for name in values if not FIELDS[name].becomes.startswith("--")]
    if found.get("activations") == "static" and config["act_quant_method"] == "avg":
        names.append("act_quant_method")
    if "smooth_pieces" in found and config["smooth_search_piece"]:
        names.append("smooth_search_piece")
    reasons: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        reasons.setdefault(FIELDS[name].becomes or "off, as it must be", []).append(name)
    notes = [f"{', '.join(names)}: {reason}" for reason, names in reasons.items()]
    if "group_size" in found and "group" not in config["weight_quant_method"]:
        notes.append("weight_quant_method: groups of 128, in 4 bits with zero points: finer than a scale for each row")
    return notes


def _check(name: str, value: Any) -> None:
    if name not in FIELDS:
        near = difflib.get_close_matches(name, FIELDS, n=1)
        hint = f" (did you mean '{near[0]}'?)" if near else ""
        raise ConfigError(f"'{name}' is no field of a quantization configuration{hint}")
    known = FIELDS[name]
    kind = type(known.default)
    if known.default is not None and type(value) is not kind and not (kind is float and type(value) is int):
        raise ConfigError(f"'{name}' is {value!r}, expected a {kind.__name__}")
    met = value.lower() if isinstance(value, str) else value
    if known.only and met not in known.only:
        raise ConfigError(f"'{name}' is {value!r}, which is not offered: use {known.instead}")


def _algorithm(config: Values) -> dict[str, Any]:
    """The options but for data and what is kept."""
    if config["do_gptq"] and config["do_ptq"]:
        raise ConfigError("'do_gptq' and 'do_ptq' are two ways: set one")
    if config["do_gptq"]:
        # Its apply_gptq has these values and 4 bits, whatever quant_type is; a scale for each row.
        return {"algo": "gptq", "bits": "4", "group_size": "128", "option": ["damping=0.1", "act_order=true"]}
    if not config["do_ptq"]:
        raise ConfigError("it asks for no quantization: set 'do_ptq' or 'do_gptq'")
    kind = config["quant_type"]
    found = _weights_alone(config, _WEIGHT_ONLY[kind]) if kind in _WEIGHT_ONLY else _with_activations(config)
    return found | _kv_cache(config)


def _weights_alone(config: Values, bits: str) -> dict[str, Any]:
    awq = config["do_awq"]
    if config["use_fp8"]:
        raise ConfigError("'use_fp8' goes with quant_type a8w8: fp8 weights go with fp8 activations")
    if config["shift"]:
        raise ConfigError("'shift' makes activations easier to round, and weights alone are rounded: leave it out")
    if config["smooth"] and not awq:
        raise ConfigError("'smooth' without 'do_awq' makes weights harder to round, and they alone are: set 'do_awq'")
    if config["auto_clip"] and not awq:
        raise ConfigError("'auto_clip' is part of AWQ: set 'do_awq', or use --algo gptq, which searches its scales")
    found: dict[str, Any] = {"algo": "awq" if awq else "rtn", "bits": bits, "group_size": "128"}
    if awq:
        # Its AWQSearch has a grid of 20.
        found["option"] = ["steps=20", f"variant={'full' if config['auto_clip'] else 'lite'}"]
    return found


def _with_activations(config: Values) -> dict[str, Any]:
    fp8 = bool(config["use_fp8"]) or config["quant_type"].endswith("fp8")
    for name in ("do_awq", "auto_clip"):
        if config[name]:
            raise ConfigError(f"'{name}' is for weights alone: set quant_type to wint4")
    if "group" in config["weight_quant_method"]:
        raise ConfigError("'weight_quant_method' groupwise goes with weights alone: use abs_max_channel_wise")
    if fp8:
        for name in ("smooth", "shift"):
            if config[name]:
                raise ConfigError(f"'{name}' goes with int8: fp8 has exponents enough for large channels, leave it out")
        per_tensor = config["weight_quant_method"] == "abs_max"
        return {"algo": "fp8", "activations": "static"} | ({"per_tensor": True} if per_tensor else {})
    if config["weight_quant_method"] == "abs_max":
        raise ConfigError("'weight_quant_method' abs_max goes with fp8: use abs_max_channel_wise")
    if config["shift"] and not config["smooth"]:
        raise ConfigError("'shift' alone is not offered: set 'smooth', too")
    if not config["smooth"]:
        return {"algo": "w8a8", "activations": "static"}
    found: dict[str, Any] = {"algo": "smoothquant", "activations": "static"}
    # Its Smooth has an alpha of a half where nothing is searched.
    found |= {"smooth_pieces": config["smooth_k_piece"]} if config["smooth_piecewise_search"] else {"alpha": "0.5"}
    return found | ({"shift": True} if config["shift"] else {})


def _kv_cache(config: Values) -> dict[str, Any]:
    if not config["quant_type"].endswith("c8"):
        if "c" in config["use_fp8"]:
            raise ConfigError("'use_fp8' has a C, for the KV cache, and quant_type has no c8: use a8w8c8")
        return {}
    method = config["cachekv_quant_method"]
    if method not in _KV_METHODS:
        raise ConfigError(
            f"'cachekv_quant_method' is {method!r}, a scale for all heads, which is not offered (it lost 2 to 3 % of "
            f"perplexity): use {' or '.join(_KV_METHODS)}"
        )
    kind = "fp8" if "c" in config["use_fp8"] else "int8"
    return {"kv_cache": kind, "kv_scale": "head", "kv_observer": _KV_METHODS[method]}


def _kept(name: str) -> list[str]:
    """Globs for a part of a layer's name, which may begin with `layers.N.`."""
    words = name.strip(".").split(".")
    at = next((index for index, word in enumerate(words[:-1]) if word == "layers" and words[index + 1].isdigit()), None)
    layer = "*" if at is None else words[at + 1]
    if at is not None and len(words) == at + 2:
        return [f"layers.{layer}.*"]
    if words[-1] not in _LAYERS:
        raise ConfigError(
            f"'skip_list_names' has {name!r}, which is none of {', '.join(_LAYERS)}: use --keep GLOB with our names"
        )
    return [glob.replace("layers.*", f"layers.{layer}", 1) for glob in _LAYERS[words[-1]]]


def _data(path: str, folder: Path) -> dict[str, Any]:
    """The calibration file that PaddleNLP would take from a folder of data."""
    for root in (folder / path, Path(path)) if path else ():
        for name in ("quant.json", "train.json"):
            if (root / name).is_file():
                return {"calibration": [str(root / name)]}
    return {}
