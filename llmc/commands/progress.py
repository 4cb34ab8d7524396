"""How commands show that long work goes on. Not a command."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

_INTERVAL = 10.0  # seconds between two lines where there is no terminal


@contextlib.contextmanager
def shown() -> Iterator[Callable[[str, int, int], None]]:
    """Yield a function to be called with (what is being done, steps done, steps).

    On a terminal it moves a bar, one for each thing that is done; elsewhere it writes a line to standard error every
    ten seconds.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines(console.print)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        tasks = {}

        def move(what: str, done: int, of: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=of)
            bars.update(tasks[what], completed=done, total=of)

        yield move


def _lines(write: Callable[[str], None]) -> Callable[[str, int, int], None]:
    last = time.monotonic()

    def line(what: str, done: int, of: int) -> None:
        nonlocal last
        if time.monotonic() - last >= _INTERVAL:
            last = time.monotonic()
            write(f"{what}: {done} of {of}")

    return line
