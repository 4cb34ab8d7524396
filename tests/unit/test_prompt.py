"""Rendered conversations against transformers' apply_chat_template, character for character."""

from __future__ import annotations

import dataclasses
import resource
import time
from pathlib import Path
from typing import Any

import pytest
import tiny

from llmc.errors import UserError
from llmc.prompt import chat_ids, chat_text, completion_ids
from llmc.tokenizer import Tokenizer

CHATML_TOOLS = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- else %}
        {{- 'You are a helpful assistant.' }}
    {%- endif %}
    {{- "\\n\\n# Tools\\n\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}
            {{- '\\n' + message.content }}
        {%- endif %}
        {%- for call in message.tool_calls %}
            {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.previtem and loop.previtem.role != "tool" %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != "tool" %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

HEADERS = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n" + system_message }}
{{- "<|eot_id|>" }}
{% for message in messages %}
    {%- if not (message.role == 'ipython' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim }}
        {{- '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

INST = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
        {{- raise_exception("roles must alternate user/assistant/user/assistant/...") }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- else %}
        {{- " " + message["content"] | trim + eos_token}}
    {%- endif %}
{%- endfor %}
"""

MASKED = """{% for message in messages %}
  {% if message.role == 'assistant' %}
    {% generation %}
{{ message.content }}{{ eos_token }}
    {% endgeneration %}
  {% elif message.content == 'skip' %}
    {% continue %}
  {% else %}
<{{ message.role }}>{{ message.content }}
  {% endif %}
{% endfor %}
"""

TEMPLATES = {"tiny": tiny.CHAT_TEMPLATE, "chatml": CHATML_TOOLS, "headers": HEADERS, "inst": INST, "masked": MASKED}

CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one": [{"role": "user", "content": "the quick <b>fox</b> & \u00e9\u4f60\U0001f600"}],
    "system": [{"role": "system", "content": " be brief "}, {"role": "user", "content": "hi"}],
    "turns": [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": " b "},
        {"role": "user", "content": "skip"},
        {"role": "assistant", "content": "d"},
        {"role": "user", "content": "e\n\n"},
    ],
}

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "It's <fine> & caf\u00e9",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
CALLS: list[dict[str, Any]] = [
    {"role": "user", "content": "weather?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "K\u00f6ln"}}}],
    },
    {"role": "tool", "content": "12 degrees"},
    {"role": "tool", "content": "rain"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompt")
    tiny.save_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def truth(folder: Path) -> Any:
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(folder)
    found.bos_token = "<s>"
    return found


def ours(folder: Path, template: str | None) -> Tokenizer:
    return dataclasses.replace(Tokenizer.load(folder), chat_template=template, bos_token="<s>")


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("generation", [True, False])
def test_text_is_transformers(folder: Path, truth: Any, template: str, conversation: str, generation: bool) -> None:
    messages = CONVERSATIONS[conversation]
    wanted = truth.apply_chat_template(
        messages, chat_template=TEMPLATES[template], tokenize=False, add_generation_prompt=generation
    )
    tokenizer = ours(folder, TEMPLATES[template])
    assert chat_text(tokenizer, messages, add_generation_prompt=generation) == wanted
    assert wanted.strip()


def test_tools_and_more_variables_are_transformers(folder: Path, truth: Any) -> None:
    assert chat_text(ours(folder, CHATML_TOOLS), CALLS, tools=TOOLS) == truth.apply_chat_template(
        CALLS, tools=TOOLS, chat_template=CHATML_TOOLS, tokenize=False, add_generation_prompt=True
    )
    messages = CONVERSATIONS["one"]
    text = chat_text(ours(folder, HEADERS), messages, date_string="1 Jan 2000")
    assert "1 Jan 2000" in text
    assert text == truth.apply_chat_template(
        messages, chat_template=HEADERS, tokenize=False, add_generation_prompt=True, date_string="1 Jan 2000"
    )


def test_ids_are_transformers(folder: Path, truth: Any) -> None:
    for messages in CONVERSATIONS.values():
        wanted = truth.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert chat_ids(ours(folder, tiny.CHAT_TEMPLATE), messages) == wanted


def test_no_special_token_comes_twice(folder: Path) -> None:
    from tokenizers import processors

    tokenizer = ours(folder, "{{ '<|im_start|>' }}{{ messages[0].content }}")
    tokenizer.backend.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    assert completion_ids(tokenizer, "fox").count(1) == 1
    assert chat_ids(tokenizer, [{"role": "user", "content": "fox"}]) == completion_ids(tokenizer, "fox")


def test_parts_of_text_are_joined_and_others_refused(folder: Path) -> None:
    tokenizer = ours(folder, tiny.CHAT_TEMPLATE)
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    joined = chat_text(tokenizer, [{"role": "user", "content": parts}])
    assert joined == chat_text(tokenizer, [{"role": "user", "content": "a b"}])
    with pytest.raises(UserError, match="image_url"):
        chat_text(tokenizer, [{"role": "user", "content": [{"type": "image_url"}]}])


BAD_TEMPLATES = {
    "{{ raise_exception('only one turn, please') }}": "refuses.*only one turn, please",
    "{% if %}": "TemplateSyntaxError",
    "{{ messages[0].nothing.at.all }}": "UndefinedError",
    "{{ ''.__class__.__mro__ }}": "SecurityError",
    "{{ messages.append(1) }}": "SecurityError",
    "{% for i in range(1000000000) %}{% endfor %}": "LimitError",
    "{{ 1 / 0 }}": "ZeroDivisionError",
    "{% include '/etc/passwd' %}": "TypeError",
}


@pytest.mark.parametrize("template", BAD_TEMPLATES)
def test_a_bad_template_is_an_error_of_the_request(folder: Path, template: str) -> None:
    with pytest.raises(UserError, match=BAD_TEMPLATES[template]) as caught:
        chat_text(ours(folder, template), [{"role": "user", "content": "x"}])
    assert caught.value.param == "messages"


def test_without_a_template_the_error_says_what_works(folder: Path) -> None:
    with pytest.raises(UserError, match="/v1/completions"):
        chat_text(ours(folder, None), [{"role": "user", "content": "x"}])


TWICE = "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = "
ENDLESS = {
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": "takes longer than",
    "{% macro again(n) %}{{ again(n - 1) if n }}{{ again(n - 1) if n }}{% endmacro %}{{ again(90) }}": "takes longer",
    "{% for a in [messages] recursive %}{{ loop([messages, messages]) }}{% endfor %}": "takes longer|Recursion",
    "{% for i in range(99999) %}{{ 'a' * 99999 }}{% endfor %}": "text of more than",
    TWICE + "ns.s ~ ns.s %}{% endfor %}": "text of more than",
    TWICE + "ns.s + ns.s %}{% endfor %}": "text of more than",
    TWICE + "ns.s * 99 %}{% endfor %}": "text of more than",
    TWICE + "[ns.s, ns.s] | join %}{% endfor %}": "text of more than",
    TWICE + "ns.s | replace('a', ns.s) %}{% endfor %}": "text of more than",
    TWICE + "ns.s.replace('a', ns.s) %}{% endfor %}": "text of more than",
    "{{ [0] * 10 ** 10 }}": "text of more than",
    "{{ 9 ** (9 ** 9) }}": "too many digits",
    "{{ 'a'.ljust(10 ** 10) }}": "text of more than",
    "{{ 'a' | center(10 ** 10) }}": "text of more than",
    "{{ 'a' | indent(width=10 ** 10, first=true) }}": "text of more than",
    "{{ '%9999999999d' % 1 }}": "text of more than",
    "{{ '%9999999999d' | format(1) }}": "text of more than",
    "{{ '{:>9999999999}'.format(1) }}": "text of more than",
    "{{ [1] | batch(10 ** 10, 0) | list }}": "text of more than",
    "{{ [1] | slice(10 ** 10) | list }}": "text of more than",
    "{{ lipsum(n=10 ** 9) }}": "text of more than",
}


@pytest.mark.parametrize("template", ENDLESS)
def test_a_template_without_end_is_stopped(folder: Path, template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmc.template.MAX_SECONDS", 0.3)
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=ENDLESS[template]):
        chat_text(ours(folder, template), [{"role": "user", "content": "x"}])
    assert time.monotonic() - began < 3
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10


def test_a_long_conversation_is_within_the_limits(folder: Path) -> None:
    messages = [{"role": "user", "content": "a word " * 5}] * 20_000
    assert len(chat_text(ours(folder, tiny.CHAT_TEMPLATE), messages)) > 20_000 * 35
