"""Whole runs, tiny: what they write, that they repeat, and that an interrupt costs nothing."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import training
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from llmc import manifest
from llmc.errors import UserError
from llmc.trainers import pretrain, work
from llmc.trainers.interrupts import Interrupted


def quiet() -> Console:
    return Console(file=io.StringIO())


def weights(run: Path) -> str:
    return hashlib.sha256((run / "model" / "model.safetensors").read_bytes()).hexdigest()


def held_out_losses(run: Path) -> list[float]:
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [entry["held_out_loss"] for entry in entries if "held_out_loss" in entry]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return training.write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def finished(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> pretrain.Result:
    return pretrain.run(training.tiny(texts), tmp_path_factory.mktemp("runs") / "run", console=quiet())


def test_it_learns(finished: pretrain.Result) -> None:
    losses = held_out_losses(finished.folder)
    assert len(losses) == 3
    assert losses[-1] < losses[0] - 0.5
    assert finished.steps == 30


def test_the_folder_is_whole_and_says_where_it_came_from(finished: pretrain.Result, texts: Path) -> None:
    found = manifest.read(finished.folder, "run")
    manifest.verify(finished.folder, found)
    assert {"config.json", "curves.png", "held_out.txt", "log.jsonl"} <= found.files.keys()
    assert (finished.folder / "curves.png").read_bytes()[:4] == b"\x89PNG"
    (parent,) = found.parents
    assert parent.kind == "text"
    assert str(texts) not in (finished.folder / "manifest.json").read_text(encoding="utf-8")
    assert not work.folder_of(finished.folder).exists()
    held_out = (finished.folder / "held_out.txt").read_text(encoding="utf-8")
    inside = [path.name for path in texts.iterdir() if path.read_text(encoding="utf-8") in held_out]
    assert len(inside) == found.notes["held_out_files"]
    assert found.notes["held_out_files"] >= 1


def test_transformers_loads_it_and_agrees_on_the_held_out_loss(finished: pretrain.Result) -> None:
    folder = finished.folder / "model"
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert model.config.use_cache
    assert model.generation_config.eos_token_id == [0, 2]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = (finished.folder / "held_out.txt").read_text(encoding="utf-8").removesuffix("\n")
    ids = [*tokenizer(text).input_ids, 0]
    total, count = 0.0, 0
    for begin in range(0, len(ids), 32):
        row = torch.tensor([ids[begin : begin + 32]])
        if row.shape[1] > 1:
            with torch.no_grad():
                total += float(model(row, labels=row).loss) * (row.shape[1] - 1)
            count += row.shape[1] - 1
    assert total / count == pytest.approx(held_out_losses(finished.folder)[-1], abs=1e-4)


def test_the_same_seed_gives_the_same_weights(finished: pretrain.Result, texts: Path, tmp_path: Path) -> None:
    same = pretrain.run(training.tiny(texts), tmp_path / "same", console=quiet())
    other = pretrain.run(training.tiny(texts, seed=1), tmp_path / "other", console=quiet())
    assert weights(same.folder) == weights(finished.folder)
    assert weights(other.folder) != weights(finished.folder)


class _PowerCut(TrainerCallback):
    """Ends training without a chance to save, as a kill does."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 17:
            raise RuntimeError("power cut")


def test_a_run_that_died_goes_on_to_the_same_weights(
    finished: pretrain.Result, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        original = pretrain.PretrainTrainer.__init__

        def with_power_cut(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            self.add_callback(_PowerCut())

        patch.setattr(pretrain.PretrainTrainer, "__init__", with_power_cut)
        with pytest.raises(RuntimeError, match="power cut"):
            pretrain.run(training.tiny(texts), run, console=quiet())
    assert not run.exists()
    assert work.last_checkpoint(work.folder_of(run)) == work.folder_of(run) / "checkpoint-10"
    pretrain.run(training.tiny(texts), run, console=quiet())
    assert weights(run) == weights(finished.folder)
    assert held_out_losses(run) == held_out_losses(finished.folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_run_that_died_while_it_wrote_its_folder_writes_it_again(
    finished: pretrain.Result, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("llmc.trainers.curves.draw", lambda *_: (_ for _ in ()).throw(OSError("the disk is full")))
        with pytest.raises(OSError, match="the disk is full"):
            pretrain.run(training.tiny(texts), tmp_path / "run", console=quiet())
    assert [path.name for path in tmp_path.iterdir()] == ["run.work"]
    result = pretrain.run(training.tiny(texts), tmp_path / "run", console=quiet())
    assert result.steps == 30
    assert weights(tmp_path / "run") == weights(finished.folder)
    assert held_out_losses(tmp_path / "run") == held_out_losses(finished.folder)


def test_a_checkpoint_that_was_cut_short_is_passed_over(tmp_path: Path) -> None:
    for step, state in {5: "{}", 10: "{}", 15: '{"cut', 20: None}.items():
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state, encoding="utf-8")
    assert work.last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_a_signal_saves_and_the_same_call_goes_on(finished: pretrain.Result, texts: Path, tmp_path: Path) -> None:
    class Signal(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 13:
                os.kill(os.getpid(), signal.SIGTERM)

    run = tmp_path / "run"
    before = signal.getsignal(signal.SIGTERM)
    original = pretrain.PretrainTrainer.__init__

    def with_signal(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.add_callback(Signal())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain.PretrainTrainer, "__init__", with_signal)
        with pytest.raises(Interrupted) as stop:
            pretrain.run(training.tiny(texts), run, console=quiet())
    assert stop.value.signal == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    assert not run.exists()
    assert work.last_checkpoint(work.folder_of(run)) == work.folder_of(run) / f"checkpoint-{stop.value.step}"
    pretrain.run(training.tiny(texts), run, console=quiet())
    assert weights(run) == weights(finished.folder)


def test_unfinished_work_of_other_settings_is_not_mixed(texts: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = training.tiny(texts, steps=3)
    settings = config.model_dump(mode="json", exclude={"output"}) | {"text": "another"}
    with work.opened(run, settings, overwrite=False) as folder:
        (folder / "data").mkdir()
        with (
            pytest.raises(UserError, match="another llmc train is writing"),
            work.opened(run, settings, overwrite=False),
        ):
            pass
    with pytest.raises(UserError, match=r"other settings \(text was 'another'"):
        pretrain.run(config, run, console=quiet())
    assert pretrain.run(config, run, overwrite=True, console=quiet()).steps == 3


def test_an_existing_output_is_refused_before_any_work(finished: pretrain.Result, texts: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="pass --overwrite"):
        pretrain.run(training.tiny(texts), finished.folder, console=quiet())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(UserError, match="not made by llmc"):
        pretrain.run(training.tiny(texts), tmp_path / "mine", overwrite=True, console=quiet())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]


def test_a_time_limit_ends_a_run_that_would_be_long(texts: Path, tmp_path: Path) -> None:
    started = time.monotonic()
    result = pretrain.run(training.tiny(texts, steps=10**6, max_minutes=0.02), tmp_path / "run", console=quiet())
    assert 0 < result.steps < 10**6
    assert time.monotonic() - started < 30
    assert result.history[-2]["learning_rate"] < 0.2 * 5e-3


@pytest.mark.parametrize(
    ("changes", "steps"),
    [({"steps": None, "tokens": 1280}, 10), ({"steps": None, "epochs": 2.0}, None), ({"gradient_accumulation": 2}, 30)],
)
def test_length_and_accumulation(texts: Path, tmp_path: Path, changes: dict[str, Any], steps: int | None) -> None:
    result = pretrain.run(training.tiny(texts, **changes), tmp_path / "run", console=quiet())
    tokens_per_step = 128 * changes.get("gradient_accumulation", 1)
    assert result.history[-1]["tokens"] == result.steps * tokens_per_step
    if steps:
        assert result.steps == steps
    else:
        assert "epoch" in result.history[-1]
        assert result.history[-1]["epoch"] == pytest.approx(2.0, abs=0.1)


def test_gradient_checkpointing_changes_nothing(finished: pretrain.Result, texts: Path, tmp_path: Path) -> None:
    result = pretrain.run(training.tiny(texts, gradient_checkpointing=True), tmp_path / "run", console=quiet())
    assert held_out_losses(result.folder) == pytest.approx(held_out_losses(finished.folder), abs=1e-3)


def test_a_given_tokenizer_and_nothing_held_out(finished: pretrain.Result, texts: Path, tmp_path: Path) -> None:
    config = training.tiny(texts, steps=3)
    config = config.model_copy(
        update={
            "tokenizer": config.tokenizer.model_copy(
                update={"vocab_size": None, "folder": str(finished.folder / "model")}
            ),
            "data": config.data.model_copy(update={"held_out_fraction": 0.0}),
        }
    )
    result = pretrain.run(config, tmp_path / "run", console=quiet())
    same = "model/tokenizer.json"
    assert (result.folder / same).read_bytes() == (finished.folder / same).read_bytes()
    assert held_out_losses(result.folder) == []
    assert (result.folder / "held_out.txt").read_bytes() == b""


def test_a_run_that_diverges_says_so(texts: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the loss is nan at step \d+.*learning_rate"):
        pretrain.run(training.tiny(texts, learning_rate=1e25), tmp_path / "run", console=quiet())
    assert not (tmp_path / "run").exists()


def test_progress_is_lines_in_a_file_and_a_bar_on_a_terminal(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmc.trainers.progress._LINE_SECONDS", 0.0)
    shown = {}
    for terminal in (False, True):
        out = io.StringIO()
        console = Console(file=out, force_terminal=terminal, width=120, highlight=False)
        pretrain.run(training.tiny(texts, steps=10), tmp_path / f"run-{terminal}", console=console)
        shown[terminal] = out.getvalue()
        assert "training a tokenizer of 300 words" in shown[terminal]
        assert "step 10/10  loss " in shown[terminal]
    assert "\x1b" not in shown[False]
    assert len([line for line in shown[False].splitlines() if "step " in line]) == 2
    assert "━" in shown[True]


def test_too_little_text_is_said(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for name in "ab":
        (tmp_path / "text" / f"{name}.txt").write_text(f"only {name}", encoding="utf-8")
    with pytest.raises(UserError, match="less than one row of 32"):
        pretrain.run(training.tiny(tmp_path / "text"), tmp_path / "run", console=quiet())
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_killed_command_goes_on_to_the_same_weights(texts: Path, tmp_path: Path) -> None:
    """The real thing: SIGKILL, then SIGTERM, then to the end, against a run that was left alone."""
    config = tmp_path / "config.json"
    values = training.tiny(texts, steps=400, checkpoint_every=20).model_dump(mode="json", exclude_none=True)
    config.write_text(json.dumps(values), encoding="utf-8")

    def start(name: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "llmc.cli", "train", "pretrain", str(config), "--output", str(tmp_path / name)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def wait_for_checkpoint(after: int) -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            last = work.last_checkpoint(work.folder_of(tmp_path / "stopped"))
            if last and int(last.name.partition("-")[2]) > after:
                return
            time.sleep(0.02)
        raise AssertionError("no checkpoint appeared")

    process = start("stopped")
    wait_for_checkpoint(0)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    after = int(str(work.last_checkpoint(work.folder_of(tmp_path / "stopped"))).rpartition("-")[2])
    process = start("stopped")
    wait_for_checkpoint(after)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "the same command goes on" in output
    assert not (tmp_path / "stopped").exists()
    for name in ("stopped", "alone"):
        process = start(name)
        output = process.communicate(timeout=120)[0]
        assert process.returncode == 0, output
        assert f"llmc convert {tmp_path / name} " in output
    assert weights(tmp_path / "stopped") == weights(tmp_path / "alone")
