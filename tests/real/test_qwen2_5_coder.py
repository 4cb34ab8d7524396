"""The whole line on real weights: Qwen2.5-Coder-0.5B-Instruct from a GGUF file, every stage by its command."""

from __future__ import annotations

import ast
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import llmc

from llmc.runtime import Chunk
from llmc.serve.local import serving
from llmc.serve.runners import open_runner
from llmc.tokenizer import Tokenizer

pytestmark = [pytest.mark.real, pytest.mark.timeout(900)]

QUESTION = [{"role": "user", "content": "Write a Python function that returns the n-th Fibonacci number."}]
COUNT = 64


@pytest.fixture(scope="module")
def work(converted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `exported`, `quantized`, and the engines `fp32` and `int4`."""
    folder = tmp_path_factory.mktemp("real")
    llmc("export", converted, folder / "exported", "--format", "hf")
    quantize = ("--algo", "rtn", "--bits", 4, "--group-size", 32, "--no-evaluate")
    llmc("quantize", converted, folder / "quantized", *quantize)
    llmc("build-engine", converted, folder / "fp32")
    llmc("build-engine", folder / "quantized", folder / "int4")
    return folder


@pytest.fixture(scope="module")
def exported(work: Path) -> tuple[Any, Any]:
    """transformers' model and tokenizer of the exported folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(work / "exported", dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(work / "exported")


@pytest.fixture(scope="module")
def prompt(exported: tuple[Any, Any]) -> list[int]:
    ids: list[int] = exported[1].apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False)
    return ids


def test_transformers_reads_what_was_exported(work: Path, exported: tuple[Any, Any]) -> None:
    model, tokenizer = exported
    ours = Tokenizer.load(work / "int4")
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in ours.eos_ids
    for text in ("def f(x):\n\treturn x  # two", "多言語 тест 🙂 \r\n\n  1234567", "<|im_start|>user<|fim_prefix|>"):
        assert ours.encode(text) == tokenizer.encode(text)
        assert ours.decode(ours.encode(text), skip_special_tokens=False) == text
    assert model.config.model_type == "qwen2"


def test_greedy_text_is_the_same_in_transformers_the_reference_and_the_engine(
    work: Path, converted: Path, exported: tuple[Any, Any], prompt: list[int]
) -> None:
    import torch

    from llmc import model as reference
    from llmc.checkpoint import Checkpoint

    # Its generation settings would sample with a repetition penalty.
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "repetition_penalty": 1.0}
    with torch.no_grad():
        text = exported[0].generate(torch.tensor([prompt]), max_new_tokens=COUNT, **greedy)[0, len(prompt) :].tolist()
    assert len(text) == COUNT

    decoder, cache = reference.load(Checkpoint(converted)), reference.KVCache()

    def decode(tokens: list[int], _: int) -> Any:
        with torch.no_grad():
            return decoder(torch.tensor([tokens]), cache=cache)[0, -1].numpy()

    assert greedy_tokens(decode, prompt) == text

    runner = open_runner(work / "fp32", max_sequences=1)
    runner.claim(0, np.array(prompt))
    assert greedy_tokens(lambda tokens, start: runner.step([Chunk(0, start, np.array(tokens))])[0][-1], prompt) == text
    runner.close()


def greedy_tokens(logits: Any, prompt: list[int]) -> list[int]:
    found: list[int] = []
    new, start = prompt, 0
    while len(found) < COUNT:
        found.append(int(logits(new, start).argmax()))
        new, start = found[-1:], start + len(new)
    return found


@pytest.fixture(scope="module")
def client(work: Path) -> Iterator[Any]:
    import openai

    with serving(work / "int4") as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        yield client


def test_a_streamed_answer_is_a_function(client: Any) -> None:
    stream = client.chat.completions.create(
        model=client.models.list().data[0].id, messages=QUESTION, max_tokens=300, temperature=0, stream=True
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    answer = "".join(pieces)
    print(answer)
    assert len(pieces) > 50
    functions = [node for node in ast.walk(ast.parse(code_in(answer))) if isinstance(node, ast.FunctionDef)]
    assert any("fib" in function.name for function in functions)


def code_in(answer: str) -> str:
    return answer.split("```python\n")[1].split("```")[0]


WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the current weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "unit": {"enum": ["celsius", "fahrenheit"]}},
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_function_is_called_and_its_result_is_used(client: Any, choice: Any) -> None:
    """The model's own template, there and back; streamed, the call is the same."""
    asked = {
        "model": client.models.list().data[0].id,
        "messages": [{"role": "user", "content": "What is the weather in Paris, in celsius?"}],
        "tools": [WEATHER],
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "temperature": 0,
        "max_tokens": 100,
    }
    answer = client.chat.completions.create(**asked).choices[0]
    assert answer.finish_reason == "tool_calls"
    (call,) = answer.message.tool_calls
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Paris", "unit": "celsius"}
    pieces = [chunk.choices[0].delta for chunk in client.chat.completions.create(stream=True, **asked) if chunk.choices]
    found = [each for piece in pieces for each in piece.tool_calls or ()]
    assert [each.function.name for each in found if each.function.name] == ["get_weather"]
    assert "".join(each.function.arguments or "" for each in found) == call.function.arguments
    result = {"role": "tool", "tool_call_id": call.id, "content": '{"temperature": 31, "sky": "clear"}'}
    said = {"role": "assistant", "tool_calls": [call.model_dump()]}
    follow = asked | {"messages": [*asked["messages"], said, result], "tool_choice": "none"}
    assert "31" in client.chat.completions.create(**follow).choices[0].message.content


def test_an_answer_of_a_schema(client: Any) -> None:
    schema = {
        "type": "object",
        "properties": {
            "language": {"enum": ["Python", "C", "Rust"]},
            "year": {"type": "integer"},
            "typing": {"enum": ["static", "dynamic"]},
        },
        "required": ["language", "year", "typing"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": "Which language did Guido van Rossum make, when, and how is it typed?"}],
        response_format={"type": "json_schema", "json_schema": {"name": "language", "schema": schema, "strict": True}},
        temperature=0,
        max_tokens=100,
    ).choices[0]
    assert answer.finish_reason == "stop"
    found = json.loads(answer.message.content)
    assert found.keys() == {"language", "year", "typing"}
    assert isinstance(found["year"], int)
    assert found["language"] in ("Python", "C", "Rust")
    assert found["typing"] in ("static", "dynamic")


def test_sixteen_clients_at_once(client: Any) -> None:
    model = client.models.list().data[0].id

    def ask(index: int) -> int:
        question = [{"role": "user", "content": f"Write a Python function that adds {index} to its argument."}]
        done = client.chat.completions.create(model=model, messages=question, max_tokens=64, temperature=0)
        assert str(index) in done.choices[0].message.content
        return int(done.usage.completion_tokens)

    began = time.perf_counter()
    with ThreadPoolExecutor(16) as pool:
        counts = list(pool.map(ask, range(100, 116)))
    took = time.perf_counter() - began
    print(f"16 clients: {sum(counts)} tokens in {took:.1f} s, {sum(counts) / took:.1f} tokens/s with their prompts")
    assert all(counts)
