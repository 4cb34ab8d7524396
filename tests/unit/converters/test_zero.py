"""ZeRO checkpoints: real ones, made by DeepSpeed in two processes, and ones written by hand as it writes them."""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from llmc.checkpoint import Checkpoint
from llmc.converters import cast, hf, zero
from llmc.converters.convert import convert
from llmc.errors import CheckpointError, LlmcError
from llmc.tensors import read_tensor

Folder = Callable[[str], Path]
TESTS = Path(__file__).resolve().parents[2]
BF16 = {"bf16": {"enabled": True}}

# Name -> (tiny model, what is frozen, DeepSpeed's settings).
JOBS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "1": ("llama", "", {"zero_optimization": {"stage": 1}, **BF16}),
    "2": ("llama", "", {"zero_optimization": {"stage": 2}}),
    "2-frozen": ("qwen2.5-tied", "norm", {"zero_optimization": {"stage": 2}, **BF16}),
    "3-tied-frozen": ("qwen2.5-tied", "layers.0.mlp", {"zero_optimization": {"stage": 3}, **BF16}),
    "3-sub-groups": ("llama-bias", "", {"zero_optimization": {"stage": 3, "sub_group_size": 5000}}),
    "3-conv1d": ("gpt2", "", {"zero_optimization": {"stage": 3}}),
}


def give_words(source: Path, folder: Path) -> None:
    """Put a model's config and tokenizer beside a checkpoint."""
    for path in source.iterdir():
        if path.suffix in (".json", ".jinja"):
            shutil.copy(path, folder / path.name)


@pytest.fixture(scope="module")
def trained(tiny_source: Folder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of checkpoints, all made by the same two processes."""
    root = tmp_path_factory.mktemp("zero")
    jobs = [
        {"base": str(tiny_source(model)), "out": str(root / name), "frozen": frozen, "config": config}
        for name, (model, frozen, config) in JOBS.items()
    ]
    (root / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, str(TESTS / "zero_training.py"), rank, "2", port, str(root / "jobs.json")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in ("0", "1")
    ]
    try:
        outputs = [process.communicate(timeout=280)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], outputs[0][-3000:] + outputs[1][-3000:]
    for name, (model, _, _) in JOBS.items():
        give_words(tiny_source(model), root / name)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_it_is_what_deepspeed_itself_puts_together(name: str, trained: Path, tmp_path: Path) -> None:
    found = convert(trained / name, tmp_path / "out")
    hf.export(tmp_path / "out", tmp_path / "back")
    met, expected = load_file(tmp_path / "back/model.safetensors"), load_file(trained / name / "oracle.safetensors")
    assert found.spec.tied == (JOBS[name][0] in ("qwen2.5-tied", "gpt2"))
    if found.spec.tied:
        expected.pop("lm_head.weight", None)
    assert met.keys() == expected.keys()
    assert len(met) > 20
    for tensor, value in expected.items():
        assert torch.equal(met[tensor], value), tensor
    assert found.manifest.parents[0].kind == "zero"
    assert found.manifest.parents[0].name == f"{name}/global_step2"
    assert json.loads((tmp_path / "back/config.json").read_text(encoding="utf-8"))["dtype"] == "float32"


@pytest.mark.slow
def test_training_changed_something_and_one_step_can_be_named(
    trained: Path, tiny_source: Folder, tmp_path: Path
) -> None:
    before = hf.convert(tiny_source("llama"), tmp_path / "before")
    found = convert(trained / "2" / "global_step2", tmp_path / "out", dtype="bfloat16")
    assert {str(info.dtype) for info in found.infos.values()} == {"bfloat16"}
    whole = convert(trained / "2", tmp_path / "whole")
    for name in found:
        assert np.array_equal(found[name], whole[name].astype(cast.FLOATS["bfloat16"]))
        assert not np.array_equal(whole[name], before[name])


def by_hand(folder: Path, values: dict[str, torch.Tensor], *, stage: int, ranks: int, groups: int = 1) -> Path:
    """A checkpoint of these tensors as DeepSpeed cuts them, without its own classes."""
    step = folder / "global_step7"
    step.mkdir(parents=True)
    (folder / "latest").write_text("global_step7", encoding="utf-8")
    names = [list(values)[index::groups] for index in range(groups)]
    model = {
        "module": {},
        "buffer_names": [],
        "param_shapes": [{name: values[name].shape for name in group} for group in names],
        "shared_params": {},
    }
    flat: list[list[torch.Tensor]] = [[] for _ in range(ranks)]
    for group in names:
        if stage == 3:
            padded = [
                torch.cat([values[name].flatten(), torch.zeros(-values[name].numel() % ranks)]).reshape(ranks, -1)
                for name in group
            ]
            parts = [torch.cat([item[rank] for item in padded]) for rank in range(ranks)]
        else:
            whole = torch.cat([values[name].flatten() for name in group])
            parts = list(torch.cat([whole, torch.zeros(-len(whole) % (2 * ranks))]).chunk(ranks))
        for rank, part in enumerate(parts):
            flat[rank].append(part.clone())
    for rank in range(ranks):
        key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
        state = {"zero_stage": stage, "partition_count": ranks, key: flat[rank]}
        torch.save({"optimizer_state_dict": state}, step / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        if stage == 3:
            torch.save(model, step / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
    if stage < 3:
        torch.save(model, step / "mp_rank_00_model_states.pt")
    return folder


@given(
    shapes=st.lists(st.lists(st.integers(0, 9), max_size=3).map(tuple), min_size=1, max_size=6),
    stage=st.sampled_from([1, 2, 3]),
    ranks=st.integers(1, 12),
    groups=st.integers(1, 2),
    block=st.integers(1, 64),
)
@settings(max_examples=40, deadline=None)
def test_any_shapes_on_any_number_of_ranks(
    shapes: list[tuple[int, ...]],
    stage: int,
    ranks: int,
    groups: int,
    block: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    generator = torch.Generator().manual_seed(1)
    values = {f"t{index}": torch.randn(shape, generator=generator) for index, shape in enumerate(shapes)}
    groups = min(groups, len(values))
    folder = by_hand(tmp_path_factory.mktemp("zero"), values, stage=stage, ranks=ranks, groups=groups)
    pieces, _ = zero._read(folder / "global_step7")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cast, "BLOCK_BYTES", block)
        found = zero._tensors(pieces, None)
        assert found.infos.keys() == values.keys()
        for name, value in values.items():
            assert np.array_equal(found.load(name), value.numpy())
            assert found.infos[name].shape == tuple(value.shape)


@pytest.fixture(params=[2, 3])
def written(request: pytest.FixtureRequest, tiny_source: Folder, tmp_path: Path) -> Path:
    """The tiny LLaMA as a checkpoint of three ranks, which a test may spoil."""
    values = load_file(tiny_source("llama") / "model.safetensors")
    folder = by_hand(tmp_path / "zero", values, stage=request.param, ranks=3)
    give_words(tiny_source("llama"), folder)
    return folder


def test_a_checkpoint_written_by_hand(written: Path, tiny_checkpoint: Folder, tmp_path: Path) -> None:
    found, expected = convert(written, tmp_path / "out"), Checkpoint(tiny_checkpoint("llama"))
    assert len(found.infos) > 20
    for name in expected:
        assert np.array_equal(found[name], read_tensor(expected.infos[name])), name


def refused(source: Path, said: str, kind: type[LlmcError] = CheckpointError) -> None:
    out = source.parent / "out"
    with pytest.raises(kind) as caught:
        zero.convert(source, out)
    assert said in str(caught.value)
    assert not out.exists()


def optimizer(folder: Path, rank: int) -> Path:
    return folder / "global_step7" / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def test_missing_files_are_named(written: Path) -> None:
    (written / "config.json").rename(written / "kept")
    refused(written, "config.json")
    (written / "kept").rename(written / "config.json")
    optimizer(written, 2).rename(written / "kept")
    refused(written, "3 ranks wrote it, and the files of 2 are here")
    (written / "kept").rename(optimizer(written, 2))
    optimizer(written, 1).unlink()
    refused(written, "rank 1")


def test_model_states_must_be_there(written: Path) -> None:
    for path in (written / "global_step7").glob("*model_states.pt"):
        path.unlink()
    refused(written, "model_states.pt is missing")


@pytest.mark.parametrize("name", ["../elsewhere", "global_step8"])
def test_latest_must_name_a_folder_inside(name: str, written: Path) -> None:
    (written / "latest").write_text(name, encoding="utf-8")
    refused(written, f"names '{name}'")


@pytest.mark.parametrize(
    "name", ["zero_pp_rank_0_mp_rank_01_optim_states.pt", "expp_rank_0_mp_rank_00_optim_states.pt"]
)
def test_other_parallelisms_are_refused(name: str, written: Path) -> None:
    shutil.copy(optimizer(written, 0), written / "global_step7" / name)
    refused(written, name)


def change(path: Path, **changes: Any) -> None:
    whole = torch.load(path, weights_only=True)
    (whole.get("optimizer_state_dict") or whole).update(changes)
    torch.save(whole, path)


def test_parts_that_do_not_add_up(written: Path) -> None:
    state = torch.load(optimizer(written, 2), weights_only=True)["optimizer_state_dict"]
    key = next(key for key in state if "fp32" in key)
    change(optimizer(written, 2), **{key: [torch.cat([state[key][0], torch.zeros(60)])]})
    refused(written, "numbers")
    change(optimizer(written, 2), **{key: [state[key][0][:50].clone()]})
    refused(written, "numbers")


def test_an_unknown_stage_or_structure(written: Path) -> None:
    change(optimizer(written, 0), zero_stage=4)
    refused(written, "stage 4")
    torch.save({"weights": {}}, optimizer(written, 0))
    refused(written, "not a ZeRO checkpoint")
    optimizer(written, 0).write_bytes(b"PK\x03\x04")
    refused(written, "cut short")


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_malicious_file_is_refused_and_not_run(written: Path, tmp_path: Path) -> None:
    whole = torch.load(optimizer(written, 1), weights_only=True)
    torch.save({**whole, "evil": Malicious(tmp_path / "pwned")}, optimizer(written, 1))
    refused(written, "posix.mkdir")
    assert not (tmp_path / "pwned").exists()


def test_a_head_that_was_trained_apart_is_kept(
    tiny_source: Folder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = load_file(tiny_source("llama-tied") / "model.safetensors")
    values["lm_head.weight"] = values["model.embed_tokens.weight"] + 1
    folder = by_hand(tmp_path / "zero", values, stage=2, ranks=2)
    give_words(tiny_source("llama-tied"), folder)
    found = convert(folder, tmp_path / "out")
    assert not found.spec.tied
    assert np.array_equal(found["head.weight"], values["lm_head.weight"].numpy())
    assert "tied" in caplog.text


def test_complete_weights_beside_are_preferred(written: Path, tiny_source: Folder, tmp_path: Path) -> None:
    """As the Trainer saves them; the step's own folder asks for the float32 ones."""
    tiny.save(tiny.TINY["llama"], written, dtype="bfloat16")
    assert convert(written, tmp_path / "a").manifest.parents[0].kind == "hf"
    assert convert(written / "global_step7", tmp_path / "b").manifest.parents[0].kind == "zero"


MEASURE = """
import sys
from pathlib import Path
import torch
from llmc.converters import zero

def kilobytes(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))

before = kilobytes("VmRSS")
zero.convert(Path(sys.argv[1]), Path(sys.argv[2]))
print(kilobytes("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_memory_stays_under_the_largest_tensor_and_300_mb(stage: int, tmp_path: Path) -> None:
    from llmc.converters import families
    from llmc.converters.rules import source_names
    from llmc.names import tensors

    config = {
        "hidden_size": 1024, "intermediate_size": 2048, "vocab_size": 64000, "num_hidden_layers": 10,
        "num_attention_heads": 8, "num_key_value_heads": 8, "architectures": ["LlamaForCausalLM"],
    }  # fmt: skip
    family, spec = families.read_spec(config, tmp_path)
    names = source_names(family.rules, spec)
    values = {names[name]: torch.rand(shape) for name, shape in tensors(spec).items()}
    largest = max(value.nbytes for value in values.values())
    by_hand(tmp_path / "zero", values, stage=stage, ranks=4)
    assert sum(math.prod(value.shape) for value in values.values()) * 4 > 800e6
    del values
    (tmp_path / "zero/config.json").write_text(json.dumps(config), encoding="utf-8")
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "zero"), str(tmp_path / "out")]
    output = subprocess.run(command, capture_output=True, text=True, check=True)
    grown = int(output.stdout) * 1024
    assert grown < largest + 300e6, f"grew by {grown / 1e6:.0f} MB, the largest tensor is {largest / 1e6:.0f} MB"
