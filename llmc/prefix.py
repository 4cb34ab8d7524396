"""Where a text's prefix ends, and where on two axes its tokens stand.

    tokens          a   b   c  [mark] <end>  x   y   z          length 4, mark 3
    first axis      0   1   2    3      3    3   3   3          the place in the prefix, then the mark's
    second axis     0   0   0    0      1    2   3   4          the place behind the prefix

As in ChatGLM-6B's published code (modeling_chatglm.py, get_masks and get_position_ids), which demands an `end` and a
mark; here a text without an `end` has an empty prefix, and all of it stands behind.

Knows tokens. Does not know: who computes with it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from llmc.runtime import Tokens
from llmc.spec import Prefix


class Span(NamedTuple):
    """The prefix of one text.

    Attributes:
        length: Its tokens.
        mark: The place on the first axis of all tokens behind it.
    """

    length: int
    mark: int


NO_PREFIX = Span(0, 0)


def find(prefix: Prefix | None, tokens: npt.NDArray[Any]) -> Span:
    """The prefix of a text.

    Args:
        prefix: The model's; None where it has none.
        tokens: int64 [count], at least the prefix and its end.
    """
    if prefix is None:
        return NO_PREFIX
    ends = np.flatnonzero(tokens == prefix.end)
    if not len(ends) or ends[0] == 0:
        return NO_PREFIX
    inside = tokens[: ends[0]]
    marks = (np.flatnonzero(inside == mark) for mark in prefix.marks)
    return Span(len(inside), next((int(places[0]) for places in marks if len(places)), len(inside) - 1))


def places(span: Span, start: int, count: int) -> tuple[Tokens, Tokens]:
    """The places on both axes of `count` tokens from `start` on, int64 [count] each."""
    positions = np.arange(start, start + count)
    first = np.where(positions < span.length, positions, span.mark)
    return first, np.maximum(positions - span.length + 1, 0)
