"""The error tree: drawn whole in its docstring, and every class knows its exit status and HTTP status."""

from __future__ import annotations

import inspect
import re

import pytest

from llmc import errors

CLASSES = {name: value for name, value in vars(errors).items() if inspect.isclass(value)}
DRAWN = {
    match[2]: (len(match[1]), int(match[3]), int(match[4]))
    for match in re.finditer(r"^    ([│├└─ ]*)(\w+Error) +(\d+) +(\d{3})\b", errors.__doc__ or "", re.MULTILINE)
}


def test_the_drawing_lists_every_class() -> None:
    assert len(CLASSES) >= 12
    assert DRAWN.keys() | {"LlmcError"} == CLASSES.keys()


@pytest.mark.parametrize("name", sorted(DRAWN))
def test_statuses_are_as_drawn(name: str) -> None:
    _, exit_code, http_status = DRAWN[name]
    assert CLASSES[name].exit_code == exit_code
    assert CLASSES[name].http_status == http_status


def test_parents_are_as_drawn() -> None:
    above: list[tuple[int, str]] = [(0, "LlmcError")]
    for name, (indent, _, _) in DRAWN.items():
        while above[-1][0] >= indent:
            above.pop()
        assert CLASSES[name].__bases__ == (CLASSES[above[-1][1]],), name
        above.append((indent, name))


def test_no_status_is_that_of_another_kind_of_end() -> None:
    """0 is success, 130 an interrupt; 1 also stands for anything unforeseen."""
    for item in CLASSES.values():
        assert 1 <= item.exit_code <= 5
        assert item.http_status in {400, 404, 413, 429, 500, 503, 504}
        assert item.__doc__


def test_a_user_error_names_the_field() -> None:
    assert errors.UserError("x").param is None
    assert errors.ConfigError("x", param="a.b").param == "a.b"
