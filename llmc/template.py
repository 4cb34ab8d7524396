"""Chat templates: Jinja programs that came with a model, from whoever made it, rendered within limits.

They are compiled in Jinja's sandbox with the same settings, functions and extensions as transformers gives them, so
that their text is the same. A template that never ends, or writes without end, is stopped: every turn of a loop and
every call of a macro looks at the clock, and whatever makes a long text out of short ones looks at its length.

Knows: Jinja. Does not know: messages, tokenizers.
"""

from __future__ import annotations

import functools
import json
import re
import threading
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import do_join, make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_SECONDS = 5.0
MAX_CHARACTERS = 16 << 20
# Bits of a power.
MAX_BITS = 1 << 16
# Filters that can make much out of little.
GROWING = ("batch", "center", "format", "indent", "slice")

_state = threading.local()


class Refusal(jinja2.TemplateError):
    """What a template raises by itself, with its own words for the user."""


class LimitError(jinja2.TemplateError):
    """A template took too long or wrote too much."""


def render(template: str, variables: Mapping[str, Any]) -> str:
    """The text of a template.

    Raises:
        Refusal: The template says that these variables are wrong.
        LimitError: It takes longer than MAX_SECONDS, or writes more than MAX_CHARACTERS.
        Exception: A template can fail in any way that Python code can.
    """
    _state.deadline = time.monotonic() + MAX_SECONDS
    pieces, size = [], 0
    for piece in _compiled(template).generate(variables):
        size += len(piece)
        _check_size(size)
        pieces.append(piece)
    return "".join(pieces)


def tick() -> None:
    """For compiled templates: look at the clock.

    Raises:
        LimitError: The time is over.
    """
    if time.monotonic() > _state.deadline:
        raise LimitError(f"it takes longer than {MAX_SECONDS:g} seconds")


def join(*parts: Any) -> str:
    """For compiled templates: the operator ~."""
    texts = [str(part) for part in parts]
    _check_size(sum(map(len, texts)))
    return "".join(texts)


def _check_size(size: int) -> None:
    if size > MAX_CHARACTERS:
        raise LimitError(f"it makes a text of more than {MAX_CHARACTERS} characters")


def _check_arguments(*values: Any) -> None:
    """Refuse widths and counts that no conversation has, as numbers or within formats."""
    for value in values:
        if isinstance(value, int):
            _check_size(value)
        elif isinstance(value, str):
            _check_size(max(map(int, re.findall(r"(?<!\d)\d{8,18}(?!\d)", value[:1000])), default=0))


def _check_method(owner: str, name: str, args: tuple[Any, ...]) -> None:
    """Refuse a call of a string's method that makes too much of it."""
    if name in ("format", "format_map"):
        _check_arguments(owner)
    elif name == "replace" and len(args) > 1:
        _check_size(len(owner) + owner.count(str(args[0])) * len(str(args[1])))
    elif name == "join" and args and isinstance(args[0], list | tuple):
        _check_size(sum(len(each) + len(owner) for each in args[0] if isinstance(each, str)))


class _Limits(NodeTransformer):
    """Puts `tick` into loops and macros, and `join` in place of ~."""

    def _timed(self, node: nodes.For | nodes.Macro) -> nodes.Node:
        self.generic_visit(node)
        call = nodes.Call(nodes.ImportedName(f"{__name__}.tick"), [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(call).set_lineno(node.lineno))
        return node

    visit_For = visit_Macro = _timed  # noqa: N815

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        call = nodes.Call(nodes.ImportedName(f"{__name__}.join"), node.nodes, [], None, None)
        return call.set_lineno(node.lineno)


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, within limits."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        found: nodes.Template = _Limits().visit(super()._parse(source, name, filename))
        return found

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """See SandboxedEnvironment."""
        sizes = [len(each) if isinstance(each, str | list | tuple) else each for each in (left, right)]
        if operator == "%" and isinstance(left, str):
            _check_arguments(left)
        elif all(isinstance(size, int) for size in sizes):
            if operator == "**" and left.bit_length() * right > MAX_BITS:
                raise LimitError("it makes a number of too many digits")
            if operator in "+*" and sizes != [left, right]:
                _check_size(sizes[0] + sizes[1] if operator == "+" else sizes[0] * sizes[1])
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """See SandboxedEnvironment."""
        _check_arguments(*(each for each in (*args, *kwargs.values()) if isinstance(each, int)))
        # The sandbox wraps str.format.
        owner = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)
        if isinstance(owner, str):
            _check_method(owner, __obj.__name__, args)
        return super().call(__context, __obj, *args, **kwargs)


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %} marks the assistant's words for training masks: only its body counts."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        """See Extension."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _to_json
    for name in GROWING:
        environment.filters[name] = _bounded(environment.filters[name])
    environment.filters["join"] = _join
    environment.filters["replace"] = _replace
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(template)


def _bounded(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def bounded(value: Any, *args: Any, **kwargs: Any) -> Any:
        _check_arguments(*args, *kwargs.values())
        if function.__name__ == "do_format":
            _check_arguments(value)
        return function(value, *args, **kwargs)

    return bounded


@jinja2.pass_eval_context
def _join(context: nodes.EvalContext, value: Any, d: str = "", attribute: str | int | None = None) -> str:
    if attribute is not None:
        value = map(make_attrgetter(context.environment, attribute), value)
    parts = list(value)
    _check_size(sum(len(each) + len(d) for each in parts if isinstance(each, str)))
    return str(do_join(context, parts, d))


def _replace(value: Any, old: Any, new: Any, count: int | None = None) -> str:
    text = str(value)
    _check_method(text, "replace", (old, new))
    return text.replace(str(old), str(new), -1 if count is None else count)


def _raise(message: str) -> None:
    raise Refusal(message)


def _strftime_now(format: str) -> str:  # noqa: A002
    return datetime.now().strftime(format)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes for HTML, which a model was not trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
