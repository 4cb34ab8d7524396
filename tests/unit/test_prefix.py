"""llmc.prefix: positions as the comments of ChatGLM-6B's ports give them."""

from __future__ import annotations

import numpy as np
import pytest

from llmc.prefix import NO_PREFIX, Span, find, places
from llmc.spec import Prefix

END, GMASK, MASK = 130004, 130001, 130000
CHATGLM = Prefix(end=END, marks=(GMASK, MASK))


@pytest.mark.parametrize(
    ("tokens", "span"),
    [
        ([74747, 83400, 66846, GMASK, END], Span(4, 3)),
        ([5, MASK, 6, END, 7, GMASK, END], Span(3, 1)),
        ([5, MASK, 6, GMASK, END], Span(4, 3)),
        ([5, 6, END], Span(2, 1)),
        ([END, 5], NO_PREFIX),
        ([5, GMASK], NO_PREFIX),
    ],
)
def test_where_it_ends(tokens: list[int], span: Span) -> None:
    assert find(CHATGLM, np.array(tokens)) == span
    assert find(None, np.array(tokens)) == NO_PREFIX


def test_places() -> None:
    first, second = places(Span(4, 3), 0, 7)
    assert first.tolist() == [0, 1, 2, 3, 3, 3, 3]
    assert second.tolist() == [0, 0, 0, 0, 1, 2, 3]
    assert [axis.tolist() for axis in places(Span(4, 1), 3, 3)] == [[3, 1, 1], [0, 1, 2]]
    assert [axis.tolist() for axis in places(NO_PREFIX, 2, 2)] == [[0, 0], [3, 4]]
