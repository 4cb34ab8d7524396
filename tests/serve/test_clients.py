"""Clients that others wrote, pointed at the server and otherwise unchanged."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llmc.builders import ort
from llmc.serve.local import serving

MODEL = "engine"
# Greedy, and of a length that shows whether everything arrives.
LENGTH = 24


def needs(module: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(module) is None
    return pytest.mark.skipif(missing, reason=f'{module} is not installed: pip install ".[oracles]"')


pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable[[str], Path]) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("clients") / MODEL
    ort.build(tiny_checkpoint("qwen2"), folder)
    with serving(folder, "--max-sequences", "4", "--strict") as base:
        yield f"{base}/v1"


@pytest.fixture(scope="module")
def said(url: str) -> str:
    """What the openai client gets."""
    import openai

    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        answer = client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "hi"}], max_tokens=LENGTH, temperature=0
        )
    text = answer.choices[0].message.content
    assert text
    return text


@needs("langchain_openai")
def test_langchain(url: str, said: str) -> None:
    from langchain_openai import ChatOpenAI
    from pydantic import SecretStr

    chat = ChatOpenAI(
        model=MODEL, base_url=url, api_key=SecretStr("none"), temperature=0, max_tokens=LENGTH, max_retries=0
    )
    answer = chat.invoke("hi")
    assert answer.content == said
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] <= LENGTH
    assert "".join(str(piece.content) for piece in chat.stream("hi")) == said


@needs("litellm")
def test_litellm(url: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    import litellm

    def ask(**options: object) -> object:
        return litellm.completion(
            model=f"openai/{MODEL}",
            api_base=url,
            api_key="none",
            messages=[{"role": "user", "content": "hi"}],
            max_tokens=LENGTH,
            temperature=0,
            num_retries=0,
            **options,
        )

    assert ask().choices[0].message.content == said  # type: ignore[attr-defined]
    pieces = list(ask(stream=True))  # type: ignore[call-overload]
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == said


@needs("llm")
def test_llm(url: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: mine\n  model_name: {MODEL}\n  api_base: {url}\n  can_stream: true\n", encoding="utf-8"
    )
    environment = os.environ | {"LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "none", "PYTHONIOENCODING": "utf-8"}
    for option in ((), ("--no-stream",)):
        command = [sys.executable, "-m", "llm", "-m", "mine", "-o", "temperature", "0", "-o", "max_tokens", str(LENGTH)]
        done = subprocess.run([*command, *option, "hi"], env=environment, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr.decode()
        assert done.stdout.decode().strip() == said.strip()
