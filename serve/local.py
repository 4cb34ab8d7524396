"""A server in a process of its own, for as long as a block of code runs: for demonstrations, benchmarks and tests.

    with serving(Path("engine")) as url:
        openai.OpenAI(base_url=f"{url}/v1", api_key="none")

It is the command `llmc serve` on a free port, so what is shown or measured is what a user gets.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from llmc.errors import EngineError

EXIT_SECONDS = 90


@contextlib.contextmanager
def serving(engine: Path, *options: str) -> Iterator[str]:
    """Serve `engine` until the block ends; yields the base URL once requests are taken.

    Args:
        options: More of `llmc serve`'s.

    Raises:
        EngineError: The server did not start, or did not end with status 0 after SIGTERM; with its words.
    """
    command = [sys.executable, "-m", "llmc.cli", "serve", str(engine), "--port", "0", *options]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            url = _announced(server)
            if url is not None:
                yield url
                server.terminate()
            server.wait(EXIT_SECONDS)
        finally:
            server.kill()
            server.wait()
            server.communicate()
        if url is None or server.returncode:
            errors.seek(0)
            raise EngineError(f"the server ended with status {server.returncode}: {errors.read().strip()}")


def _announced(server: subprocess.Popen[str]) -> str | None:
    """The address in the first line that a server prints; None when it ends without one."""
    found = re.search(r"http://\S+", server.stdout.readline() if server.stdout else "")
    return found and found.group()
