"""llmc as a user runs it: a process of its own."""

from __future__ import annotations

import subprocess
import sys


def llmc(*arguments: object) -> str:
    """What a command prints; it must succeed."""
    command = [sys.executable, "-m", "llmc.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
