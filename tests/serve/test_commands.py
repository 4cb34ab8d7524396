"""`llmc generate` and `llmc serve` with a real tiny engine, and their mistakes as one line."""

from __future__ import annotations

import io
import json
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny

from llmc import cli
from llmc.builders import ort as builder
from llmc.prompt import chat_ids
from llmc.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable[[str], Path]) -> Path:
    folder = tmp_path_factory.mktemp("commands") / "tiny-engine"
    builder.build(tiny_checkpoint("qwen2"), folder, max_length=96)
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(each) for each in arguments])
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def greedy(engine: Path, ids: list[int], count: int) -> str:
    import torch

    tokenizer, model, tokens = Tokenizer.load(engine), tiny.TINY["qwen2"].build(), list(ids)
    with torch.no_grad():
        while len(tokens) < len(ids) + count and (len(tokens) == len(ids) or tokens[-1] not in tokenizer.eos_ids):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokenizer.decode(tokens[len(ids) :])


def test_generate_is_transformers_greedy(
    engine: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = Tokenizer.load(engine)
    wanted = greedy(engine, tokenizer.encode("the quick"), 12)
    status, out, err = run(capsys, "generate", engine, "--prompt", "the quick", "--max-tokens", 12)
    assert (status, out) == (0, wanted + "\n")
    assert re.search(r"2 prompt tokens .* tokens/s", err)
    monkeypatch.setattr(sys, "stdin", io.StringIO("the quick"))
    assert run(capsys, "generate", engine, "--prompt", "-", "--max-tokens", 12)[1] == wanted + "\n"
    ids = chat_ids(tokenizer, [{"role": "user", "content": "the quick"}])
    status, out, _ = run(capsys, "generate", engine, "--chat", "the quick", "--max-tokens", 12)
    assert (status, out) == (0, greedy(engine, ids, 12) + "\n")


def test_generate_samples_by_its_seed_and_stops(engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["generate", engine, "--prompt", "fox", "--temperature", 1.5, "--max-tokens", 30, "--ignore-eos"]
    texts = [run(capsys, *options, "--seed", seed)[1] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    stop = next(char for char in texts[0][3:] if char.isascii() and char.isalpha())
    assert run(capsys, *options, "--seed", 1, "--stop", stop)[1] == texts[0].partition(stop)[0] + "\n"


MISTAKES = [
    (["generate", "ENGINE"], 2, "either --prompt or --chat"),
    (["generate", "ENGINE", "--prompt", "a", "--chat", "b"], 2, "either --prompt or --chat"),
    (["generate", "ENGINE", "--prompt", "a", "--temperature", "9"], 2, "temperature"),
    (["generate", "ENGINE", "--prompt", "a " * 200], 2, "maximum context length is 96 tokens"),
    (["generate", "/nowhere", "--prompt", "a"], 4, "llmc build-engine"),
    (["serve", "/nowhere"], 4, "llmc build-engine"),
    (["serve", "ENGINE", "--api-key-file", "/nowhere"], 2, "cannot read the API keys"),
    (["serve", "ENGINE", "--api-key-file", "/dev/null"], 2, "has no API key"),
    (["serve", "ENGINE", "--speculate", "guess"], 2, "--speculate guess: say ngram, ngram:K with K from 1 to 16"),
    (["serve", "ENGINE", "--speculate", ""], 2, "say ngram"),
    (["serve", "ENGINE", "--host", "256.0.0.1"], 2, "cannot listen on 256.0.0.1:8000"),
]


@pytest.mark.parametrize(("arguments", "status", "words"), MISTAKES)
def test_a_mistake_is_one_line(
    engine: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, words: str
) -> None:
    met, out, err = run(capsys, *(str(engine) if each == "ENGINE" else each for each in arguments))
    assert (met, out) == (status, "")
    assert words in err
    assert err.startswith("llmc: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "options",
    [["--deterministic"], ["--speculate", "ngram:4", "--kv-cache-gib", "0.01", "--max-step-tokens", "32"]],
)
def test_serve_announces_answers_and_drains(engine: Path, options: list[str]) -> None:
    command = [sys.executable, "-m", "llmc.cli", "serve", str(engine), "--port", "0", "--threads", "1", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        lines = [process.stdout.readline() for _ in range(5)]
        announced = re.search(r"Serving 'tiny-engine' at (http://127\.0\.0\.1:\d+)", lines[0])
        assert announced
        assert "96 tokens at most" in lines[1]
        assert re.search(r"tokens in the cache \(0\.\d\d GiB\)", lines[1])
        body = json.loads(lines[4].partition("-d '")[2].strip().removesuffix("'"))
        url = re.search(r"curl (\S+)", lines[3])
        assert url
        asked = urllib.request.Request(url[1], json.dumps(body | {"max_tokens": 5, "temperature": 0}).encode())
        asked.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(asked, timeout=20) as response:
            text = json.load(response)["choices"][0]["message"]["content"]
        ids = chat_ids(Tokenizer.load(engine), body["messages"])
        assert text == greedy(engine, ids, 5)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert process.stderr.read() == ""


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--kv-cache-gib", "0.00001"], "give it at least"),
        (["--speculate", "ngram", "--deterministic"], "exclude each other"),
        (["--max-step-tokens", "16", "--deterministic"], "max_step_tokens (16) must be at least 47"),
    ],
)
def test_serve_with_options_that_cannot_be_kept_is_one_line(engine: Path, options: list[str], words: str) -> None:
    command = [sys.executable, "-m", "llmc.cli", "serve", str(engine), "--port", "0", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 4
    assert done.stderr.count("\n") == 1
    assert words in done.stderr


def test_serve_without_a_whole_engine_is_one_line(engine: Path, tmp_path: Path) -> None:
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(engine, broken)
    with (broken / "engine.json").open("a") as file:
        file.write(" ")
    command = [sys.executable, "-m", "llmc.cli", "serve", str(broken), "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 4
    assert done.stderr.count("\n") == 1
    assert "engine.json was changed" in done.stderr
