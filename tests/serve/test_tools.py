"""Functions that are called over HTTP, by the openai package, with a model that says what the test wants."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fake
import jsonschema
import numpy as np
import openai
import pytest
from werkzeug.serving import make_server

from llmc.runtime import Chunk, Logits
from llmc.serve.app import create_app
from llmc.serve.engine import Engine
from llmc.serve.service import Service
from llmc.tokenizer import Tokenizer

# What follows a template's own words on tools is that of tests/tiny.py.
TURNS = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}{{ call.function.arguments.city }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "hermes": "{% if tools %}{{ tools | tojson }} <tool_call>{% endif %}" + TURNS,
    "mistral": "{% if tools %}{{ tools | tojson }} [TOOL_CALLS]{% endif %}" + TURNS,
    "llama": "{% if tools %}{{ tools | tojson }} ipython{% endif %}" + TURNS,
}
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 6}, "days": {"type": "integer", "maximum": 9}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "now"}},
]
SAID = {
    "hermes": 'Well.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>',
    "mistral": '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Rome"}}, {"name": "now", "arguments": {}}]',
    "llama": '{"name": "weather", "parameters": {"city": "Rome"}}',
}
ASKED: Any = [{"role": "user", "content": "weather?"}]


class Scripted(fake.FakeRunner):
    """Says `script` after "assistant" and then ends; random where the script is empty."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(max_sequences=4, max_length=900)
        self._tokenizer = tokenizer
        self._opening = len(tokenizer.encode("assistant\n"))
        self.script: list[int] = []
        self.prompts: list[str] = []

    def say(self, text: str) -> None:
        self.script = [*self._tokenizer.encode(text), 2]

    def _compute(self, chunk: Chunk) -> Logits:
        rows = super()._compute(chunk)
        cache = self.caches[chunk.sequence_id]
        if chunk.logits and self.script:
            begin = len(cache) - cache[::-1].index(1) + self._opening
            if len(cache) == begin:
                self.prompts.append(self._tokenizer.decode(cache, skip_special_tokens=False))
            rows = np.array(rows)
            rows[-1, self.script[min(len(cache) - begin, len(self.script) - 1)]] += 50
        return rows


Model = tuple[openai.OpenAI, Scripted]


@pytest.fixture
def model(tmp_path: Path) -> Iterator[Callable[[str], Model]]:
    engines, servers, clients = [], [], []

    def make(name: str) -> Model:
        tokenizer = dataclasses.replace(fake.tokenizer(tmp_path), chat_template=TEMPLATES[name])
        runner = Scripted(tokenizer)
        engines.append(Engine(runner, tokenizer))
        engines[-1].start()
        servers.append(make_server("127.0.0.1", 0, create_app(Service(engines[-1], "toy", 1)), threaded=True))
        threading.Thread(target=servers[-1].serve_forever).start()
        url = f"http://127.0.0.1:{servers[-1].server_port}/v1"
        clients.append(openai.OpenAI(base_url=url, api_key="none", max_retries=0))
        return clients[-1], runner

    yield make
    for client in clients:
        client.close()
    for server in servers:
        server.shutdown()
        server.server_close()
    for engine in engines:
        engine.close()


def ask(client: openai.OpenAI, **options: Any) -> Any:
    return client.chat.completions.create(**{"model": "toy", "messages": ASKED, "tools": TOOLS, "seed": 1} | options)


def streamed(client: openai.OpenAI, **options: Any) -> tuple[str, list[tuple[str, str]], str | None]:
    """Content, calls and finish reason, put together as clients do."""
    content, calls, ended = "", [], None
    for chunk in ask(client, stream=True, **options):
        choice = chunk.choices[0]
        content += choice.delta.content or ""
        assert choice.delta.tool_calls != []
        for call in choice.delta.tool_calls or ():
            if call.id:
                assert call.index == len(calls)
                calls.append([call.function.name, ""])
            calls[call.index][1] += call.function.arguments
        ended = choice.finish_reason or ended
    return content, [(name, arguments) for name, arguments in calls], ended


@pytest.mark.parametrize("form", SAID)
def test_a_call_streaming_or_not(model: Callable[[str], Model], form: str) -> None:
    client, runner = model(form)
    runner.say(SAID[form])
    choice = ask(client).choices[0]
    calls = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls]
    assert calls == [("weather", '{"city": "Rome"}'), ("now", "{}")][: len(calls)]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == ("Well." if form == "hermes" else None)
    assert streamed(client) == (choice.message.content or "", calls, "tool_calls")
    assert '"of a city"' in runner.prompts[0]

    # The result goes back, and the answer is text.
    runner.say("It rains.")
    results = [{"role": "tool", "tool_call_id": call.id, "content": "rain"} for call in choice.message.tool_calls]
    said = choice.message.model_dump(exclude_none=True)
    found = ask(client, messages=[*ASKED, said, *results]).choices[0]
    assert (found.message.content, found.message.tool_calls, found.finish_reason) == ("It rains.", None, "stop")
    assert "Rome" in runner.prompts[-1]


def test_text_stays_text(model: Callable[[str], Model]) -> None:
    client, runner = model("hermes")
    runner.say("2 < 3, and <tool_call> is how one asks. ")
    found = ask(client).choices[0].message
    assert (found.content, found.tool_calls) == ("2 < 3, and <tool_call> is how one asks. ", None)
    assert streamed(client) == (found.content, [], "stop")
    # Without tools, or without leave to use them, nothing is read as a call.
    runner.say(SAID["hermes"])
    for options in ({"tools": openai.NOT_GIVEN}, {"tool_choice": "none"}):
        found = ask(client, **options).choices[0].message
        assert (found.content, found.tool_calls) == (SAID["hermes"], None)
        assert "of a city" not in runner.prompts[-1]


@pytest.mark.parametrize("form", SAID)
@pytest.mark.parametrize("seed", range(3))
def test_a_forced_call_is_one_whatever_the_model_wants(model: Callable[[str], Model], form: str, seed: int) -> None:
    client, _ = model(form)
    named: Any = {"type": "function", "function": {"name": "weather"}}
    choice = ask(client, tool_choice=named, seed=seed).choices[0]
    (call,) = choice.message.tool_calls
    assert call.function.name == "weather"
    jsonschema.validate(json.loads(call.function.arguments), PARAMETERS)
    assert choice.message.content is None
    arguments = call.function.arguments
    assert streamed(client, tool_choice=named, seed=seed) == ("", [("weather", arguments)], "tool_calls")
    choice = ask(client, tool_choice="required", parallel_tool_calls=False, seed=seed, max_tokens=250).choices[0]
    assert [call.function.name in ("weather", "now") for call in choice.message.tool_calls] == [True]


def test_a_call_cut_short_is_the_same_streaming_or_not(model: Callable[[str], Model]) -> None:
    client, runner = model("hermes")
    runner.say(SAID["hermes"])
    whole = len(runner.script)
    for count in (whole - 30, whole - 25, whole - 20, whole - 12):
        choice = ask(client, max_tokens=count).choices[0]
        calls = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls or ()]
        assert streamed(client, max_tokens=count) == (choice.message.content or "", calls, "length")
        assert choice.finish_reason == "length"


def test_mistakes(model: Callable[[str], Model]) -> None:
    client, _ = model("hermes")
    other: Any = {"type": "function", "function": {"name": "other"}}
    bad = [{"type": "function", "function": {"name": "f", "strict": True, "parameters": {"type": "nonsense"}}}]
    for options, words in (
        ({"tool_choice": other}, "'tools' does not have"),
        ({"tool_choice": "required", "tools": []}, "'tools' does not have"),
        ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "exclude each other"),
        ({"tool_choice": "required", "tools": bad}, "nonsense"),
    ):
        with pytest.raises(openai.BadRequestError, match=words):
            ask(client, **options)
