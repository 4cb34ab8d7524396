"""Functions that a model may call: how each kind of model writes a call, and finding calls in its text as it comes.

    text ──► CallParser ──► content | a call begins, by name | more of its arguments

A call is a JSON object of a name and arguments; models differ in what stands around it. Whatever looks like a call and
turns out to be none is content, so that no text is lost. Streamed or not, the same parser reads the same text.

Knows: text. Does not know: tokens, HTTP.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from llmc.errors import UserError
from llmc.serve.grammar import WHITESPACE, Constraint
from llmc.tokenizer import Tokenizer

Json = dict[str, Any]
MAX_CALLS = 16


@dataclass(frozen=True, slots=True)
class Format:
    """How calls are written.

    Attributes:
        mark: What a chat template that knows this format has in it.
        begin: Comes before calls.
        bare: A text that begins with a call needs no `begin`.
        glue: Characters that may stand before, between and after calls.
        end: Comes after them.
        arguments: The key of a call's arguments.
        around: What the first call follows, what stands between two, and what the last is followed by, when a call is
            enforced; `{begin}` and `{end}` are the token or text of that name.
    """

    mark: str
    begin: str
    bare: bool
    glue: str
    end: str
    arguments: str
    around: tuple[str, str, str]


# The first whose mark is found in the template.
FORMATS = (
    # Hermes and Qwen: <tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>
    Format(
        "<tool_call>", "<tool_call>", False, " \n\r\t", "</tool_call>", "arguments",
        ('{begin} "\\n"', '"\\n" {end} "\\n" {begin} "\\n"', '"\\n" {end}'),
    ),
    # Mistral: [TOOL_CALLS] [{"name": "f", "arguments": {}}, ...]
    Format("[TOOL_CALLS]", "[TOOL_CALLS]", False, " \n\r\t[,]", "", "arguments", ('{begin} "["', '", "', '"]"')),
    # Llama 3: {"name": "f", "parameters": {}}, perhaps after <|python_tag|>
    Format("<|python_tag|>", "<|python_tag|>", True, " \n\r\t;", "", "parameters", ("", '"; "', "")),
    Format("ipython", "<|python_tag|>", True, " \n\r\t;", "", "parameters", ("", '"; "', "")),
)  # fmt: skip


def format_of(tokenizer: Tokenizer) -> Format:
    """The way in which this model writes calls.

    Raises:
        UserError: Its chat template shows none of the known ones.
    """
    template = tokenizer.chat_template or ""
    for known in FORMATS:
        if known.mark in template and "tools" in template:
            return known
    raise UserError(
        "this model's chat template has no form for calls of functions that this server knows: leave 'tools' out",
        param="tools",
    )


class Delta(NamedTuple):
    """Something new: of the content, or of a call (counted from 0), whose name comes first and alone."""

    content: str = ""
    call: int = 0
    name: str | None = None
    arguments: str = ""

    def openai(self) -> Json:
        """As the delta of a chat completion's chunk."""
        if self.content:
            return {"content": self.content}
        if self.name is None:
            found: Json = {"index": self.call, "function": {"arguments": self.arguments}}
        else:
            function = {"name": self.name, "arguments": ""}
            found = {"index": self.call, "id": _new_id(), "type": "function", "function": function}
        return {"tool_calls": [found]}


def whole_calls(deltas: Sequence[Delta]) -> tuple[str, list[Json]]:
    """The content and the calls of an answer in one piece."""
    content = "".join(delta.content for delta in deltas)
    calls: list[Json] = []
    for delta in deltas:
        if delta.name is not None:
            function = {"name": delta.name, "arguments": ""}
            calls.append({"id": _new_id(), "type": "function", "function": function})
        elif delta.arguments:
            calls[delta.call]["function"]["arguments"] += delta.arguments
    return content, calls


def _new_id() -> str:
    return f"call_{secrets.token_hex(12)}"


class _Value:
    """Follows a JSON value, object or array, to its end."""

    def __init__(self) -> None:
        self._depth = 0
        self._string = self._escaped = False

    def push(self, char: str) -> bool:
        """Whether the value is complete with this character."""
        if self._string:
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == '"':
                self._string = False
        elif char == '"':
            self._string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
        return self._depth == 0 and not self._string


class CallParser:
    """Reads one answer.

    Attributes:
        calls: How many have begun.
    """

    def __init__(self, form: Format, names: Collection[str]) -> None:
        """Begin.

        Args:
            names: The functions on offer; a call of any other is content.
        """
        self.calls = 0
        self._form = form
        self._names = names
        key = re.escape(form.arguments)
        self._head = re.compile(rf'\{{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"{key}"\s*:\s*(?=\{{)')
        self._inside = form.bare  # Between calls, where only glue, calls and the end may come.
        self._opened = ""  # The `begin` that no call has followed yet.
        self._held = ""  # Not decided yet: a part of a marker, or blanks.
        self._call = ""  # The text of the call that is being read, once its brace has come.
        self._value: _Value | None = None
        self._arguments: _Value | None = None
        self._streamed = False

    def push(self, text: str) -> list[Delta]:
        """What is certain now that this text has come."""
        deltas: list[Delta] = []
        for char in text:
            self._push(char, deltas)
        return _joined(deltas)

    def flush(self) -> list[Delta]:
        """What was held back, now that nothing follows; a call cut short keeps what was sent of it."""
        deltas: list[Delta] = []
        rest = self._opened + self._held + ("" if self._streamed else self._call)
        # Blanks and half a marker after calls are no content.
        if not (self.calls and self._form.end.startswith(rest.strip(self._form.glue))):
            deltas.append(Delta(rest))
        self._opened = self._held = self._call = ""
        return [delta for delta in deltas if delta.content]

    def _push(self, char: str, deltas: list[Delta]) -> None:
        if self._value is not None:
            self._in_call(char, deltas)
        elif self._inside:
            self._between(char, deltas)
        else:
            self._in_content(char, deltas)

    def _in_content(self, char: str, deltas: list[Delta]) -> None:
        self._held += char
        blank = len(self._held) - len(self._held.lstrip())
        for start in range(blank, len(self._held)):
            tail = self._held[start:]
            if self._form.begin.startswith(tail):
                # Blanks before a call are no content.
                certain = self._held[:start].rstrip()
                deltas.append(Delta(certain))
                self._held = self._held[len(certain) :]
                if tail == self._form.begin:
                    self._opened, self._held, self._inside = self._held, "", True
                return
        kept = self._held.rstrip()
        deltas.append(Delta(kept))
        self._held = self._held[len(kept) :]

    def _between(self, char: str, deltas: list[Delta]) -> None:
        if char == "{":
            self._value, self._call = _Value(), char
            self._value.push(char)
            return
        self._held += char
        tail = self._held.lstrip(self._form.glue)
        if self._form.end and tail == self._form.end:
            self._opened, self._held, self._inside = "", "", False
        elif tail not in (self._form.begin, "") and not any(
            marker.startswith(tail) for marker in (self._form.begin, self._form.end)
        ):
            self._no_call(self._held, deltas)

    def _in_call(self, char: str, deltas: list[Delta]) -> None:
        self._call += char
        done = self._value is not None and self._value.push(char)
        if self._arguments is not None:
            deltas.append(Delta(call=self.calls - 1, arguments=char))
            if self._arguments.push(char):
                self._arguments = None
        elif not self._streamed and char == "{" and (found := self._head.match(self._call)):
            self._begin(found[1], deltas)
        if done:
            self._end_call(deltas)

    def _begin(self, quoted: str, deltas: list[Delta]) -> None:
        """The name is known, and the arguments' brace has come."""
        name = _name(quoted)
        if name in self._names:
            self._streamed = True
            self._found(name, "{", deltas)
            self._arguments = _Value()
            self._arguments.push("{")

    def _found(self, name: str | None, arguments: str, deltas: list[Delta]) -> None:
        self._opened = self._held = ""
        deltas.append(Delta(call=self.calls, name=name))
        deltas.append(Delta(call=self.calls, arguments=arguments))
        self.calls += 1

    def _no_call(self, text: str, deltas: list[Delta]) -> None:
        """It was content all the time."""
        text, self._opened, self._held, self._inside = self._opened + text, "", "", False
        deltas.append(Delta(text))

    def _end_call(self, deltas: list[Delta]) -> None:
        call, self._call, self._value = self._call, "", None
        streamed, self._streamed, self._arguments = self._streamed, False, None
        if streamed:
            return
        name, arguments = self._parsed(call)
        if name is not None:
            self._found(name, arguments, deltas)
        else:
            self._no_call(self._held + call, deltas)

    def _parsed(self, call: str) -> tuple[str | None, str]:
        """Name and arguments of a call that is written in another order, (None, "") if it is none."""
        try:
            found = json.loads(call)
        except (ValueError, RecursionError):
            return None, ""
        name, arguments = found.get("name"), found.get(self._form.arguments, {})
        if not isinstance(name, str) or name not in self._names or not isinstance(arguments, dict):
            return None, ""
        return name, json.dumps(arguments, ensure_ascii=False)


def _name(quoted: str) -> str | None:
    try:
        return str(json.loads(quoted))
    except ValueError:
        return None


def _joined(deltas: list[Delta]) -> list[Delta]:
    """Neighbours of the same kind as one."""
    joined: list[Delta] = []
    for delta in deltas:
        last = joined[-1] if joined else None
        if delta.name is None and not delta.content and not delta.arguments:
            continue
        if last is not None and last.name is None and delta.name is None:
            if last.content and delta.content:
                joined[-1] = Delta(last.content + delta.content)
                continue
            if last.arguments and delta.arguments and last.call == delta.call:
                joined[-1] = Delta(call=last.call, arguments=last.arguments + delta.arguments)
                continue
        joined.append(delta)
    return joined


def enforced(form: Format, tokenizer: Tokenizer, functions: Sequence[Mapping[str, Any]], most: int) -> Constraint:
    """The form of an answer that is nothing but calls.

    Args:
        functions: Those that may be called, as in a request.
        most: Calls at most.
    """
    rules = []
    for number, function in enumerate(functions):
        schema = {
            "type": "object",
            "properties": {
                "name": {"const": function["name"]},
                form.arguments: {"type": "object", **(function.get("parameters") or {})},
            },
            "required": ["name", form.arguments],
            "additionalProperties": False,
            "x-guidance": {"whitespace_pattern": WHITESPACE, "lenient": not function.get("strict")},
        }
        rules.append(f"call{number}: %json {json.dumps(schema)}")
    begin, end = _symbol(form.begin, tokenizer), _symbol(form.end, tokenizer)
    first, between, last = (part.replace("{begin}", begin).replace("{end}", end) for part in form.around)
    call = " | ".join(f"call{number}" for number in range(len(functions)))
    more = f"({between} call){{0,{most - 1}}}" if most > 1 else ""
    text = "\n".join([f"start: {first} call {more} {last}", f"call: {call}", *rules])
    return Constraint("grammar", text, "tools")


def _symbol(text: str, tokenizer: Tokenizer) -> str:
    """A token or a text in a grammar. llguidance takes tokens for no text that are special, and added ones in angle
    brackets whether special or not (Qwen's <tool_call> is not): written as text, their grammar could not be followed.
    """
    token = tokenizer.backend.token_to_id(text)
    is_added = token in tokenizer.backend.get_added_tokens_decoder()
    if token in tokenizer.special_ids or (is_added and text.startswith("<") and text.endswith(">")):
        return f"<[{token}]>"
    return json.dumps(text)
