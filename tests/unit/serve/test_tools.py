"""Calls of functions in a text, in each known form, however the text is cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from llmc.errors import UserError
from llmc.serve.grammar import Grammars
from llmc.serve.tools import FORMATS, CallParser, Delta, Format, enforced, format_of, whole_calls
from llmc.tokenizer import Tokenizer

HERMES, MISTRAL, LLAMA = FORMATS[:3]
NAMES = {"f", "get_weather"}
Calls = list[tuple[str, str]]


def read(form: Format, *pieces: str) -> tuple[str, Calls, list[Delta]]:
    parser = CallParser(form, NAMES)
    deltas = [delta for piece in pieces for delta in parser.push(piece)] + parser.flush()
    content, calls = whole_calls(deltas)
    assert parser.calls == len(calls)
    return content, [(call["function"]["name"], call["function"]["arguments"]) for call in calls], deltas


TRICKY = '{"a": "}\\"{ </tool_call> ]", "b": [1, {"c": {}}]}'
# (form, text, content, calls)
CASES: list[tuple[Format, str, str, Calls]] = [
    (HERMES, '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>', "", [("f", "{}")]),
    (HERMES, f'So:\n\n<tool_call>\n{{"name": "f", "arguments": {TRICKY}}}\n</tool_call>', "So:", [("f", TRICKY)]),
    (
        HERMES,
        '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>\n<tool_call>\n'
        '{ "name" : "get_weather" , "arguments" :  {"city": "K\u00f6ln"} }\n</tool_call>\n',
        "",
        [("f", '{"x": 1}'), ("get_weather", '{"city": "K\u00f6ln"}')],
    ),
    (HERMES, '<tool_call>{"arguments": {"x": 1}, "name": "f"}</tool_call> done', " done", [("f", '{"x": 1}')]),
    (HERMES, '<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
    (HERMES, "a < b, <tool , <tool_call", "a < b, <tool , <tool_call", []),
    (HERMES, "<tool_call>\nno", "<tool_call>\nno", []),
    (HERMES, '<tool_call>{"name": "rm", "arguments": {}}', '<tool_call>{"name": "rm", "arguments": {}}', []),
    (HERMES, '<tool_call>{"name": "f", "arguments": 5}', '<tool_call>{"name": "f", "arguments": 5}', []),
    (HERMES, "<tool_call>{nonsense}", "<tool_call>{nonsense}", []),
    (HERMES, '<tool_call>\n{"na', '<tool_call>\n{"na', []),
    (HERMES, '<tool_call>\n{"name": "f", "arguments": {"a": [1', "", [("f", '{"a": [1')]),
    (HERMES, '<tool_call>\n{"name": "f", "arguments": {}}\n</tool', "", [("f", "{}")]),
    (HERMES, "  \n", "  \n", []),
    (HERMES, '{"name": "f", "arguments": {}}', '{"name": "f", "arguments": {}}', []),
    (MISTRAL, '[TOOL_CALLS] [{"name": "f", "arguments": {"x": 1}}]', "", [("f", '{"x": 1}')]),
    (
        MISTRAL,
        '[TOOL_CALLS][{"name": "f", "arguments": {}}, {"name": "f", "arguments": {"a": [2]}}]',
        "",
        [("f", "{}"), ("f", '{"a": [2]}')],
    ),
    (MISTRAL, "see [1] and [TOOL", "see [1] and [TOOL", []),
    (LLAMA, '{"name": "f", "parameters": {"x": 1}}', "", [("f", '{"x": 1}')]),
    (LLAMA, '<|python_tag|>{"name": "f", "parameters": {}}', "", [("f", "{}")]),
    (
        LLAMA,
        '{"name": "f", "parameters": {}}; {"name": "f", "parameters": {"a": 2}}',
        "",
        [("f", "{}"), ("f", '{"a": 2}')],
    ),
    (LLAMA, '{"answer": 42}', '{"answer": 42}', []),
    (LLAMA, "  It is {hot}.", "  It is {hot}.", []),
    (LLAMA, " ; hi", " ; hi", []),
]


@pytest.mark.parametrize("number", range(len(CASES)))
def test_each_form_however_it_is_cut(number: int) -> None:
    form, text, content, calls = CASES[number]
    for size in (1, 2, 3, 7, len(text)):
        pieces = [text[begin : begin + size] for begin in range(0, len(text), size)]
        assert read(form, *pieces)[:2] == (content, calls), size


MARKS = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "text", "<", '"name": "f"', ":"]
CALLS = ['{"name": "f", "arguments": {"a": "b"}}', '{"name": "f", "parameters": {}}']
PIECES = st.sampled_from([*MARKS, *CALLS, *'[]{}"\\,; \n'])


@given(st.sampled_from(FORMATS), st.lists(PIECES, max_size=12), st.data())
def test_any_text_is_read_alike_in_any_pieces_and_none_is_lost(
    form: Format, parts: list[str], data: st.DataObject
) -> None:
    text = "".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    content, calls, _ = read(form, text)
    assert read(form, *pieces)[:2] == (content, calls)
    if not calls:
        assert content == text


def test_arguments_come_while_they_are_written() -> None:
    parser = CallParser(HERMES, NAMES)
    assert parser.push('<tool_call>\n{"name": "f", "argum') == []
    first = parser.push('ents": {"city": "Par')
    assert [(each.name, each.arguments) for each in first] == [("f", ""), (None, '{"city": "Par')]
    assert [each.arguments for each in parser.push('is"}')] == ['is"}']
    assert parser.push("}\n</tool_call>") == parser.flush() == []


TEMPLATES: list[tuple[str, Format | None]] = [
    ("{% if tools %}return a JSON within <tool_call></tool_call>{% endif %}", HERMES),
    ("{% if tools %}[AVAILABLE_TOOLS]{% endif %}{{ '[TOOL_CALLS] [' }}", MISTRAL),
    ("{% if tools is not none %}Environment: ipython{% endif %}{{ '<|python_tag|>' }}", LLAMA),
    ("{{ messages[0]['content'] }}", None),
    ("{% if tools %}something else{% endif %}", None),
]


@pytest.mark.parametrize(("template", "wanted"), TEMPLATES)
def test_the_form_is_told_by_the_template(tiny_source: Any, template: str, wanted: Format | None) -> None:
    import dataclasses

    tokenizer = dataclasses.replace(Tokenizer.load(tiny_source("llama")), chat_template=template)
    if wanted is None:
        with pytest.raises(UserError, match="no form for calls"):
            format_of(tokenizer)
    else:
        assert format_of(tokenizer) is wanted


def test_deltas_have_openai_s_form() -> None:
    from openai.types.chat.chat_completion_chunk import ChoiceDelta

    _, _, deltas = read(HERMES, 'x <tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>')
    found = [ChoiceDelta.model_validate(each.openai(), strict=True) for each in deltas]
    assert found[0].content == "x"
    assert found[1].tool_calls
    assert found[1].tool_calls[0].id
    rest = [call.function.arguments for each in found[1:] for call in each.tool_calls or () if call.function]
    assert json.loads("".join(str(each) for each in rest)) == {"a": 1}


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("most", [1, 2])
def test_an_enforced_call_can_be_written_to_its_end(most: int, special: bool, tmp_path: Path) -> None:
    """Qwen's marks are added tokens that are not special, which llguidance takes for special ones."""
    tiny.save_tokenizer(tmp_path)
    backend = Backend.from_file(str(tmp_path / "tokenizer.json"))
    backend.add_tokens([AddedToken(mark, special=special) for mark in ("<tool_call>", "</tool_call>")])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    functions = [{"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}}]
    grammars = Grammars(tokenizer, backend.get_vocab_size())
    call = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
    matcher = grammars.compile(enforced(HERMES, tokenizer, functions, most)).begin()
    for token in tokenizer.encode("\n".join([call] * most), add_special_tokens=False):
        assert matcher.allowed()[token], tokenizer.backend.id_to_token(token)
        matcher.advance(token)
    assert matcher.finished or matcher.allowed()[sorted(tokenizer.eos_ids)].any()
    grammars.close()
