"""llmc.quant.paddlenlp: every field of PaddleNLP's dataclass, and the configurations that it ships."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click import Context
from click.core import ParameterSource

from llmc.commands import recipes
from llmc.commands.quantize import command
from llmc.errors import ConfigError, UserError
from llmc.quant.paddlenlp import FIELDS, read, translate

# QuantArgument of PaddleNLP 00b706d1, llm/utils/argument.py, and QuantConfig, 136516b4, trl/quant_config.py.
QUANT_ARGUMENT: dict[str, Any] = {
    "quant_type": "a8w8", "fp8_type": ["e4m3", "e4m3"], "skip_list_names": [],
    "weight_quant_method": "abs_max_channel_wise", "act_quant_method": "avg", "cachekv_quant_method": "avg_headwise",
    "search_alpha_min": 0.2, "search_alpha_max": 0.8, "search_scale_min": 1.0, "search_scale_max": 5.0,
    "do_qat": False, "do_ptq": False, "ptq_step": 32,
    "shift": False, "shift_all_linears": False, "shift_sampler": "ema", "shift_step": 32,
    "smooth": False, "smooth_all_linears": False, "smooth_sampler": "none", "smooth_step": 32,
    "smooth_piecewise_search": False, "smooth_k_piece": 3, "smooth_search_piece": False,
    "do_gptq": False, "gptq_step": 8, "do_awq": False, "auto_clip": False, "awq_step": 8, "autoclip_step": 8,
    "load_quant_model": False, "do_quant_debug": False, "test_sample": None,
}  # fmt: skip

# What all of its configuration files have in common.
SHARED = {
    "model_name_or_path": "some/model", "per_device_train_batch_size": 8, "per_device_eval_batch_size": 8,
    "eval_accumulation_steps": 16, "src_length": 1024, "max_length": 2048, "fp16": True, "fp16_opt_level": "O2",
    "dataset_name_or_path": "./data", "output_dir": "./checkpoints/ptq_ckpts", "do_eval": True,
    "eval_with_do_generation": False, "unified_checkpoint": True,
}  # fmt: skip
PIECES = {
    "do_ptq": True, "ptq_step": 16, "smooth": True, "smooth_step": 16, "smooth_all_linears": True,
    "smooth_piecewise_search": True, "smooth_k_piece": 3, "smooth_search_piece": True,
}  # fmt: skip
AWQ = {
    "do_ptq": True, "quant_type": "weight_only_int4", "weight_quant_method": "groupwise", "ptq_step": 16,
    "smooth": True, "auto_clip": True, "autoclip_step": 1, "do_awq": True,
}  # fmt: skip
FP8 = {
    "use_fp8": "WA", "do_ptq": True, "ptq_step": 16, "smooth": False, "weight_quant_method": "abs_max",
    "act_quant_method": "abs_max", "cachekv_quant_method": "abs_max",
}  # fmt: skip
ALONE = {"keep": ["[!l]*"]}
SMOOTHED = {**ALONE, "algo": "smoothquant", "activations": "static", "smooth_pieces": 3}
AWQED = {**ALONE, "algo": "awq", "bits": "4", "group_size": "128", "option": ["steps=20", "variant=full"]}
GPTQED = {**ALONE, "algo": "gptq", "bits": "4", "group_size": "128", "option": ["damping=0.1", "act_order=true"]}
FP8ED = {**ALONE, "algo": "fp8", "activations": "static", "per_tensor": True}
GPTQ = {"do_gptq": True, "gptq_step": 8}

# Its files under llm/config (as of 2024) -> what they have beside SHARED, and what becomes of them.
FILES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama/ptq": ({**PIECES, "bf16": True}, SMOOTHED),
    "llama/awq": ({**AWQ, "bf16": True}, AWQED),
    "llama/gptq": ({**GPTQ, "bf16": True}, GPTQED),
    "llama/ptq_c8": (
        {**PIECES, "quant_type": "a8w8c8", "act_quant_method": "avg", "cachekv_quant_method": "avg_headwise"},
        {**SMOOTHED, "kv_cache": "int8", "kv_scale": "head", "kv_observer": "average"},
    ),
    "llama/fp8_ptq": ({**FP8, "quant_type": "W8A8", "fp8_type": ["e4m3", "e4m3"]}, FP8ED),
    "llama/AdvertiseGen/w8a8_ptq": ({**PIECES, "quant_type": "a8w8", "act_quant_method": "avg"}, SMOOTHED),
    "llama/AdvertiseGen/wfp8afp8_ptq": ({**FP8, "quant_type": "a8w8", "fp8_type": ["e4m3", "e4m3"]}, FP8ED),
    "qwen/AdvertiseGen/w8a8c8_ptq": (
        {**PIECES, "quant_type": "a8w8c8", "act_quant_method": "abs_max", "cachekv_quant_method": "abs_max_headwise"},
        {**SMOOTHED, "kv_cache": "int8", "kv_scale": "head", "kv_observer": "max"},
    ),
    "qwen/ceval/wfp8afp8_ptq": ({**FP8, "quant_type": "a8w8", "bf16": True}, FP8ED),
    "baichuan/ptq": (PIECES, SMOOTHED),
    "baichuan/awq": (AWQ, AWQED),
    "baichuan/gptq": (GPTQ, GPTQED),
    "bloom/ptq": (PIECES, SMOOTHED),
    "bloom/gptq": (GPTQ, GPTQED),
    "chatglm/ptq": ({"do_ptq": True, "ptq_step": 16}, {**ALONE, "algo": "w8a8", "activations": "static"}),
    "chatglm/gptq": (GPTQ, GPTQED),
    "chatglm2/ptq": (PIECES, SMOOTHED),
    "chatglm2/gptq": (GPTQ, GPTQED),
}
# Those that only load what another run has made, or an algorithm of their own.
REFUSED = {
    "llama/ceval_ptq": ({**PIECES, "do_ptq": False, "load_quant_model": True, "do_ceval": True}, "load_quant_model"),
    "qwen/ceval/ceval_w8a8_ptq": ({"load_quant_model": True, "smooth_k_piece": 1}, "load_quant_model"),
    "llama/foem": ({**GPTQ, "do_foem": True, "bf16": False, "fp16_opt_level": "O0"}, "do_foem"),
}

# A value of each field of the dataclass that is not its default, beside what it needs -> what it adds or changes.
W8A8, INT4 = {"do_ptq": True}, {"do_ptq": True, "quant_type": "WINT4"}
SMOOTH = {"do_ptq": True, "smooth": True}
CHANGES: dict[str, tuple[dict[str, Any], Any, dict[str, Any]]] = {
    "quant_type": (W8A8, "wint8", {"algo": "rtn", "bits": "8", "group_size": "128"}),
    "skip_list_names": (W8A8, ["down_proj"], {"keep": ["[!l]*", "layers.*.*.down"]}),
    "weight_quant_method": (INT4, "groupwise", {"group_size": "128"}),
    "act_quant_method": (W8A8, "abs_max", {"activations": "static"}),
    "cachekv_quant_method": ({**W8A8, "quant_type": "a8w8c8"}, "abs_max_headwise", {"kv_observer": "max"}),
    "do_ptq": ({}, True, {"algo": "w8a8", "activations": "static"}),
    "shift": (SMOOTH, True, {"shift": True, "alpha": "0.5"}),
    "shift_all_linears": ({**SMOOTH, "shift": True}, True, {"shift": True}),
    "smooth": (W8A8, True, {"algo": "smoothquant", "alpha": "0.5"}),
    "smooth_all_linears": (SMOOTH, True, {"algo": "smoothquant"}),
    "smooth_piecewise_search": (SMOOTH, True, {"smooth_pieces": 3}),
    "smooth_k_piece": ({**SMOOTH, "smooth_piecewise_search": True}, 6, {"smooth_pieces": 6}),
    "do_gptq": ({}, True, {"algo": "gptq"}),
    "do_awq": (INT4, True, {"algo": "awq", "option": ["steps=20", "variant=lite"]}),
    "auto_clip": ({**INT4, "do_awq": True}, True, {"option": ["steps=20", "variant=full"]}),
}
# Of each of the other fields: a value that changes nothing and is told why, or one that is refused by name.
TOLD = {
    "ptq_step": 7, "gptq_step": 7, "awq_step": 7, "autoclip_step": 7, "shift_step": 7, "smooth_step": 7,
    "shift_sampler": "none", "smooth_sampler": "multi_step", "do_quant_debug": True, "test_sample": "hello",
    "smooth_search_piece": True,
}  # fmt: skip
NOT_OFFERED = {
    "fp8_type": ["e5m2", "e4m3"], "do_qat": True, "load_quant_model": True,
    "search_alpha_min": 0.1, "search_alpha_max": 0.9, "search_scale_min": 0.5, "search_scale_max": 9.0,
}  # fmt: skip


def test_every_field_of_the_dataclass_is_there_with_its_default() -> None:
    assert {name: FIELDS[name].default for name in QUANT_ARGUMENT} == QUANT_ARGUMENT
    assert CHANGES.keys() | TOLD.keys() | NOT_OFFERED.keys() == QUANT_ARGUMENT.keys()


@pytest.mark.parametrize("name", CHANGES)
def test_a_field_that_is_mapped(name: str) -> None:
    base, value, expected = CHANGES[name]
    found = translate({**base, name: value}).options
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize("name", TOLD)
def test_a_field_without_a_counterpart_is_told(name: str) -> None:
    base = {**SMOOTH, "smooth_piecewise_search": True}
    plain, found = translate(base), translate({**base, name: TOLD[name]})
    assert found.options == plain.options
    assert [note for note in found.notes if name in note.split(":")[0].split(", ")]


@pytest.mark.parametrize("name", NOT_OFFERED)
def test_a_value_that_is_refused_says_what_to_use(name: str) -> None:
    with pytest.raises(ConfigError, match=f"'{name}' is .*, which is not offered: use ."):
        translate({**SMOOTH, name: NOT_OFFERED[name]})


@pytest.mark.parametrize("name", FILES)
def test_its_own_configurations(name: str, tmp_path: Path) -> None:
    values, expected = FILES[name]
    path = tmp_path / "argument.json"
    path.write_text(json.dumps({**SHARED, **values}), encoding="utf-8")
    found = read(path)
    assert found.options == expected
    told = {field for note in found.notes for field in note.split(":")[0].split(", ")}
    assert {"model_name_or_path", "output_dir", "max_length"} <= told
    assert told <= FIELDS.keys()


@pytest.mark.parametrize("name", REFUSED)
def test_its_configurations_that_are_refused(name: str) -> None:
    values, field = REFUSED[name]
    with pytest.raises(ConfigError, match=f"'{field}' is True, which is not offered: use"):
        translate({**SHARED, **values})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "it asks for no quantization: set 'do_ptq' or 'do_gptq'"),
        ({"do_ptqq": True}, r"'do_ptqq' is no field .* \(did you mean 'do_ptq'\?\)"),
        ({"do_ptq": 1}, "'do_ptq' is 1, expected a bool"),
        (
            {"do_ptq": True, "quant_type": "w2a8"},
            "'quant_type' is 'w2a8', which is not offered: use a8w8, a8w8c8, wint8",
        ),
        ({"do_ptq": True, "do_gptq": True}, "two ways"),
        ({**INT4, "smooth": True}, "'smooth' without 'do_awq'"),
        ({**INT4, "shift": True}, "'shift' makes activations easier"),
        ({**INT4, "auto_clip": True}, "'auto_clip' is part of AWQ"),
        ({**INT4, "use_fp8": "WA"}, "fp8 weights go with fp8 activations"),
        ({**W8A8, "use_fp8": "W"}, "'use_fp8' is 'W', which is not offered: use WA"),
        ({**W8A8, "use_fp8": "WAC"}, "no c8: use a8w8c8"),
        ({**W8A8, "do_awq": True}, "'do_awq' is for weights alone: set quant_type to wint4"),
        ({**W8A8, "shift": True}, "'shift' alone is not offered"),
        ({**W8A8, "weight_quant_method": "abs_max"}, "abs_max goes with fp8"),
        ({**W8A8, "weight_quant_method": "groupwise"}, "groupwise goes with weights alone"),
        ({**FP8, "smooth": True}, "'smooth' goes with int8"),
        (
            {**FP8, "quant_type": "a8w8c8"},
            "a scale for all heads, which is not offered .* use avg_headwise or abs_max_",
        ),
        ({**W8A8, "skip_list_names": ["conv"]}, "'skip_list_names' has 'conv', .* use --keep GLOB"),
    ],
)
def test_what_does_not_go_together(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        translate(values)


def test_fp8_with_a_cache() -> None:
    values = {**FP8, "quant_type": "a8w8c8", "use_fp8": "WAC", "cachekv_quant_method": "avg_headwise"}
    found = translate(values).options
    assert found == {**FP8ED, "kv_cache": "fp8", "kv_scale": "head", "kv_observer": "average"}


def test_layers_that_are_skipped() -> None:
    names = ["lm_head", "llama.layers.3.mlp.down_proj", "layers.0.", "query_key_value", "o_proj"]
    found = translate({**W8A8, "skip_list_names": names}).options["keep"]
    assert found == ["[!l]*", "layers.3.*.down", "layers.0.*", "layers.*.attn.[qkv]", "layers.*.attn.o"]


@pytest.mark.parametrize("name", ["quant.json", "train.json"])
def test_its_data_is_what_is_calibrated_on(name: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.json").write_text('{"src": "a", "tgt": "b"}\n', encoding="utf-8")
    (tmp_path / "data" / name).write_text('{"src": "a", "tgt": "b"}\n', encoding="utf-8")
    found = translate({**W8A8, "dataset_name_or_path": "./data"}, tmp_path)
    assert found.options["calibration"] == [str(tmp_path / "data" / name)]


@pytest.mark.parametrize(("content", "message"), [("[]", "expected an object"), ("{", "cannot read the configuration")])
def test_a_file_that_is_none(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        read(tmp_path / "a.json")


def context(tmp_path: Path, values: dict[str, Any], *typed: str) -> Context:
    path = tmp_path / "argument.json"
    path.write_text(json.dumps({**SHARED, **values}), encoding="utf-8")
    return command.make_context("quantize", ["checkpoint", "out", "--config", str(path), *typed])


def test_the_command_s_recipe(tmp_path: Path, tiny_checkpoint: Callable[[str], Path]) -> None:
    recipe = recipes.chosen(context(tmp_path, AWQ).params, tiny_checkpoint("llama"))
    assert recipe.model_dump()["options"] == {"steps": 20, "variant": "full"}
    assert (recipe.algorithm, recipe.keep) == ("awq", ("[!l]*",))
    assert recipe.weights is not None
    assert (recipe.weights.bits, recipe.weights.group_size) == (4, 128)
    assert recipe.format_of("embed") is recipe.format_of("head") is None
    assert recipe.format_of("layers.0.attn.q") == recipe.weights


def test_what_is_typed_goes_before_it(tmp_path: Path, tiny_checkpoint: Callable[[str], Path]) -> None:
    made = context(tmp_path, GPTQ, "--group-size", "32", "--option", "damping=0.02")
    recipe = recipes.chosen(made.params, tiny_checkpoint("llama"))
    assert recipe.weights is not None
    assert (recipe.algorithm, recipe.weights.group_size, recipe.options) == ("gptq", 32, {"damping": 0.02})
    assert made.get_parameter_source("group_size") is ParameterSource.COMMANDLINE


def test_the_command_says_what_became_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    context(tmp_path, GPTQ)
    said = capsys.readouterr().err
    assert "model_name_or_path, output_dir: an argument of the command" in said
    assert "gptq_step: how much is read: --calibration-tokens counts tokens, not steps" in said


def test_options_that_do_not_exist_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No option of a configuration is lost in silence."""
    monkeypatch.setattr(command, "params", [option for option in command.params if option.name != "group_size"])
    with pytest.raises(UserError, match="needs --group-size"):
        context(tmp_path, GPTQ)


def test_the_page_has_every_field() -> None:
    page = (Path(__file__).parents[3] / "docs" / "paddlenlp-quantization.md").read_text(encoding="utf-8")
    rows = {line.split("`")[1]: line for line in page.splitlines() if line.startswith("| `")}
    missing = {name for name in QUANT_ARGUMENT if FIELDS[name].becomes not in rows.get(name, "") or name not in rows}
    assert not missing
