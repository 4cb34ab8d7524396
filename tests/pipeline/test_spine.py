"""The whole line by its commands, from a Hugging Face folder to an answer over HTTP."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import openai
import pytest
from command_line import llmc

from llmc.errors import EngineError
from llmc.serve.local import serving


def test_from_a_folder_to_an_answer(tmp_path: Path, tiny_source: Callable[[str], Path]) -> None:
    checkpoint, quantized, engine = (tmp_path / name for name in ("checkpoint", "quantized", "engine"))
    said = ""
    for arguments in (
        ("convert", tiny_source("qwen2"), checkpoint),
        ("quantize", checkpoint, quantized, "--algo", "rtn", "--bits", 4, "--group-size", 32),
        ("build-engine", quantized, engine),
        ("generate", engine, "--prompt", "the quick", "--max-tokens", 8),
        ("inspect", engine),
    ):
        said += llmc(*arguments)
    for following in ("llmc quantize", "llmc build-engine", "llmc serve"):
        assert f"next: {following}" in said
    assert "made from checkpoint quantized" in " ".join(said.split())

    with serving(engine, "--max-sequences", "2") as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        answer = client.chat.completions.create(
            model="engine", messages=[{"role": "user", "content": "hi"}], max_tokens=5, extra_body={"ignore_eos": True}
        )
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 5
        client.close()


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    with (
        pytest.raises(EngineError, match=r"status 4.*has no manifest\.json.*llmc build-engine"),
        serving(tmp_path),
    ):
        pytest.fail("nothing is served")


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("convert", "nowhere", "out"), 2, "nowhere"),
        (("quantize", ".", "out"), 4, "llmc convert"),
        (("build-engine", ".", "out"), 4, "llmc convert"),
        (("serve", "."), 4, "llmc build-engine"),
        (("generate", ".", "--prompt", "x"), 4, "llmc build-engine"),
        (("evaluate", ".", "--text", "nowhere.txt"), 2, "nowhere.txt"),
        (("inspect", "."), 4, "manifest.json"),
        (("export", ".", "out", "--format", "hf"), 4, "llmc convert"),
        (("train", "pretrain", "nowhere.toml"), 2, "nowhere.toml"),
    ],
)
def test_a_mistake_is_one_line(arguments: tuple[str, ...], status: int, words: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "llmc.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, "Traceback" in done.stderr) == (status, False), done.stderr
    assert done.stderr.startswith("llmc: ")
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())
