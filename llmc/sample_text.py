"""Text that every Python installation has: what models are calibrated on and judged by when nobody names a text.

English from pydoc's topics and Python from the standard library, in turns of some thousand characters, so that any
beginning of it has both. The two sets share no topic and no module. A model for other languages or other work is
served better by a text of its own.

Knows: where Python keeps its words. Does not know: tokens.
"""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

Set = Literal["calibration", "held-out"]

MODULES: dict[Set, Sequence[str]] = {
    "calibration": ("argparse", "calendar", "difflib", "heapq", "shlex", "tarfile", "mimetypes"),
    "held-out": ("textwrap", "statistics", "zipfile", "csv", "fractions", "queue"),
}
_TURN = 4000  # characters


def describe(which: Set) -> str:
    """Where the text comes from, for people."""
    return f"Python {platform.python_version()}: pydoc topics and {', '.join(MODULES[which])} ({which} half)"


def read(which: Set) -> str:
    """The whole set: the same text wherever the same version of Python is installed."""
    return "".join(_turns(english(which), code(which)))


def english(which: Set) -> str:
    """Every other topic; paragraphs that both halves have (topics repeat each other) are in the calibration half."""
    from pydoc_data.topics import topics

    ordered = [topics[name].split("\n\n") for name in sorted(topics)]
    known = {paragraph for topic in ordered[0::2] for paragraph in topic} if which == "held-out" else set()
    chosen = ordered[which == "held-out" :: 2]
    return "\n\n".join(paragraph for topic in chosen for paragraph in topic if paragraph not in known)


def code(which: Set) -> str:
    """Modules of the standard library."""
    return "\n\n".join(_source(name) for name in MODULES[which])


def _source(module: str) -> str:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return ""
    path = Path(spec.origin)
    if path.name == "__init__.py":  # zipfile became a package in 3.12
        return "".join(item.read_text(encoding="utf-8") for item in sorted(path.parent.glob("*.py")))
    return path.read_text(encoding="utf-8")


def _turns(*texts: str) -> Iterator[str]:
    for start in range(0, max(map(len, texts)), _TURN):
        yield from (text[start : start + _TURN] for text in texts if start < len(text))
